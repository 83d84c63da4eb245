"""Operations on a TurboQuant cache: schema, kernels, and which kernel serves a call.

Importing this package defines torch.ops.tq_vllm.store_kv, attention and store_and_attend on CPU and CUDA tensors.
"""

from tq_vllm.ops import select
from tq_vllm.ops.schema import LIBRARY

for _device in ("CPU", "CUDA"):
    LIBRARY.impl("store_kv", select.store_kv, _device)
    LIBRARY.impl("attention", select.attention, _device)
    LIBRARY.impl("store_and_attend", select.store_and_attend, _device)
