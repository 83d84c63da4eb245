"""Trellis codes: paths against brute force in float64, and codes against the code's polynomials."""

import itertools

import pytest
import torch

from tq_vllm.config import SCALE_SEARCH, TRELLIS, TRELLIS_SCALE_SEARCH
from tq_vllm.core import trellis
from tq_vllm.core.codebooks import trellis_centroids
from tq_vllm.core.quantizers import decode_vectors, encode_vectors


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parity(x: int) -> int:
    return x.bit_count() % 2


def contract_levels(codes: list[int], bits: int) -> list[float]:
    """Levels of one vector's codes, by Ungerboeck's polynomials 13 and 04 (octal) along each block."""
    levels, dim = trellis_centroids(bits).double().tolist(), len(codes)
    decoded = [0.0] * dim
    for order in trellis.block_order(dim).tolist():
        for p, coordinate in enumerate(order):
            register = sum((codes[order[(p - t) % 32]] & 1) << t for t in range(4))
            subset = 2 * parity(register & 0o13) + parity(register & 0o04)
            decoded[coordinate] = levels[subset + 4 * (codes[coordinate] >> 1)]
    return decoded


def closed_distances(y: list[float], levels: list[float]) -> list[float]:
    """Least squared distance of a closed path through one block for each of its states at the seam (Viterbi)."""
    best = []
    for seam in range(trellis.STATES):
        metric = {seam: 0.0}
        for x in y:
            near = [min((x - level) ** 2 for level in levels[subset::4]) for subset in range(4)]
            following: dict[int, float] = {}
            for (state, total), bit in itertools.product(metric.items(), (0, 1)):
                register = state << 1 | bit
                distance = total + near[2 * parity(register & 0o13) + parity(register & 0o04)]
                state = register % trellis.STATES
                following[state] = min(distance, following.get(state, distance))
            metric = following
        best.append(metric[seam])
    return best


def seam_state(path: int) -> int:
    return sum((path >> (31 - t) & 1) << t for t in range(3))


@pytest.mark.parametrize("bits", [2, 3])
def test_a_path_is_the_closest_through_its_state_at_the_seam(bits):
    levels = trellis_centroids(bits)
    y = gaussian(32, 60, seed=bits)
    paths = trellis.closest_paths(y, levels)
    _, index = trellis.quantize(y, paths, levels)
    squares = (y.double() - levels[index].double()).square().sum(0).tolist()
    excess = 0.0
    for path, square, block in zip(paths.tolist(), squares, y.double().t().tolist(), strict=True):
        distances = closed_distances(block, levels.double().tolist())
        assert square == pytest.approx(distances[seam_state(path)], rel=1e-5)
        excess += square - min(distances)
    assert excess < 0.02 * sum(squares)


def test_among_closed_paths_of_short_reach_brute_force_finds_none_closer():
    """A path differs from the chosen one in some coded bits: no choice of up to three others is closer and through the
    same state at the seam."""
    levels = trellis_centroids(2)
    y = gaussian(32, 1, seed=5)
    path = trellis.closest_paths(y, levels)

    def square(path: torch.Tensor) -> torch.Tensor:
        many = y.expand(32, len(path))
        return (many - levels[trellis.quantize(many, path, levels)[1]]).double().square().sum(0)

    flips = [sum(1 << p for p in chosen) for n in (1, 2, 3) for chosen in itertools.combinations(range(29), n)]
    others = path ^ torch.tensor(flips, dtype=torch.int32)
    assert (square(others) >= square(path) - 1e-6).all()


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("bits", [2, 3])
def test_decoding_follows_the_polynomials(bits, dim):
    codes = torch.randint(0, 2**bits, (3, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(dim))
    decoded = decode_vectors(codes, torch.ones(3), TRELLIS + bits).double()
    assert decoded.tolist() == [contract_levels(row, bits) for row in codes.tolist()]
    assert sorted(trellis.block_order(dim).flatten().tolist()) == list(range(dim))


@pytest.mark.parametrize("dim, bits, most", [(64, 2, 0.74), (64, 3, 0.71), (128, 2, 0.74), (128, 3, 0.69)])
def test_error_against_plain_codes_of_equal_bits(dim, bits, most):
    """1 - cosine^2, both with their scale search."""
    y = gaussian(3000, dim, seed=bits)

    def error(width, scale_search):
        decoded = decode_vectors(*encode_vectors(y, width, "norm", scale_search), width)
        return (1 - torch.cosine_similarity(y.double(), decoded.double(), dim=-1) ** 2).mean()

    assert error(TRELLIS + bits, TRELLIS_SCALE_SEARCH) < most * error(bits, SCALE_SEARCH)


@pytest.mark.parametrize("bits, dim, gain", [(2, 64, 0.015), (3, 64, 0.08), (2, 128, 0.007), (3, 128, 0.047)])
def test_scale_search_gains(bits, dim, gain):
    """1 - cosine^2 falls by what config.TRELLIS_SCALE_SEARCH says (a little is left for the sample)."""
    y = gaussian(3000, dim, seed=bits)

    def error(scale_search):
        decoded = decode_vectors(*encode_vectors(y, TRELLIS + bits, "norm", scale_search), TRELLIS + bits)
        return (1 - torch.cosine_similarity(y.double(), decoded.double(), dim=-1) ** 2).mean()

    assert error(TRELLIS_SCALE_SEARCH) < (1 - gain) * error((1.0,))


@pytest.mark.parametrize("bits", [2, 3])
def test_the_scale_of_the_closest_open_paths_is_taken(bits):
    """A lone candidate is the scale; of several, the codes are those of the one with the least distance."""
    u, levels, scales = gaussian(200, 64, seed=bits), trellis_centroids(bits), (1.0, 0.5, 0.85)
    alone = {s: trellis.search_codes(u, bits, (s,))[0] for s in scales}
    assert torch.equal(alone[0.5], trellis.search_codes(u / 0.5, bits, (1.0,))[0])
    order = trellis.block_order(64)
    y = torch.stack([u / s for s in scales])[..., order]  # [scales, 200, blocks, 32]
    distances = trellis.open_distances(y.flatten(0, 2).t().contiguous(), levels).view(3, 200, 2).sum(-1)
    chosen = (distances * torch.tensor(scales)[:, None] ** 2).argmin(0)
    expected = torch.stack(list(alone.values()))[chosen, torch.arange(200)]
    assert len(chosen.unique()) > 1
    assert torch.equal(trellis.search_codes(u, bits, scales)[0], expected)


def test_codes_are_pinned():
    """A change here changes what every stored cache means."""
    y = torch.arange(64).float().sub(11.3).mul(0.37)
    y[32:] = y[32:].flip(0) * 1.7
    codes, scale = encode_vectors(y, TRELLIS + 2, "norm", TRELLIS_SCALE_SEARCH)
    assert "".join(map(str, codes.tolist())) == "1333331110121012333333322322232222222232332333232222233233223322"
    assert scale == 15.078125
    codes, scale = encode_vectors(y, TRELLIS + 3, "norm", TRELLIS_SCALE_SEARCH)
    assert "".join(map(str, codes.tolist())) == "2223324233555555545444454454545567776677766666676776767467474745"
    assert scale == 18.71875
