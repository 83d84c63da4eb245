"""Triton kernels of tq_vllm: imported as `tq_vllm.triton_kernels`, and only so.

vLLM imports an unrelated package named `triton_kernels` for its MXFP4 experts. This folder lies on `sys.path` whenever
the repository root does; the ImportError makes vLLM fall back to its own copy.
"""

if __name__ != "tq_vllm.triton_kernels":
    raise ImportError(
        f"the triton_kernels folder of tq_vllm was imported as {__name__!r}; import tq_vllm.triton_kernels instead"
    )
