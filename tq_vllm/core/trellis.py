"""Trellis-coded quantization: two and three bits a coordinate out of twice as many levels.

The 2^(bits+1) levels of a codebook are named D0 D1 D2 D3 D0 .. in rising order, and a path through a trellis of eight
states says which of the four subsets every coordinate takes its level from (Marcellin and Fischer, "Trellis coded
quantization of memoryless and Gauss-Markov sources", IEEE Trans. Commun. 38, 1990). One *coded bit* u_p a coordinate
is the path; the other bits - 1, *uncoded*, count the levels of the subset upwards. The code is Ungerboeck's of rate
1/2 and eight states (IEEE Trans. Inf. Theory 28, 1982, table I: h0 = 13, h1 = 04 octal) in feedforward form:

    subset = 2 c1 + c0,   c1 = u_p + u_{p-1} + u_{p-3},   c0 = u_{p-2}   (modulo 2)

A block is BLOCK coordinates whose path bites its tail, p - 1 modulo BLOCK: its coded bits are one 32-bit word, and both
parities are XORs of that word's rotations. Block w of a vector holds the groups of eight coordinates g = w modulo
dim / 32, and position p = 4 k + j of the block is coordinate k of its j-th group: so a lane of the CUDA kernels holds
whole blocks when it writes keys and values and when it reads them.

A code is `coded bit | uncoded << 1`. Every sequence of codes is a path: decoding knows no error.
"""

import functools

import torch

from tq_vllm.core.codebooks import trellis_centroids

BLOCK = 32
TIE = 1 + 2**-16  # sums of distances this near to each other count as equal, so that rounding does not choose
STATES = 8  # the coded bits before a coordinate: bit t - 1 is u_{p-t}


def _subset(register: int) -> int:
    """Subset of a coordinate whose coded bit is bit 0 of `register`, and the t-th before it bit t."""
    u = [register >> t & 1 for t in range(4)]
    return 2 * (u[0] ^ u[1] ^ u[3]) + u[2]


_SUBSETS = tuple(map(_subset, range(2 * STATES)))


