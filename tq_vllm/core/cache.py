"""What the cache does to keys and values, without pages: rotate, quantize, and back. The oracle of every kernel."""

from typing import NamedTuple

import torch

from tq_vllm.config import TurboQuantConfig
from tq_vllm.core.qjl import decode_residuals, encode_residuals
from tq_vllm.core.quantizers import decode_vectors, encode_vectors
from tq_vllm.core.rotations import get_rotation
from tq_vllm.format import SEGMENT_TOKENS


class EncodedKV(NamedTuple):
    """Codes and scales of keys and values; decoded coordinate = scale * centroid of its code, in rotated space."""

    key_codes: torch.Tensor  # [num_tokens, num_kv_heads, head_dim] uint8
    key_scale: torch.Tensor  # [num_tokens, num_kv_heads] f32 (an f16 number)
    value_codes: torch.Tensor  # like key_codes
    value_scale: torch.Tensor  # like key_scale
    sketch_signs: torch.Tensor | None = None  # like key_codes, 0 and 1; None without a key sketch
    sketch_scale: torch.Tensor | None = None  # like key_scale


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def offset_at(key_offset: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the key offset of each position: [num_segments, ...], int [n] -> [n, ...]."""
    segment = torch.div(positions, SEGMENT_TOKENS, rounding_mode="floor").clamp(0, key_offset.shape[0] - 1)
    return key_offset.index_select(0, segment)


def encode_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    config: TurboQuantConfig,
    positions: torch.Tensor | None = None,
    key_offset: torch.Tensor | None = None,
) -> EncodedKV:
    """Quantize keys and values, [num_tokens, num_kv_heads, head_dim].

    Args:
        positions: int [num_tokens], absolute index of each token in its sequence; needed with key_offset.
        key_offset: [num_segments, num_kv_heads, head_dim], subtracted from the keys of its 64 positions; the last
            segment also serves positions past its end.
    """
    rotation = get_rotation(key.shape[-1])
    key, value = key.to(compute_dtype(key)), value.to(compute_dtype(value))
    if key_offset is not None:
        if positions is None:
            raise ValueError("key_offset without positions: pass the absolute position of every token.")
        key = key - offset_at(key_offset, positions).to(key.dtype)
    key_way, value_way = (config.key_width, config.key_scale_rule), (config.value_width, config.value_scale_rule)
    if key_way == value_way:  # as one: half the time for the few vectors of a decode step
        codes, scale = encode_vectors(rotation.forward(torch.stack((key, value))), *key_way, config.scale_search)
        return EncodedKV(codes[0], scale[0], codes[1], scale[1])
    rotated = rotation.forward(key)
    encoded = EncodedKV(
        *encode_vectors(rotated, *key_way, config.scale_search),
        *encode_vectors(rotation.forward(value), *value_way, config.scale_search),
    )
    if not config.key_sketch:
        return encoded
    # Of what a reader sees: the sketch also makes up for the scale rule and its rounding, whatever they are.
    missed = rotated.to(torch.float32) - decode_vectors(encoded.key_codes, encoded.key_scale, config.key_width)
    return EncodedKV(*encoded[:4], *encode_residuals(missed))


def decode_kv(
    encoded: EncodedKV,
    config: TurboQuantConfig,
    positions: torch.Tensor | None = None,
    key_offset: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values that a reader of the cache sees: rotated back, key offset restored."""
    rotation = get_rotation(encoded.key_codes.shape[-1])
    key, value = (
        rotation.inverse(decode_vectors(codes, torch.ones_like(scale), bits).to(dtype) * scale.to(dtype)[..., None])
        for codes, scale, bits in (
            (encoded.key_codes, encoded.key_scale, config.key_width),
            (encoded.value_codes, encoded.value_scale, config.value_width),
        )
    )
    if config.key_sketch:
        key = key + rotation.inverse(decode_residuals(encoded.sketch_signs, encoded.sketch_scale.to(dtype)))
    if key_offset is not None:
        key = key + offset_at(key_offset, positions).to(dtype)
    return key, value


def kv_roundtrip(
    key: torch.Tensor,
    value: torch.Tensor,
    config: TurboQuantConfig,
    positions: torch.Tensor | None = None,
    key_offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values after a trip through the cache; arguments as in `encode_kv`, f32 (f64 for f64) out."""
    encoded = encode_kv(key, value, config, positions, key_offset)
    return decode_kv(encoded, config, positions, key_offset, compute_dtype(key))
