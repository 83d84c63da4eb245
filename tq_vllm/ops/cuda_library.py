"""The compiled kernels: libtq_cuda.so in this package, a plain C library opened with ctypes when it is first needed.

Opening it needs neither a GPU nor a driver. Every launcher returns a cudaError_t.
"""

import ctypes
import functools
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent.parent / "libtq_cuda.so"
BUILD = "run `make build` (it needs nvcc) or install a wheel that has it"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/store_kv.h


class CudaKernelError(RuntimeError):
    """A kernel of the library could not be launched."""


@functools.cache
def why_missing() -> str | None:
    """Return None if the library is there and can be opened, else one sentence fragment that says why not."""
    if not PATH.exists():
        return f"{PATH.name} was not built: {BUILD}"
    try:
        library()
    except OSError as error:
        return f"{PATH.name} can't be opened ({error}): {BUILD}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Open the library. Raises OSError if it is not there."""
    handle = ctypes.CDLL(str(PATH))
    handle.tq_error_string.restype = ctypes.c_char_p
    return handle


def check(error: int, what: str) -> None:
    """Raise CudaKernelError if a launcher's cudaError_t is not 0."""
    if error:
        text = library().tq_error_string(error).decode()
        raise CudaKernelError(f"CUDA kernel {what} was not launched: {text} (cudaError {error}).")


def stream_of(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return the current stream of the tensor's device."""
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)
