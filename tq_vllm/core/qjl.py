"""TurboQuant_prod (TurboQuant Alg. 2): b-1 bits of TurboQuant_mse and one bit a coordinate of QJL of what it missed.

Unbiased inner products, at a higher variance than TurboQuant_mse at equal bits: never the default of the cache, because
softmax cares more for variance (on real keys at 4 bits it does 6 times the damage with a Gaussian S and twice with an
orthogonal one).
"""

import math
from dataclasses import dataclass

import torch

from tq_vllm.core.packing import pack_codes, unpack_codes
from tq_vllm.core.quantizers import FLOAT16_MAX, TurboQuantMSE, normalise
from tq_vllm.core.rotations import Rotation, default_rotation, dense_orthogonal, get_rotation
from tq_vllm.core.splitmix import random_gaussian

SKETCHES = ("gaussian", "orthogonal")
PAGE_SKETCH_SEED = 1  # of the signs of the cache's S; the rotation before it has seed 0


def orthogonal_gain(dim: int) -> float:
    """Return g with E g S^T sign(S r) = r / |r| for a random orthogonal S of `dim` rows: 1 / (dim E|z_1|), z uniform on
    the unit sphere. Close to sqrt(pi / (2 dim)), the paper's sqrt(pi/2) / dim with rows of length sqrt(dim)."""
    return math.sqrt(math.pi) / dim * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))


def page_sketch(head_dim: int) -> Rotation:
    """Return the S of the cache: a second randomised Hadamard rotation."""
    return get_rotation(head_dim, seed=PAGE_SKETCH_SEED)


