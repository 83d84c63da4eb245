"""Solves the codebooks with SciPy and writes them to codebook_tables.py: `python -m tq_vllm.core.codebook_generator`.

All densities here are of a coordinate u scaled to unit variance. Limit: N(0, 1). Exact, for a uniformly random unit
vector in dimension d: u = sqrt(d) * x with density proportional to (1 - u^2/d)^((d-3)/2) on |u| <= sqrt(d)
(TurboQuant Lemma 1). Both are symmetric and log-concave, so that the Lloyd-Max quantizer is unique and symmetric; only
its positive half is solved.

Trellis codebooks have no closed form: each level is the mean of what the encoder assigns to it, over a fixed sample of
N(0, 1), iterated (the generalised Lloyd algorithm, as Marcellin and Fischer 1990 optimise theirs).
"""

import functools
import math
import textwrap
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.special
import torch

from tq_vllm.core import trellis

TABLE_BITS = range(1, 9)
TABLE_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
PAGE_BITS = range(2, 6)
TRELLIS_BITS = (2, 3)
TRELLIS_SAMPLE, TRELLIS_ITERATIONS = 1 << 15, 30  # blocks, and Lloyd steps on them
PAGE_LEVEL_MAX = 127
PAGE_UNIT_BITS = 12  # significant bits kept of a page unit, so that every (2m+1)*unit is exact in float32


