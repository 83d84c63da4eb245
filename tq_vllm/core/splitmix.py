"""Random numbers that are the same on every machine and in every torch version: SplitMix64 and what follows from it."""

import math

import torch

GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift_right(z: torch.Tensor, n: int) -> torch.Tensor:
    """Logical right shift of int64 bit patterns (torch's own >> copies the sign bit)."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def splitmix64(seed: int, count: int) -> torch.Tensor:
    """Return the first `count` outputs of SplitMix64 started at `seed`: int64 [count], the bits of the unsigned output.

    Output i is mix(seed + (i + 1) * 0x9E3779B97F4A7C15) with Stafford's variant 13 as mix (Steele, Lea and Flood 2014).
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must lie in 0 .. 2**63 - 1.")
    z = seed + GOLDEN * torch.arange(1, count + 1, dtype=torch.int64)  # [count], wraps modulo 2**64
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def random_signs(seed: int, count: int) -> torch.Tensor:
    """Return int8 [count] of +1 and -1: -1 where the top bit of that output of `splitmix64(seed)` is set."""
    return torch.where(splitmix64(seed, count) < 0, -1, 1).to(torch.int8)


def random_gaussian(seed: int, count: int) -> torch.Tensor:
    """Return float64 [count] of independent N(0, 1) by Box-Muller on pairs of 53-bit uniforms in (0, 1].

    Same bits everywhere up to the last digit of the platform's log, cos and sin.
    """
    pairs = (count + 1) // 2
    uniform = (_shift_right(splitmix64(seed, 2 * pairs), 11) + 1).to(torch.float64) * 2.0**-53  # [2 * pairs]
    radius = (-2.0 * uniform[0::2].log()).sqrt()
    angle = 2.0 * math.pi * uniform[1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten()[:count]