def encode_residuals(residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sketch what the codes of rotated vectors miss (TurboQuant Alg. 2 lines 6 and 7), for the cache.

    Args:
        residual: f32 [..., head_dim]: the rotated vectors minus what their codes and stored scales decode to.

    Returns:
        signs uint8 [..., head_dim], 1 where S r is negative; scale f32 [...], gain * |r| rounded to float16. Both are 0
        for a residual whose norm is 0 or not finite in float32.
    """
    norm = torch.linalg.vector_norm(residual, dim=-1)
    broken = ~norm.isfinite() | (norm == 0)
    signs = page_sketch(residual.shape[-1]).forward(residual.masked_fill(broken[..., None], 0.0)) < 0
    scale = (norm * orthogonal_gain(residual.shape[-1])).masked_fill(broken, 0.0).clamp_(max=FLOAT16_MAX)
    return signs.to(torch.uint8), scale.to(torch.float16).to(torch.float32)


def decode_residuals(signs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the estimates scale * S^T sign(S r) of rotated residuals, [..., head_dim] of the dtype of scale [...]."""
    sketched = (1.0 - 2.0 * signs.to(scale.dtype)) * scale[..., None]
    return page_sketch(signs.shape[-1]).inverse(sketched)


@dataclass(frozen=True)
class ProdCodes:
    """What TurboQuant_prod keeps of a batch of vectors."""

    codes: torch.Tensor  # [..., ceil(dim * (bits-1) / 8)] uint8 of the mse stage; no bytes at 1 bit
    signs: torch.Tensor  # [..., ceil(dim / 8)] uint8, bit 1 where S r is negative
    norm: torch.Tensor  # [...] f32, |x|
    residual_norm: torch.Tensor  # [...] f32, |r| / |x|


class TurboQuantProd:
    """TurboQuant_prod for vectors of any dimension >= 2 at 1 to 8 bits a coordinate, sketch bit included.

    sketch "gaussian" is the S of the paper, "orthogonal" a random orthogonal matrix, whose error is 1 - 2/pi as large.
    S acts on the rotated residual: S times a rotation has the law of S. The variance of <q, x^> for unit q and x, times
    dim, is pi/2 times the mse distortion of bits - 1 with a Gaussian S: 1.57, .571, .185 and .0543 at 1 to 4 bits for a
    large dimension (the paper prints .047 for 4).
    """

    def __init__(
        self, dim: int, bits: int, sketch: str = "gaussian", rotation: Rotation | None = None, sketch_seed: int = 1
    ):
        """ValueError for bits outside 1..8 or an unknown sketch; `rotation` as in TurboQuantMSE."""
        if not 1 <= bits <= 8:
            raise ValueError(f"TurboQuant_prod of {bits} bits; widths are 1 to 8.")
        if sketch not in SKETCHES:
            raise ValueError(f"Sketch is {sketch!r}; it must be one of {', '.join(SKETCHES)}.")
        self.dim, self.bits, self.sketch = dim, bits, sketch
        self.rotation = rotation or get_rotation(dim, default_rotation(dim))
        self._mse = TurboQuantMSE(dim, bits - 1, self.rotation) if bits > 1 else None
        # E S^T sign(S r) = r / |r| / gain: gain = sqrt(pi/2) / dim for Gaussian rows, and 1 / (dim E|z_1|) with z
        # uniform on the unit sphere for orthonormal ones.
        if sketch == "gaussian":
            matrix = random_gaussian(sketch_seed, dim * dim).view(dim, dim)
            self._gain = math.sqrt(math.pi / 2) / dim
        else:
            matrix = dense_orthogonal(dim, sketch_seed)
            self._gain = orthogonal_gain(dim)
        self._sketch = matrix.to(torch.float32)  # S [dim, dim]

    def _mse_part(self, quantized: ProdCodes) -> torch.Tensor:
        """Return the rotated mse part of x^ / |x|, f32 [..., dim]."""
        if self._mse is None:
            return torch.zeros(*quantized.norm.shape, self.dim, device=quantized.norm.device)
        return self._mse.decode(quantized.codes) / math.sqrt(self.dim)

    def _sign_part(self, quantized: ProdCodes) -> torch.Tensor:
        """Return sign(S r) * gain * |r| / |x|, f32 [..., dim]; S^T times it is the residual's part of x^ / |x|."""
        signs = 1.0 - 2.0 * unpack_codes(quantized.signs, 1, self.dim).to(torch.float32)
        return signs * (self._gain * quantized.residual_norm)[..., None]

    def quantize(self, x: torch.Tensor) -> ProdCodes:
        """Quantize vectors x [..., dim] (Alg. 2 lines 5 to 8); a zero or non-finite vector decodes to zero."""
        u, norm = normalise(self.rotation.forward(x))
        residual = u / math.sqrt(self.dim)
        codes = torch.empty(*norm.shape, 0, dtype=torch.uint8, device=x.device)
        if self._mse is not None:
            codes = pack_codes(self._mse.encode(u), self.bits - 1)
            residual = residual - self._mse.decode(codes) / math.sqrt(self.dim)
        signs = (residual @ self._sketch.to(x.device).t() < 0).to(torch.uint8)
        return ProdCodes(codes, pack_codes(signs, 1), norm, residual.square().sum(-1).sqrt())

    def dequantize(self, quantized: ProdCodes) -> torch.Tensor:
        """Return the vectors x^, f32 [..., dim] (Alg. 2 lines 10 to 12)."""
        sketch = self._sketch.to(quantized.norm.device)
        rotated = self._mse_part(quantized) + self._sign_part(quantized) @ sketch
        return self.rotation.inverse(rotated * quantized.norm[..., None])

    def inner_product(self, query: torch.Tensor, quantized: ProdCodes) -> torch.Tensor:
        """Return <query, x^>, f32 [..., num_queries, num_vectors], of query [..., num_queries, dim] from the codes.

        The queries are rotated and sketched instead of the vectors: nothing is dequantized.
        """
        rotated = self.rotation.forward(query)
        scores = rotated @ self._mse_part(quantized).transpose(-1, -2)
        scores += (rotated @ self._sketch.to(query.device).t()) @ self._sign_part(quantized).transpose(-1, -2)
        return scores * quantized.norm[..., None, :]
