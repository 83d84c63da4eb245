"""Rival KV caches as layers of a transformers cache: what they keep of keys and values, and the bytes that takes.

All read as the plugin's prefill does: tokens of a step see each other raw, earlier ones as the rival keeps them. Keys
and values are [batch, num_kv_heads, num_tokens, head_dim] f32, keys after RoPE, as all of these methods take them.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer

from tq_vllm.config import TurboQuantConfig
from tq_vllm.core.cache import kv_roundtrip, offset_at

RoundTrip = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
BF16_BYTES = 2


class TokenLayer(DynamicLayer):
    """Keys and values of earlier tokens went through `round_trip`, a function of a token; a step's own if not raw."""

    def __init__(self, round_trip: RoundTrip, own_raw: bool = True):
        super().__init__()
        self.round_trip, self.own_raw = round_trip, own_raw
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states, value_states, *args, **kwargs):
        kept = self.round_trip(key_states, value_states)
        own = (key_states, value_states) if self.own_raw else kept
        seen = tuple(torch.cat([*(p[i] for p in self.past), own[i]], 2) for i in range(2))
        self.past.append(kept)
        return seen

    def get_seq_length(self) -> int:
        return sum(k.shape[2] for k, _ in self.past)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class PresetLayer(TokenLayer):
    """A preset of the plugin through tq_vllm.core: keys centred and channels scaled as the plugin does it.

    Args:
        offset: [num_segments, num_kv_heads, head_dim] of the layer's keys, None: not centred.
        scale: [head_dim], keys are stored times it, None: as they are.
    """

    def __init__(self, config: TurboQuantConfig, offset: torch.Tensor | None, scale: torch.Tensor | None):
        super().__init__(self._round_trip)
        self.turboquant, self.offset, self.scale = config, offset, 1 if scale is None else scale

    def _round_trip(self, k, v):
        positions = self.get_seq_length() + torch.arange(k.shape[2])
        centre = 0 if self.offset is None else offset_at(self.offset, positions).transpose(0, 1)
        kept = ((k - centre) * self.scale, v)
        flat = [x.flatten(0, 1).contiguous() for x in kept]  # a vector is encoded by itself: no axis before it matters
        k, v = (x.unflatten(0, v.shape[:2]) for x in kv_roundtrip(*flat, self.turboquant))
        return k / self.scale + centre, v


def uniform(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Round x to 2**bits uniform levels between its least and largest value along `dim`, both kept as fp16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


class KiviLayer(DynamicLayer):
    """KIVI (arXiv 2402.02750, Alg. 1): keys per channel in groups of tokens, values per token in groups of channels.

    The newest tokens stay raw: keys until `residual` of them are full, the newest `residual` values always.
    """

    GROUP = 32

    def __init__(self, bits: int, residual: int):
        super().__init__()
        self.bits, self.residual = bits, residual
        self.raw = None  # [2, batch, num_kv_heads, num_tokens, head_dim]
        self.kept_keys: list[torch.Tensor] = []

    def update(self, key_states, value_states, *args, **kwargs):
        past = self.get_seq_length()
        own = torch.stack((key_states, value_states))
        self.raw = own if self.raw is None else torch.cat((self.raw, own), 3)
        keys, values = self.raw
        while len(self.kept_keys) < past // self.residual:
            start = len(self.kept_keys) * self.residual
            groups = keys[:, :, start : start + self.residual].unflatten(2, (-1, self.GROUP))
            self.kept_keys.append(uniform(groups, self.bits, 3).flatten(2, 3))
        old = len(self.kept_keys) * self.residual
        keys = torch.cat((*self.kept_keys, keys[:, :, old:]), 2)
        old = max(past - self.residual, 0)
        if old:
            kept = uniform(values[:, :, :old].unflatten(3, (-1, self.GROUP)), self.bits, 4).flatten(3, 4)
            values = torch.cat((kept, values[:, :, old:]), 2)
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.raw is None else self.raw.shape[3]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @classmethod
    def token_bytes(cls, bits: int, residual: int, head_dim: int, num_tokens: int) -> float:
        """Bytes of a token and KV head in a context of num_tokens: codes, fp16 scale and zero a group, raw tokens."""
        quantized = 2 * (head_dim * bits / 8 + 4 * head_dim / cls.GROUP)
        raw_keys, raw_values = residual / 2, residual  # the key buffer is half full on average
        raw = BF16_BYTES * head_dim
        return quantized + (raw_keys + raw_values) / num_tokens * (raw - quantized / 2)


class EvictedLayer(DynamicLayer):
    """Keeps chosen tokens of a prompt, another choice for every KV head, and everything that comes later, raw."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor):
        """kept: int [batch, num_kv_heads, num_kept] positions, ascending."""
        super().__init__()
        index = kept[..., None].expand(-1, -1, -1, keys.shape[-1])
        self.kv = [keys.gather(2, index), values.gather(2, index)]
        self.positions, self.next = kept, keys.shape[2]  # of all tokens in the cache; of the next one

    def update(self, key_states, value_states, *args, **kwargs):
        own = self.next + torch.arange(key_states.shape[2])
        self.positions = torch.cat((self.positions, own.expand(*self.positions.shape[:-1], -1)), -1)
        self.next += len(own)
        self.kv = [torch.cat((past, own), 2) for past, own in zip(self.kv, (key_states, value_states), strict=True)]
        return tuple(self.kv)

    def get_seq_length(self) -> int:
        return self.kv[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0