class Density:
    """The density of a unit-variance coordinate: N(0, 1) for dim None, else the Beta density of dimension `dim`."""

    def __init__(self, dim: int | None):
        self.dim = dim
        self.support = math.inf if dim is None else math.sqrt(dim)

    def pdf(self, u: np.ndarray) -> np.ndarray:
        if self.dim is None:
            return np.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
        log_constant = -0.5 * math.log(self.dim) - scipy.special.betaln(0.5, 0.5 * (self.dim - 1))
        inside = np.maximum(1 - u * u / self.dim, 0)
        return np.exp(log_constant) * inside ** (0.5 * (self.dim - 3))

    def tail(self, u: np.ndarray) -> np.ndarray:
        """Probability above u, for u >= 0."""
        if self.dim is None:
            return scipy.special.ndtr(-u)
        return 0.5 * scipy.special.betainc(0.5 * (self.dim - 1), 0.5, np.maximum(1 - u * u / self.dim, 0))

    def tail_mean(self, u: np.ndarray) -> np.ndarray:
        """Integral of v * pdf(v) over v > u, for u >= 0."""
        if self.dim is None:
            return self.pdf(u)
        inside = np.maximum(1 - u * u / self.dim, 0)
        return self.dim / (self.dim - 1) * self.pdf(u) * inside

    def cells(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability and first moment of each positive cell between 0, the thresholds and the end of the support."""
        tail = np.concatenate(([0.5], self.tail(thresholds), [0.0]))
        mean = np.concatenate((self.tail_mean(np.zeros(1)), self.tail_mean(thresholds), [0.0]))
        return tail[:-1] - tail[1:], mean[:-1] - mean[1:]

    def mse(self, levels: np.ndarray) -> float:
        """Mean squared error of the symmetric codebook with positive `levels` (ascending) and midpoint thresholds."""
        probability, moment = self.cells(midpoints(levels))
        return 1.0 + 2.0 * float(np.sum(probability * levels * levels - 2.0 * moment * levels))


def midpoints(levels: np.ndarray) -> np.ndarray:
    return 0.5 * (levels[1:] + levels[:-1])


@functools.cache
def _lloyd_max(bits: int, dim: int | None) -> np.ndarray:
    density, count = Density(dim), 1 << (bits - 1)
    # Panter-Dite start (point density ~ pdf^(1/3)), a few Lloyd steps, then Newton on levels = centroids(levels).
    levels = math.sqrt(3) * scipy.special.ndtri(0.5 + (np.arange(count) + 0.5) / (2 * count))
    levels = np.minimum(levels, 0.999 * density.support)
    for _ in range(200):
        probability, moment = density.cells(midpoints(levels))
        levels = moment / probability
    for _ in range(100):
        thresholds = midpoints(levels)
        probability, moment = density.cells(thresholds)
        centroids = moment / probability
        pdf = density.pdf(thresholds)
        upper = 0.5 * pdf * (thresholds - centroids[:-1]) / probability[:-1]  # d centroid_i / d level_i and level_{i+1}
        lower = 0.5 * pdf * (centroids[1:] - thresholds) / probability[1:]  # d centroid_i / d level_i and level_{i-1}
        banded = np.zeros((3, count))  # of the identity minus the Jacobian
        banded[0, 1:], banded[2, :-1] = -upper, -lower
        banded[1] = 1 - np.concatenate((upper, [0])) - np.concatenate(([0], lower))
        step = scipy.linalg.solve_banded((1, 1), banded, centroids - levels)
        levels = levels + step
        if np.max(np.abs(step)) < 1e-10:
            return levels
    raise RuntimeError(f"Lloyd-Max did not converge at {bits} bits, dimension {dim}.")


def lloyd_max(bits: int, dim: int | None) -> np.ndarray:
    """Return the positive levels (ascending, [2**(bits-1)]) of the optimal quantizer of a unit-variance coordinate."""
    return _lloyd_max(bits, dim).copy()


def _page_candidate(bits: int, unit: float) -> tuple[float, np.ndarray]:
    """Return the MSE and the integers m of the best codebook (2m+1)*unit found from the rounded Lloyd-Max levels."""
    density = Density(None)
    odd = 2 * np.clip(np.round((lloyd_max(bits, None) / unit - 1) / 2), 0, PAGE_LEVEL_MAX) + 1
    best = density.mse(odd * unit)
    improved = True
    while improved:
        improved = False
        for i in range(len(odd)):
            for step in (-2, 2):
                trial = odd.copy()
                trial[i] += step
                if trial[0] < 1 or trial[-1] > 2 * PAGE_LEVEL_MAX + 1 or np.any(np.diff(trial) <= 0):
                    continue
                error = density.mse(trial * unit)
                if error < best - 1e-15:
                    best, odd, improved = error, trial, True
    return best, ((odd - 1) / 2).astype(int)


def _page_units(largest: float) -> list[float]:
    """Units, of PAGE_UNIT_BITS significant bits, that give a largest level of `largest` an m from about 64 to 127."""
    exponent = math.floor(math.log2(largest / (2 * PAGE_LEVEL_MAX + 1)))
    quantum = 2.0 ** (exponent - PAGE_UNIT_BITS + 1)
    first = math.ceil(0.98 * largest / (2 * PAGE_LEVEL_MAX + 1) / quantum)
    return [k * quantum for k in range(first, 2 * first)]


@functools.cache
def page_codebook(bits: int) -> tuple[tuple[int, ...], float]:
    """Return (m [2**(bits-1)], unit): the codebook sign*(2m+1)*unit, m in 0..127, of least Gaussian MSE.

    A unit has PAGE_UNIT_BITS significant bits; the grid takes the largest m from about 64 to 127.
    """
    units = _page_units(lloyd_max(bits, None)[-1])
    best = min(units, key=lambda unit: _page_candidate(bits, unit)[0])
    return tuple(_page_candidate(bits, best)[1].tolist()), best


def trellis_sample(num_blocks: int, seed: int) -> torch.Tensor:
    """Return blocks of N(0, 1), float32 [32, num_blocks]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((trellis.BLOCK, num_blocks), np.float32))


def trellis_assignment(y: torch.Tensor, levels: np.ndarray) -> np.ndarray:
    """Return the index among the rising `levels` that the encoder gives each coordinate of blocks y [32, n]."""
    table = torch.tensor(levels, dtype=torch.float32)
    parts = (trellis.quantize(part, trellis.closest_paths(part, table), table)[1] for part in y.split(1024, 1))
    return torch.cat(list(parts), 1).numpy()


