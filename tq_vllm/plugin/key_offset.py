"""Key offsets: what all keys of a layer have in common, rotated by RoPE and averaged over segments of 64 positions.

A key is RoPE(position, W x + b) = RoPE(position, W x) + RoPE(position, b). In Qwen2-style models the second term dwarfs
the first and takes the codes' range with it. It depends on the position and the weights alone, so it is averaged over
every segment, subtracted before keys are stored and restored when they are read. Where no bias gives the common part
away, or keys are normalised after it, it is the mean of the keys of a fixed pass (key_mean.py).

The offset is a function of the checkpoint and of its RoPE parameters. Both are fixed by the model that a prefix cache
or a KV connector is keyed on, so equal models agree on the offset and it needs no identity of its own.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from tq_vllm.format import SEGMENT_TOKENS
from tq_vllm.plugin import key_mean

_POSITIONS_PER_CHUNK = 4096


@dataclass(frozen=True)
class Owner:
    """The attention layer of an implementation and the module that holds it, its projections and its RoPE."""

    layer: weakref.ref
    parent: weakref.ref

    def root(self) -> nn.Module:
        """The outermost module around the layer: the model that the engine calls."""
        module = self.parent()
        while module in _parents:
            module = _parents[module]()
        return module


_hook = None
_parents: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


def watch_for_owners() -> None:
    """From now on tell every TurboQuantImpl which module its attention layer becomes a child of, and note all parents.

    An implementation is handed neither its layer nor the projections next to it, nor the model. PyTorch calls a global
    hook whenever a module gets a child: it is installed when the first implementation is built and removed when weights
    are loaded.
    """
    global _hook
    if _hook is None:
        _hook = register_module_module_registration_hook(_note_owner)


def _stop_watching() -> None:
    global _hook
    if _hook is not None:
        _hook.remove()
        _hook = None


def _note_owner(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is not None:
        _parents[child] = weakref.ref(parent)
    if isinstance(child, Attention) and hasattr(child.impl, "owner"):
        child.impl.owner = Owner(weakref.ref(child), weakref.ref(parent))


def compute(impl, dtype: torch.dtype) -> tuple[torch.Tensor | None, str]:
    """Return the key offset of a layer, [num_segments, num_kv_heads, head_dim] `dtype`, or None, and why.

    Args:
        impl: TurboQuantImpl after its model's weights were loaded.
        dtype: of the result; the computation is fp32.
    """
    _stop_watching()
    if not impl.page.config.key_offset:
        return None, "the preset does not centre keys"
    if impl.not_centred is not None:
        return None, impl.not_centred
    if impl.kv_sharing_target_layer_name is not None:
        return None, f"the cache is that of {impl.kv_sharing_target_layer_name}"
    parent = impl.owner.parent() if impl.owner is not None else None
    if parent is None or type(impl.owner.layer()) is not Attention:
        return None, "the layer is not a plain decoder attention layer of a module"
    rotary_emb = getattr(parent, "rotary_emb", None)
    if not _rotates_by_position_alone(rotary_emb):
        return None, f"no offset is known for the position encoding {type(rotary_emb).__name__}"
    num_segments = -(-impl.max_model_len // SEGMENT_TOKENS)
    bias = _key_bias(parent, impl)
    if bias is not None and not _has_norms(parent):
        return rotated_segment_means(rotary_emb, bias, num_segments).to(dtype), "by the bias of the key projection"
    if impl.page.config.key_bits == 8:  # docs/design.md; reads would pay for it
        return None, "8-bit keys gain nothing by a mean"
    if impl.key_mean is not None:
        offset = from_mean(rotary_emb, impl.key_mean, num_segments, impl.first_key)
        return offset.to(dtype), "by their mean of an earlier pass"
    if why := key_mean.why_impossible(impl.owner.root(), impl.pipeline_parallel):
        return None, why
    key_mean.wait_for_pass(impl)
    device = rotary_emb.cos_sin_cache.device
    zeros = torch.zeros(num_segments, impl.num_kv_heads, impl.head_size, dtype=dtype, device=device)
    return zeros, "by their mean over a fixed pass, which follows"


def _has_norms(parent: nn.Module) -> bool:
    """Whether the module normalises keys after their projection."""
    return any("norm" in name or name.endswith("_ln") for name, _ in parent.named_children())


def _rotates_by_position_alone(rotary_emb: nn.Module | None) -> bool:
    """Whether RoPE is a table of angles by position: scaled, YaRN, NTK, partial; not mRoPE, chunked or learned."""
    kind = type(rotary_emb)
    return (
        isinstance(rotary_emb, RotaryEmbedding)
        and kind.forward_native is RotaryEmbedding.forward_native
        and kind.forward is RotaryEmbedding.forward
    )


def _key_bias(parent: nn.Module, impl) -> torch.Tensor | None:
    """This rank's bias of the key projection, [num_kv_heads, head_dim], or None.

    vLLM's fused projection keeps query, key and value heads of the rank one after the other.
    """
    q_size, kv_size = impl.num_heads * impl.head_size, impl.num_kv_heads * impl.head_size
    for name, child in parent.named_children():
        projection = getattr(child, "base_layer", child)  # LoRA wraps layers
        bias = getattr(projection, "bias", None)
        if not isinstance(bias, torch.Tensor):
            continue
        if isinstance(projection, QKVParallelLinear) and bias.numel() == q_size + 2 * kv_size:
            return bias.detach()[q_size : q_size + kv_size].view(impl.num_kv_heads, impl.head_size)
        if name == "k_proj" and bias.numel() == kv_size:
            return bias.detach().view(impl.num_kv_heads, impl.head_size)
    return None


def mean_before_rope(rotary_emb: RotaryEmbedding, keys: torch.Tensor) -> torch.Tensor:
    """Mean of keys at positions 0, 1, ... after each is rotated back to position 0: fp32 [num_kv_heads, head_dim].

    The first key is left out. Attention rests on it in most models, and it is unlike all others.

    Args:
        keys: [num_tokens, num_kv_heads, head_dim], as stored.
    """
    positions = torch.arange(keys.shape[0], device=keys.device)
    table = rotary_emb.cos_sin_cache.float()  # [positions, rotary_dim]: cosines, then sines, both times a factor
    cos, sin = table.chunk(2, -1)
    back = torch.cat((cos, -sin), -1) / (cos.square() + sin.square()).repeat(1, 2)
    keys_at_zero = _rotated(rotary_emb, back, positions, keys.float().flatten(1)).view(keys.shape)
    mean = keys_at_zero[1:].double().mean(0).float()
    return torch.where(mean.isfinite(), mean, 0.0)


def energy_left(rotary_emb: RotaryEmbedding, mean: torch.Tensor, keys: torch.Tensor) -> float:
    """Part of the energy of keys at positions 1, 2, ... that remains when the offsets of this mean are subtracted."""
    segment = torch.arange(keys.shape[0], device=keys.device) // SEGMENT_TOKENS
    offset = rotated_segment_means(rotary_emb, mean.to(keys.device), int(segment[-1]) + 1)
    centred = keys.float() - offset[segment]
    return float(centred[1:].square().sum() / keys[1:].float().square().sum())


def from_mean(
    rotary_emb: RotaryEmbedding, mean: torch.Tensor, num_segments: int, first_key: torch.Tensor | None
) -> torch.Tensor:
    """Offset of each segment for keys of this mean before RoPE: fp32 [num_segments, num_kv_heads, head_dim].

    The first key of a sequence is unlike all others and takes much of the attention, so that an error in it reaches
    every query. Where all sequences begin with the same token, `first_key` [num_kv_heads, head_dim] is that key and the
    offset of the first segment: nothing of it is left to be rounded. Else the first segment has none: centred by the
    mean of the others the first key would become long, and its error grow with it.
    """
    offset = rotated_segment_means(rotary_emb, mean.to(rotary_emb.cos_sin_cache.device), num_segments)
    offset[0] = 0 if first_key is None else first_key.to(offset.device).nan_to_num(0, 0, 0)
    return offset


@torch.no_grad()
def rotated_segment_means(rotary_emb: RotaryEmbedding, bias: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Mean over each segment's 64 positions of the model's own RoPE of `bias`, or of a mean before RoPE.

    Positions that the model's table of angles does not reach (no request does either) count as its last one.

    Args:
        rotary_emb: the layer's RoPE module: scaled, YaRN and partial RoPE come out as the model applies them.
        bias: [num_kv_heads, head_dim].

    Returns:
        fp32 [num_segments, num_kv_heads, head_dim].
    """
    num_kv_heads, head_dim = bias.shape
    table = rotary_emb.cos_sin_cache
    means = []
    per_chunk = _POSITIONS_PER_CHUNK // SEGMENT_TOKENS
    for first in range(0, num_segments, per_chunk):
        last = min(first + per_chunk, num_segments)
        positions = torch.arange(first * SEGMENT_TOKENS, last * SEGMENT_TOKENS, device=bias.device)
        positions.clamp_(max=table.shape[0] - 1)
        keys = bias.float().expand(positions.shape[0], num_kv_heads, head_dim).reshape(positions.shape[0], -1)
        rotated = _rotated(rotary_emb, table, positions, keys)
        means.append(rotated.view(-1, SEGMENT_TOKENS, num_kv_heads, head_dim).mean(1))
    return torch.cat(means)


def _rotated(
    rotary_emb: RotaryEmbedding, table: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Apply the module's RoPE with another table of angles to keys [num_tokens, num_kv_heads * head_dim] fp32."""
    own = rotary_emb.cos_sin_cache
    rotary_emb.cos_sin_cache = table
    try:
        return rotary_emb.forward_native(positions, keys, None)[0]
    finally:
        rotary_emb.cos_sin_cache = own  # an fp32 query makes the module cast its table for good
