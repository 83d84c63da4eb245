"""Rival methods by name: how each one keeps keys and values, with the bytes that takes, scales and norms included.

Presets of the plugin are here too, through tq_vllm.core: a check of the served rows, and widths that no preset has yet.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from layers import BF16_BYTES, KiviLayer, PresetLayer, RoundTrip, TokenLayer

from tq_vllm.config import TurboQuantConfig, get_config
from tq_vllm.core.qjl import TurboQuantProd
from tq_vllm.core.quantizers import TurboQuantMSE
from tq_vllm.core.rotations import get_rotation
from tq_vllm.format import TurboQuantPage

FP16 = 2  # bytes of a norm
POLAR_BITS = (4, 2, 2, 2)  # of the angles, level 1 first (PolarQuant, section 4)


@dataclass(frozen=True)
class Rival:
    """A method that keeps every token.

    Attributes:
        layer: makes the cache of one layer for a head size and the layer's index.
        token_bytes: of one token and KV head, for a head size and a context in tokens.
    """

    name: str
    layer: Callable[[int, int], TokenLayer | KiviLayer]
    token_bytes: Callable[[int, int], float]


@dataclass(frozen=True)
class Eviction:
    """SnapKV (arXiv 2404.14469) or PyramidKV (arXiv 2406.02069): the prompt's tokens that its last ones look at.

    Attributes:
        kept: share of the prompt's tokens that stays, over all layers.
        pyramid: more of them in lower layers than in higher ones, in a straight line (PyramidKV), or alike (SnapKV).
    """

    name: str
    kept: float
    pyramid: bool
    window: int = 32  # last tokens of the prompt: they choose, and stay
    kernel: int = 5  # positions over which a token's score is averaged
    beta: int = 20  # PyramidKV: the highest layer keeps this part of the mean, beside the window

    def budgets(self, prompt: int, num_layers: int) -> list[int]:
        """Tokens of the prompt that each layer keeps."""
        mean = round(self.kept * prompt)
        if not self.pyramid:
            return [mean] * num_layers
        low = (mean - self.window) / self.beta
        high = 2 * (mean - self.window) - low
        step = (high - low) / (num_layers - 1)
        return [self.window + round(high - layer * step) for layer in range(num_layers)]

    def choose(self, attention: torch.Tensor, num_kv_heads: int, budget: int) -> torch.Tensor:
        """Positions that stay, ascending int [batch, num_kv_heads, budget], by attention [batch, num_heads, n, n]."""
        scores = attention[:, :, -self.window :, : -self.window].mean(2)
        scores = torch.nn.functional.avg_pool1d(scores, self.kernel, 1, self.kernel // 2)
        scores = scores.unflatten(1, (num_kv_heads, -1)).mean(2)
        best = scores.topk(budget - self.window, -1).indices.sort(-1).values
        last = torch.arange(scores.shape[-1], scores.shape[-1] + self.window)
        return torch.cat((best, last.expand(*best.shape[:-1], -1)), -1)


@functools.cache
def polar_codebooks() -> list[torch.Tensor]:
    """Angles of the levels: uniform on the circle at level 1, then Lloyd-Max for the density of a level's angle.

    The angle of level l between two radii of 2**(l-1) Gaussian coordinates each has a density in proportion to
    sin(2 a)**(2**(l-1) - 1) on [0, pi/2] (PolarQuant, lemma 2).
    """
    first = 2 ** POLAR_BITS[0]
    books = [(torch.arange(first, dtype=torch.float64) + 0.5) * (2 * math.pi / first) - math.pi]
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) * (math.pi / 2 / 20_000)
    for level, bits in enumerate(POLAR_BITS[1:], 2):
        density = torch.sin(2 * grid) ** (2 ** (level - 1) - 1)
        book = torch.linspace(0.3, math.pi / 2 - 0.3, 2**bits, dtype=torch.float64)
        for _ in range(300):
            cell = torch.bucketize(grid, (book[1:] + book[:-1]) / 2)
            mass = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, cell, density)
            book = torch.zeros_like(mass).index_add_(0, cell, density * grid) / mass
        books.append(book)
    return [book.float() for book in books]


def polar(x: torch.Tensor) -> torch.Tensor:
    """PolarQuant's round trip of x [..., head_dim]: rotate, angles of pairs, of pairs of radii, ...; fp16 radii."""
    rotation = get_rotation(x.shape[-1])
    radius, angles = rotation.forward(x), []
    for level, book in enumerate(polar_codebooks()):
        a, b = radius.unflatten(-1, (-1, 2)).unbind(-1)
        angle = torch.atan2(b, a)
        edges = (book[1:] + book[:-1]) / 2
        angles.append(book[torch.bucketize(angle, edges)] if level else book[_on_circle(angle, len(book))])
        radius = torch.hypot(a, b)
    radius = radius.half().float()
    for angle in reversed(angles):
        radius = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)
    return rotation.inverse(radius)