@functools.cache
def trellis_codebook(bits: int) -> tuple[tuple[int, ...], float]:
    """Return (m [2**bits], unit): the trellis codebook +-(2m+1)*unit, m in 0..127, its unit as of a page codebook."""
    y = trellis_sample(TRELLIS_SAMPLE, seed=0)
    count = 2 << bits
    levels = 1.15 * scipy.special.ndtri((np.arange(count) + 0.5) / count)
    for _ in range(TRELLIS_ITERATIONS):
        index = trellis_assignment(y, levels).ravel()
        hits = np.bincount(index, minlength=count)
        sums = np.bincount(index, weights=y.numpy().ravel(), minlength=count)
        levels = (sums - sums[::-1]) / (hits + hits[::-1])  # of the sample and its negative
    positive, share = levels[count // 2 :], (hits + hits[::-1])[count // 2 :]

    def rounded(unit: float) -> np.ndarray:
        return np.clip(np.round((positive / unit - 1) / 2), 0, PAGE_LEVEL_MAX)

    unit = min(_page_units(positive[-1]), key=lambda u: float(share @ ((2 * rounded(u) + 1) * u - positive) ** 2))
    return tuple(rounded(unit).astype(int).tolist()), unit


def trellis_mse(bits: int, seed: int) -> float:
    """Mean squared error of the trellis codebook over another sample of N(0, 1)."""
    m, unit = trellis_codebook(bits)
    positive = (2 * np.array(m) + 1) * unit
    levels = np.concatenate((-positive[::-1], positive))
    y = trellis_sample(TRELLIS_SAMPLE, seed)
    return float(np.mean((y.numpy().astype(np.float64) - levels[trellis_assignment(y, levels)]) ** 2))


def tables_source() -> str:
    """Return the text of codebook_tables.py."""

    def wrapped(numbers) -> str:
        text = textwrap.fill(", ".join(numbers), 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
        return f"(\n{text},\n    )"

    lines = [
        '"""Positive codebook levels of unit-variance coordinates; written by codebook_generator.py."""',
        "",
        "# fmt: off",
        "# (bits, dim or None for the Gaussian limit) -> levels, ascending, [2**(bits-1)]",
        "LLOYD_MAX = {",
    ]
    for dim in (None, *TABLE_DIMS):
        for bits in TABLE_BITS:
            lines.append(f"    ({bits}, {dim}): " + wrapped(f"{level:.9g}" for level in lloyd_max(bits, dim)) + ",")
    lines += ["}", "", "# bits -> m, ascending: the page codebook's magnitudes are (2m+1)*unit", "PAGE_LEVELS = {"]
    pages = {bits: page_codebook(bits) for bits in PAGE_BITS}
    lines += [f"    {bits}: ({', '.join(map(str, levels))})," for bits, (levels, _) in pages.items()]
    lines += ["}", "PAGE_UNIT = {"]
    lines += [f"    {bits}: {unit!r},  # {unit.hex()}" for bits, (_, unit) in pages.items()]
    lines += ["}", "", "# bits -> m, ascending: the trellis codebook's magnitudes are (2m+1)*unit"]
    lines += ["TRELLIS_LEVELS = {"]
    trellises = {bits: trellis_codebook(bits) for bits in TRELLIS_BITS}
    lines += [f"    {bits}: ({', '.join(map(str, levels))})," for bits, (levels, _) in trellises.items()]
    lines += ["}", "TRELLIS_UNIT = {"]
    lines += [f"    {bits}: {unit!r},  # {unit.hex()}" for bits, (_, unit) in trellises.items()]
    return "\n".join([*lines, "}", ""])


def main() -> None:
    """Write codebook_tables.py beside this file and print what the codebooks of pages cost."""
    Path(__file__).with_name("codebook_tables.py").write_text(tables_source())
    for bits in PAGE_BITS:
        levels, unit = page_codebook(bits)
        optimum = Density(None).mse(lloyd_max(bits, None))
        page = Density(None).mse((2 * np.array(levels) + 1) * unit)
        cost = f"Lloyd-Max {optimum:.6f}, page {page:.6f} ({page / optimum - 1:+.3%})"
        print(f"{bits} bits: {cost}, m {levels}, unit {unit}")
    for bits in TRELLIS_BITS:
        levels, unit = trellis_codebook(bits)
        optimum, error = Density(None).mse(lloyd_max(bits, None)), trellis_mse(bits, seed=1)
        cost = f"Lloyd-Max {optimum:.6f}, trellis {error:.6f} ({error / optimum - 1:+.2%})"
        print(f"{bits} bits: {cost}, m {levels}, unit {unit}")


if __name__ == "__main__":
    main()
