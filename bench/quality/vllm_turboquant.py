"""vLLM's own turboquant_* caches as rivals: what vLLM 0.33's Triton kernels keep, computed in PyTorch.

Keys: a Hadamard rotation without signs, Lloyd-Max levels of a normal distribution and, in all `_nc` formats, the level
vector scaled to the key's norm (fp16); or e4m3 (k8v4). Values: uniform between the least and the largest of a vector
(fp16 scale and zero). The first and the last two layers stay 16-bit, as vLLM has it for dense models. A step reads its
own tokens from codes too. tests/quality/test_vllm_turboquant.py compares this with the kernels, run by Triton's
interpreter.
"""

import torch
from layers import BF16_BYTES, RoundTrip, TokenLayer
from rivals import Rival
from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig

from tq_vllm.core.hadamard import hadamard_matrix

RAW_AT_EACH_END = 2  # layers


def round_trip(config: TurboQuantConfig) -> RoundTrip:
    """What a cache of this format gives back for keys and values [..., head_dim], f32."""
    rotation = hadamard_matrix(config.head_dim).float() / config.head_dim**0.5
    levels = get_centroids(config.head_dim, config.centroid_bits).sort().values
    midpoints = (levels[1:] + levels[:-1]) / 2

    def keys(x):
        if config.key_fp8:
            return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        norm = x.norm(dim=-1, keepdim=True)
        kept = levels[torch.bucketize(x / (norm + 1e-8) @ rotation, midpoints, right=True)]
        if config.norm_correction:
            kept = kept / (kept.square().sum(-1, keepdim=True) + 1e-16).sqrt()
        return kept * norm.half().float() @ rotation

    def values(x):
        largest = 2**config.effective_value_quant_bits - 1
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / largest).clamp(min=1e-8)
        codes = ((x - low) / scale + 0.5).floor().clamp(0, largest)
        return codes * scale.half().float() + low.half().float()

    return lambda k, v: (keys(k), values(v))


def vllm_turboquant(num_layers: int) -> list[Rival]:
    """All formats of vLLM, for a model of so many layers."""

    def rival(name: str) -> Rival:
        def is_raw(layer: int) -> bool:
            return not RAW_AT_EACH_END <= layer < num_layers - RAW_AT_EACH_END

        def layer(head_dim: int, index: int) -> TokenLayer:
            config = TurboQuantConfig.from_cache_dtype(name, head_dim)
            return TokenLayer((lambda k, v: (k, v)) if is_raw(index) else round_trip(config), own_raw=False)

        def token_bytes(head_dim: int, _: int) -> float:
            raw = sum(map(is_raw, range(num_layers))) / num_layers
            codes = TurboQuantConfig.from_cache_dtype(name, head_dim).slot_size_aligned
            return raw * 2 * BF16_BYTES * head_dim + (1 - raw) * codes

        return Rival(f"vLLM {name}", layer, token_bytes)

    return [rival(name) for name in TQ_PRESETS]
