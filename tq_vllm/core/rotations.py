"""Random rotations of head vectors: randomised Hadamard, dense orthogonal and identity, equal on every machine.

A rotation makes every coordinate of a unit vector behave like one draw from a known density (TurboQuant Alg. 1 line 2),
so that one fixed codebook fits all of them. One Hadamard round is as good as a dense matrix on keys and values; on
inputs with one or two non-zero coordinates it can be 2.3 times worse than theory, and three rounds can not.
"""

import functools
import math

import torch

from tq_vllm.core.hadamard import hadamard_factors, hadamard_matrix
from tq_vllm.core.splitmix import random_gaussian, random_signs

KINDS = ("hadamard", "dense", "identity")


def default_rotation(dim: int) -> str:
    """Return "hadamard" where `hadamard_matrix(dim)` exists, else "dense": the rule for any dimension."""
    try:
        hadamard_factors(dim)
    except ValueError:
        return "dense"
    return "hadamard"


def dense_orthogonal(dim: int, seed: int) -> torch.Tensor:
    """Return a Haar-distributed orthogonal f64 [dim, dim]: Q of a Gaussian matrix whose R has a positive diagonal."""
    q, r = torch.linalg.qr(random_gaussian(seed, dim * dim).view(dim, dim))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


class Rotation:
    """An orthonormal map of vectors of `head_dim` coordinates, fixed by (head_dim, kind, rounds, seed).

    kind "hadamard": y = R_{rounds-1} ... R_1 R_0 x with R_r x = H (s_r * x) / sqrt(head_dim), where H is
    `hadamard_matrix(head_dim)` and s_r are coordinates r*head_dim .. (r+1)*head_dim - 1 of `random_signs(seed, ..)`.
    kind "dense": a random orthogonal matrix. kind "identity": y = x.
    ValueError for an unknown kind, rounds outside 1..3, or a head_dim that has no Hadamard matrix.

    The product is formed densely in float64 and rounded once. That is exact enough for the result not to depend on the
    batch a vector is in (a float32 product does depend on it), and for the few vectors of a decode step it is several
    times faster than log2(head_dim) butterfly steps.
    """

    def __init__(self, head_dim: int, kind: str = "hadamard", rounds: int = 1, seed: int = 0):
        if kind not in KINDS:
            raise ValueError(f"Rotation kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
        if not 1 <= rounds <= 3 or (rounds > 1 and kind != "hadamard"):
            raise ValueError(f"{rounds} rounds of a {kind} rotation; a hadamard rotation has 1 to 3, the others 1.")
        self.head_dim, self.kind, self.rounds, self.seed = head_dim, kind, rounds, seed
        self._matrix = self._build()  # [head_dim, head_dim] f64, y = matrix @ x
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def _build(self) -> torch.Tensor:
        if self.kind == "identity":
            return torch.eye(self.head_dim, dtype=torch.float64)
        if self.kind == "dense":
            return dense_orthogonal(self.head_dim, self.seed)
        step = hadamard_matrix(self.head_dim).to(torch.float64) / math.sqrt(self.head_dim)
        matrix, *more = (step * signs for signs in self.signs())
        for factor in more:
            matrix = factor @ matrix
        return matrix

    def signs(self) -> torch.Tensor:
        """Return the signs s_r of a hadamard rotation: int8 [rounds, head_dim], +1 or -1."""
        if self.kind != "hadamard":
            raise ValueError(f"A {self.kind} rotation has no signs; only a hadamard rotation does.")
        return random_signs(self.seed, self.rounds * self.head_dim).view(self.rounds, self.head_dim)

    def matrix(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the matrix of the map, float64 [head_dim, head_dim]: y = matrix @ x for a column x."""
        device = torch.device(device)
        if device not in self._on_device:
            self._on_device[device] = self._matrix.to(device)
        return self._on_device[device]

    def _apply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"Vectors of {x.shape[-1]} coordinates given to a rotation of {self.head_dim}.")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.to(dtype) if self.kind == "identity" else (x.to(torch.float64) @ matrix).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [..., head_dim] of any float dtype; float32 out (float64 for float64 in)."""
        return self._apply(x, self.matrix(x.device).t())

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Rotate y [..., head_dim] back; float32 out (float64 for float64 in)."""
        return self._apply(y, self.matrix(y.device))


@functools.cache
def get_rotation(head_dim: int, kind: str = "hadamard", rounds: int = 1, seed: int = 0) -> Rotation:
    """Return the one shared Rotation with these arguments; the cache uses `get_rotation(head_dim)`."""
    return Rotation(head_dim, kind, rounds, seed)