def _on_circle(angle: torch.Tensor, count: int) -> torch.Tensor:
    return ((angle + math.pi) * (count / (2 * math.pi))).floor().long().clamp(0, count - 1)


def polar_bytes(head_dim: int) -> float:
    """Bytes of one vector: angles of every level and the radii of the last."""
    bits = sum(head_dim // 2**level * b for level, b in enumerate(POLAR_BITS, 1))
    return bits / 8 + FP16 * head_dim / 2 ** len(POLAR_BITS)


def paper(key_bits: int, value_bits: int, qjl: bool, head_dim: int) -> RoundTrip:
    """TurboQuant as printed: Alg. 1 for values, and for keys too or, with `qjl`, Alg. 2 with a Gaussian sketch."""
    keys = TurboQuantProd(head_dim, key_bits) if qjl else TurboQuantMSE(head_dim, key_bits)
    values = TurboQuantMSE(head_dim, value_bits)

    def round_trip(k, v):
        return keys.dequantize(keys.quantize(k)), values.dequantize(values.quantize(v))

    return round_trip


def paper_bytes(key_bits: int, value_bits: int, qjl: bool, head_dim: int) -> float:
    """Norms as fp16; Alg. 2 has one of the residual too."""
    return head_dim * (key_bits + value_bits) / 8 + FP16 * (3 if qjl else 2)


def presets(offsets: list[torch.Tensor], scales: list[torch.Tensor] | None) -> list[Rival]:
    """The default preset, the paper's prod variant and K3V2, for a model with these key offsets and, if any, key scales
    of the layers."""
    scales = scales if scales is not None else [None] * len(offsets)

    def rival(name: str, config: TurboQuantConfig) -> Rival:
        return Rival(
            f"{name} by tq_vllm.core",
            lambda d, layer: PresetLayer(config, offsets[layer], scales[layer]),
            lambda d, _: TurboQuantPage(config, d).slot_bytes,
        )

    named = [rival(name, get_config(name)) for name in ("turboquant", "turboquant:prod")]
    return [*named, rival("turboquant K3V2", TurboQuantConfig("", 3, 2))]


def _token_rival(name: str, make: Callable[[int], RoundTrip], token_bytes: Callable[[int], float]) -> Rival:
    return Rival(name, lambda d, _: TokenLayer(make(d)), lambda d, _: token_bytes(d))


def _paper(name: str, *bits_and_qjl) -> Rival:
    return _token_rival(name, functools.partial(paper, *bits_and_qjl), functools.partial(paper_bytes, *bits_and_qjl))


def _kivi(bits: int, residual: int) -> Rival:
    return Rival(
        f"KIVI {bits} bit, {residual} raw",
        lambda d, _: KiviLayer(bits, residual),
        lambda d, n: KiviLayer.token_bytes(bits, residual, d, n),
    )


def fp8(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 without a scale: vLLM's fp8 cache of a checkpoint that has none."""
    return tuple(x.clamp(-448, 448).to(torch.float8_e4m3fn).float() for x in (k, v))


RIVALS = (
    _token_rival("none", lambda d: lambda k, v: (k, v), lambda d: 2 * BF16_BYTES * d),
    Rival("fp8 e4m3, unscaled", lambda d, _: TokenLayer(fp8, own_raw=False), lambda d, _: 2 * d),
    _paper("TurboQuant paper, mse 4 bit", 4, 4, False),
    _paper("TurboQuant paper, QJL keys 4 bit", 4, 4, True),
    _paper("TurboQuant paper, mse K4V3", 4, 3, False),
    _paper("TurboQuant paper, mse 3 bit", 3, 3, False),
    _paper("TurboQuant paper, mse K3V2", 3, 2, False),
    _paper("TurboQuant paper, mse 2 bit", 2, 2, False),
    _token_rival("PolarQuant 4-2-2-2 bit", lambda d: lambda k, v: (polar(k), polar(v)), lambda d: 2 * polar_bytes(d)),
    _kivi(4, 128),
    _kivi(4, 32),
    _kivi(2, 128),
    _kivi(2, 32),
)
EVICTIONS = (Eviction("SnapKV, 27 % kept", 0.2656, False), Eviction("PyramidKV, 27 % kept", 0.2656, True))
