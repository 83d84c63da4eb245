"""Key scales: channels of keys made equally important before they are quantized, in models that normalise q and k.

A rotated key has the same error in every channel. If the layer's norms make a channel of its queries large and of its
keys small, that error is multiplied by large numbers, and the products q . k that attention lives on drown in it. Keys
are stored times d and queries read them divided by d: the products are the same, and the error of q . k is least where
d^2 = rms(query channel) / rms(key channel). The weights of the norms give these up to a factor, no data is read.

Channels that RoPE turns into each other share one d. What is stored is a function of the checkpoint alone: equal models
agree on it.
"""

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

NAMES = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
_FLOOR = 1e-4  # of the mean square: channels may be dead


def compute(parent: nn.Module | None, head_dim: int) -> torch.Tensor | None:
    """Return the factors d of the key channels of an attention layer, fp32 [head_dim], geometric mean 1, or None.

    Args:
        parent: the module that holds the layer, with loaded weights; without a norm for single heads there is nothing
            to go by, and the result is None.
    """
    for names in NAMES:
        squares = [_square_weights(getattr(parent, name, None), head_dim) for name in names]
        if all(square is not None for square in squares):
            break
    else:
        return None
    partner = _partners(getattr(parent, "rotary_emb", None), head_dim)
    squares = [(square + square[partner]) / 2 for square in squares]
    query, key = (square + _FLOOR * square.mean() for square in squares)
    log = (query.log() - key.log()) / 4
    scale = (log - log.mean()).exp().float()
    return scale if scale.isfinite().all() else None


def _square_weights(norm: nn.Module | None, head_dim: int) -> torch.Tensor | None:
    """Squares of what a norm multiplies the channels of a head by, fp64 [head_dim], or None."""
    if not isinstance(norm, (RMSNorm, GemmaRMSNorm)) or norm.weight.numel() != head_dim:
        return None
    weight = norm.weight.detach().double()
    return (weight + 1 if isinstance(norm, GemmaRMSNorm) else weight).square()


def _partners(rotary_emb: nn.Module | None, head_dim: int) -> torch.Tensor:
    """The channel that RoPE turns each channel into, int64 [head_dim]; itself where it turns none."""
    channels = torch.arange(head_dim)
    rotary_dim = getattr(rotary_emb, "rotary_dim", 0)
    halves = getattr(rotary_emb, "is_neox_style", True)  # else neighbours turn into each other
    turned = channels[:rotary_dim].roll(rotary_dim // 2) if halves else channels[:rotary_dim] ^ 1
    return torch.cat([turned, channels[rotary_dim:]])
