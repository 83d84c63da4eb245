"""Operations on a TurboQuant cache: schema, kernels, and which kernel serves a call.

Importing this package defines torch.ops.tq_vllm.store_kv and torch.ops.tq_vllm.attention on CPU and CUDA tensors.
"""

from tq_vllm.ops import select
from tq_vllm.ops.schema import LIBRARY

for _device in ("CPU", "CUDA"):
    LIBRARY.impl("store_kv", select.store_kv, _device)
    LIBRARY.impl("attention", select.attention, _device)