def block_order(dim: int) -> torch.Tensor:
    """Return the coordinate at each position of each block, int64 [dim / 32, 32]."""
    block, position = torch.arange(dim // BLOCK)[:, None], torch.arange(BLOCK)
    return 8 * (block + dim // BLOCK * (position % 4)) + position // 4


def _to_blocks(x: torch.Tensor) -> torch.Tensor:
    """Bring vectors [n, dim] into blocks, position first: [32, n * dim / 32]."""
    n, dim = x.shape
    return x.view(n, 4, dim // BLOCK, 8).permute(3, 1, 0, 2).reshape(BLOCK, n * dim // BLOCK)


def _from_blocks(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Inverse of `_to_blocks`: [32, n * dim / 32] -> [n, dim]."""
    blocks = dim // BLOCK
    return x.view(8, 4, x.shape[1] // blocks, blocks).permute(2, 1, 3, 0).reshape(x.shape[1] // blocks, dim)


@functools.cache
def _register_subsets(device: torch.device) -> torch.Tensor:
    return torch.tensor(_SUBSETS, device=device)


def _distances(y: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Squared distance of y [32, n] to the nearest of `levels` [2^(bits+1)] in each subset: [32, 4, n]."""
    nearest = (y[:, None] - levels[:4, None]).abs_()
    for first in range(4, len(levels), 4):
        nearest = torch.minimum(nearest, (y[:, None] - levels[first : first + 4, None]).abs_())
    return nearest.square_()


def _branches(distances: torch.Tensor) -> torch.Tensor:
    """Spread distances [32, 4, n] over the branches: [32, 2 (oldest bit), 4 (the two between), 2 (newest), n]."""
    return distances.index_select(1, _register_subsets(distances.device)).unflatten(1, (2, 4, 2))


def _forward(branches: torch.Tensor) -> torch.Tensor:
    """Least distance of a path through the block to each state after it, from any state: [8, n]."""
    metric = branches.new_zeros(STATES, branches.shape[-1])
    for step in branches:
        old, young = (metric.view(2, 4, 1, branches.shape[-1]) + step).unbind()
        metric = torch.minimum(old, young)
    return metric.view(STATES, branches.shape[-1])


def _backward(branches: torch.Tensor) -> torch.Tensor:
    """Least distance of a path through the block from each state before it, to any state: [8, n]."""
    metric = branches.new_zeros(STATES, branches.shape[-1])
    for step in branches.flip(0):
        zero, one = (metric.view(4, 2, branches.shape[-1]) + step).unbind(2)
        metric = torch.minimum(zero, one)  # [2, 4, n]
    return metric.view(STATES, branches.shape[-1])


def _closed_path(branches: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Coded bits, int32 [n], of the closest path from `state` [n] before the block to the same state after it."""
    n = branches.shape[-1]
    metric = branches.new_full((STATES, n), torch.inf).scatter_(0, state[None], 0.0)
    path = torch.zeros(STATES, n, dtype=torch.int32, device=branches.device)
    for p, step in enumerate(branches):
        old, young = (metric.view(2, 4, 1, n) + step).unbind()
        path_old, path_young = path.view(2, 4, 1, n).unbind()
        path = torch.where(young < old, path_young, path_old)  # [4, 2, n]
        path[:, 1] |= (1 << p) - (1 << 32 if p == 31 else 0)  # bit p, as an int32
        metric = torch.minimum(old, young)
    return path.view(STATES, n).gather(0, state[None])[0]


def open_distances(y: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of each block y [32, n] to the closest path whose ends are free: [n]."""
    return _forward(_branches(_distances(y, levels))).amin(0)


def closest_paths(y: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the coded bits of a path near to each block, int32 [n], bit p of position p; y [32, n].

    The state at the seam is the one with the least sum of the distances of open paths into it and out of it, and the
    path the closest one that starts and ends there (Viterbi). On N(0, 1) that costs .4 % of squared error over the
    best of all closed paths. Of equals (states: to within TIE) the first wins, and the path whose oldest bit is 0.
    """
    branches = _branches(_distances(y, levels))
    distances = _forward(branches) + _backward(branches)  # equal for two states in one block of a thousand
    return _closed_path(branches, (distances <= distances.amin(0) * TIE).to(torch.uint8).argmax(0))


def _subsets_of(coded: torch.Tensor) -> torch.Tensor:
    """Subset at every position, from the coded bits at all of them: int [32, n] -> [32, n]."""
    c1 = coded ^ coded.roll(1, 0) ^ coded.roll(3, 0)
    return 2 * c1 + coded.roll(2, 0)


def quantize(y: torch.Tensor, paths: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, index of the level) int64 [32, n] each: nearest levels to y [32, n] along `paths` [n]."""
    coded = (paths.long() >> torch.arange(BLOCK, device=y.device)[:, None]) & 1
    subset = _subsets_of(coded)
    distance = torch.stack([(y - levels[first + subset]).abs() for first in range(0, len(levels), 4)])
    uncoded = distance.argmin(0)
    return coded | uncoded << 1, 4 * uncoded + subset


def search_codes(u: torch.Tensor, bits: int, scale_search: tuple[float, ...]) -> tuple[torch.Tensor, ...]:
    """Return codes uint8 [n, dim], <u, c> and |c| f32 [n] of u [n, dim] f32, dim a multiple of 32.

    Of the scale candidates the one counts whose open paths are closest: s^2 times the distance of u / s to the best
    path through each block, ends free, added up over blocks; the first wins ties. It is close to the cosine that it
    stands for (85 to 90 % of the gain at 3 bits, half of it at 2), and one pass over the coordinates instead of a
    whole encoding.
    """
    n, dim = u.shape
    levels = trellis_centroids(bits).to(u.device)
    blocks = _to_blocks(u)
    best = torch.full((n,), scale_search[0], dtype=torch.float32, device=u.device)
    if len(scale_search) > 1:
        scales = torch.tensor(scale_search, dtype=torch.float32, device=u.device)[:, None]  # [candidates, 1]
        y = (blocks[:, None] / scales).flatten(1)
        open_distance = open_distances(y, levels).view(len(scale_search), n, dim // BLOCK)
        total = sum(open_distance.unbind(-1)) * scales.square()  # [candidates, n]
        best = scales[total.argmin(0), 0]
    y = blocks / best.repeat_interleave(dim // BLOCK)
    codes, index = quantize(y, closest_paths(y, levels), levels)
    c = _from_blocks(levels[index], dim)
    return _from_blocks(codes.to(torch.uint8), dim), (c * u).sum(-1), torch.linalg.vector_norm(c, dim=-1)


def level_indices(codes: torch.Tensor) -> torch.Tensor:
    """Return the place of each coordinate's level in the rising codebook, int64 [..., dim], of codes [..., dim]."""
    blocks = _to_blocks(codes.reshape(-1, codes.shape[-1])).long()
    index = 4 * (blocks >> 1) + _subsets_of(blocks & 1)
    return _from_blocks(index, codes.shape[-1]).view(codes.shape)
