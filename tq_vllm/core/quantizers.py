"""Quantizes rotated vectors: the numeric contract of the cache, and TurboQuant_mse (TurboQuant Alg. 1).

The cache stores a rotated vector y of norm n as codes and one scale. With u = y * sqrt(head_dim) / n (unit-variance
coordinates) and c the decoded codes, the vector reads back as scale * c, where the scale is by rule
  "norm"      n / |c|        the decoded vector has the norm of y
  "unbiased"  n^2 / <y, c>   the EDEN scale: inner products are unbiased over random rotations
  "raw"       n / sqrt(d)    Algorithm 1 as printed (with scale_search=(1.0,))
rounded to float16. A vector whose squared norm is not finite in float32 (NaN, inf, norm above 1.8e19) is stored as 0.
With trellis codes (trellis.py), c is what `trellis.search_codes` finds.
"""

import functools
import math
from dataclasses import dataclass

import torch

from tq_vllm.config import SCALE_RULES, SCALE_SEARCH, TRELLIS, TRELLIS_BITS
from tq_vllm.core import trellis
from tq_vllm.core.codebook_tables import PAGE_LEVELS, PAGE_UNIT
from tq_vllm.core.codebooks import centroids, lloyd_max_levels, page_centroids, thresholds, trellis_centroids
from tq_vllm.core.packing import pack_codes, unpack_codes
from tq_vllm.core.rotations import Rotation, default_rotation, get_rotation

FLOAT16_MAX = 65504.0
# Elements of a [vectors, candidates, head_dim] block of the search. On a CPU a block this small stays in a core's cache
# and its memory is reused: three times faster than blocks of four times the size.
_BLOCK_ELEMENTS_CPU, _BLOCK_ELEMENTS_GPU = 1 << 16, 1 << 22


