"""The operations served by the compiled CUDA kernels (csrc/)."""

import ctypes

from tq_vllm.ops.cuda_attention import attention, refuse_attention, refuse_one_launch, store_and_attend  # noqa: F401
from tq_vllm.ops.cuda_library import BUILD, DTYPES, PATH, library, why_missing
from tq_vllm.ops.cuda_store import StoreParams, refuse_store, store_kv  # noqa: F401  the operations are functions here
from tq_vllm.ops.select import Call

MINIMUM_CAPABILITY = (8, 0)


def supports(call: Call) -> str | None:
    """Return None, or why the compiled kernels can't serve the call."""
    if call.capability is None or call.capability < MINIMUM_CAPABILITY:
        return f"got compute capability {call.capability}, allowed 8.0 and later"
    if call.dtype not in DTYPES:
        return f"got {call.dtype}, allowed {', '.join(map(str, DTYPES))}"
    if (missing := why_missing()) is not None:
        return missing
    if library().tq_store_params_bytes() != ctypes.sizeof(StoreParams):
        return f"{PATH.name} was built from another version of csrc/: {BUILD}"
    refusals = {
        "store_kv": (refuse_store,),
        "attention": (refuse_attention,),
        "store_and_attend": (refuse_store, refuse_attention, refuse_one_launch),
    }
    return next((why for refuse in refusals[call.op] if (why := refuse(call)) is not None), None)