@functools.cache
def _levels_by_ratio(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tables over floor(magnitude / unit): index uint8 and magnitude f32, both [last threshold / unit + 1].

    The thresholds m_i + m_{i+1} + 1 are integers in units, so that one look-up compares with all of them exactly.
    """
    levels = torch.tensor(PAGE_LEVELS[bits])
    steps = levels[1:] + levels[:-1] + 1  # thresholds / unit
    index = torch.bucketize(torch.arange(int(steps[-1]) + 1), steps, right=True)
    magnitude = page_centroids(bits)[index]
    return index.to(torch.uint8).to(device), magnitude.to(device)


def _search_codes(u: torch.Tensor, bits: int, scale_search: tuple[float, ...]) -> tuple[torch.Tensor, ...]:
    """Return (codes, <u, c>, |c|) of the scale candidate with the largest cosine <u, c>/|c|; the first wins ties.

    u [n, d] f32 -> codes [n, d] uint8, dot [n] f32, length [n] f32. A candidate s takes the nearest centroid to u / s.
    """
    index_table, magnitude_table = _levels_by_ratio(bits, u.device)
    units = torch.tensor(scale_search, dtype=torch.float32, device=u.device)[:, None] * PAGE_UNIT[bits]
    magnitude = u.abs()[:, None, :]  # [n, 1, d]
    cell = (magnitude / units).clamp_(max=len(index_table) - 1).to(torch.int32)  # [n, candidates, d]
    c = magnitude_table.index_select(0, cell.flatten()).view(cell.shape)
    dot, length = (c * magnitude).sum(-1), torch.linalg.vector_norm(c, dim=-1)  # [n, candidates]
    best = (dot / length).argmax(-1, keepdim=True)  # [n, 1]
    cell = cell.gather(1, best[:, :, None].expand(-1, 1, u.shape[-1])).flatten()
    codes = index_table.index_select(0, cell).view(u.shape) + ((u < 0).to(torch.uint8) << (bits - 1))
    return codes, dot.gather(1, best)[:, 0], length.gather(1, best)[:, 0]


def normalise(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (u f32 [..., d] of unit variance, norm f32 [...]) of y [..., d]; both 0 if y is zero or not finite."""
    y = y.to(torch.float32)
    norm = torch.linalg.vector_norm(y, dim=-1)
    empty = ~norm.isfinite() | (norm == 0)
    u = (y * (math.sqrt(y.shape[-1]) / norm)[..., None]).masked_fill_(empty[..., None], 0.0)
    return u, norm.masked_fill_(empty, 0.0)


def encode_vectors(
    y: torch.Tensor, bits: int, scale_rule: str, scale_search: tuple[float, ...] = SCALE_SEARCH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rotated vectors y [..., d] f32 to (codes uint8 [..., d], scale f32 [...], already rounded to float16).

    bits 2..5: page codebook, the best of the scale candidates; bits 8: rint(u * 127 / max|u|) as the byte of an int8
    with scale n / |c|, whatever the rule and candidates; bits TRELLIS + 2 and TRELLIS + 3: trellis codes of 2 and 3
    bits, d a multiple of 32. ValueError for another width or rule.
    """
    is_trellis = bits - TRELLIS in TRELLIS_BITS
    if bits != 8 and bits not in PAGE_LEVELS and not is_trellis:
        raise ValueError(f"Vectors of {bits} bits; widths are {', '.join(map(str, PAGE_LEVELS))} and 8.")
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"Scale rule is {scale_rule!r}; it must be one of {', '.join(SCALE_RULES)}.")
    dim = y.shape[-1]
    u, norm = normalise(y.reshape(-1, dim))  # [n, d], [n]
    if bits == 8:
        largest = u.abs().amax(-1, keepdim=True).clamp_(min=1.0)  # a stored row has a coordinate of at least 1
        c = (u * (127.0 / largest)).round_()
        codes = c.to(torch.int8).view(torch.uint8)
        scale = norm / torch.linalg.vector_norm(c, dim=-1).clamp_(min=1.0)
    else:
        block = _BLOCK_ELEMENTS_CPU if u.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
        rows = max(1, block // (len(scale_search) * dim))
        if is_trellis:
            parts = [trellis.search_codes(part, bits - TRELLIS, scale_search) for part in u.split(rows)]
        else:
            parts = [_search_codes(part, bits, scale_search) for part in u.split(rows)]
        codes, dot, length = (torch.cat(part) for part in zip(*parts, strict=True))
        if scale_rule == "norm":
            scale = norm / length
        elif scale_rule == "unbiased":
            scale = norm * math.sqrt(dim) / dot
        else:
            scale = norm / math.sqrt(dim)
        if is_trellis:  # the path nearest to zero is not the codes 0
            codes = codes.masked_fill_((norm == 0)[:, None], 0)
    scale = scale.masked_fill(norm == 0, 0.0).clamp_(max=FLOAT16_MAX).to(torch.float16).to(torch.float32)
    return codes.view(y.shape), scale.view(y.shape[:-1])


def decode_vectors(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the rotated vectors scale * c, f32 [..., d], of codes uint8 [..., d], scale [...]; bits as encoded."""
    if bits == 8:
        c = codes.view(torch.int8).to(torch.float32)
    elif bits > TRELLIS:
        c = trellis_centroids(bits - TRELLIS).to(codes.device)[trellis.level_indices(codes)]
    else:
        c = page_centroids(bits).to(codes.device).index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
    return c.mul_(scale[..., None])


@dataclass(frozen=True)
class MSECodes:
    """What TurboQuant_mse keeps of a batch of vectors."""

    codes: torch.Tensor  # [..., ceil(dim * bits / 8)] uint8, `pack_codes`
    norm: torch.Tensor  # [...] f32


class TurboQuantMSE:
    """TurboQuant_mse (TurboQuant Alg. 1) for vectors of any dimension >= 2 at 1 to 8 bits a coordinate.

    The distortion |x - x^|^2 / |x|^2 is .3634, .1175, .03455 and .00950 at 1 to 4 bits for a large dimension (the paper
    prints .03 for 3 bits) and a little less for the exact codebook of a tabulated one. Inner products come out too
    small, by the factor one minus that (2/pi at 1 bit); TurboQuantProd is unbiased.
    """

    def __init__(self, dim: int, bits: int, rotation: Rotation | None = None):
        """Take `rotation`, or without one the Hadamard rotation of `dim` where it exists and else a dense one."""
        self.dim, self.bits = dim, bits
        self.rotation = rotation or get_rotation(dim, default_rotation(dim))
        levels = lloyd_max_levels(bits, dim)
        self._thresholds, self._centroids = thresholds(levels), centroids(levels)

    def encode(self, u: torch.Tensor) -> torch.Tensor:
        """Return the codes uint8 [..., dim] of the centroids nearest to rotated unit-variance vectors u [..., dim]."""
        index = torch.bucketize(u.abs(), self._thresholds.to(u.device), right=True).to(torch.uint8)
        return index + ((u < 0).to(torch.uint8) << (self.bits - 1))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the centroids f32 [..., dim] of the packed codes: rotated, of about unit variance."""
        return self._centroids.to(codes.device)[unpack_codes(codes, self.bits, self.dim).to(torch.int64)]

    def quantize(self, x: torch.Tensor) -> MSECodes:
        """Quantize vectors x [..., dim]; a zero or non-finite vector decodes to zero."""
        u, norm = normalise(self.rotation.forward(x))
        return MSECodes(pack_codes(self.encode(u), self.bits), norm)

    def dequantize(self, quantized: MSECodes) -> torch.Tensor:
        """Return the vectors x^, f32 [..., dim] (Alg. 1 lines 9 to 11)."""
        return self.rotation.inverse(self.decode(quantized.codes) * (quantized.norm / math.sqrt(self.dim))[..., None])

    def inner_product(self, query: torch.Tensor, quantized: MSECodes) -> torch.Tensor:
        """Return <query, x^>, f32 [..., num_queries, num_vectors], of query [..., num_queries, dim] from the codes.

        The queries are rotated instead of the vectors: nothing is dequantized.
        """
        scores = self.rotation.forward(query) @ self.decode(quantized.codes).transpose(-1, -2)
        return scores * (quantized.norm / math.sqrt(self.dim))[..., None, :]
