"""Exact Hadamard matrices of order 2**k * {1, 12, 20, 28}: no head size in use needs padding."""

import functools

import torch

BASE_ORDERS = (1, 12, 20, 28)


def hadamard_factors(dim: int) -> tuple[int, int]:
    """Return (base, power) with dim = base * 2**power and base in BASE_ORDERS; ValueError where there is none."""
    for base in BASE_ORDERS:
        quotient, remainder = divmod(dim, base)
        if dim > 0 and remainder == 0 and quotient & (quotient - 1) == 0:
            return base, quotient.bit_length() - 1
    raise ValueError(
        f"No Hadamard rotation of dimension {dim}: it must be 2**k, 12*2**k, 20*2**k or 28*2**k (64, 80, 96, 112, 128, "
        "192, 256, 512 are); use a dense orthogonal rotation instead."
    )


def _jacobsthal(q: int) -> torch.Tensor:
    """Return int64 [q, q] with entry (i, j) = Legendre symbol of i - j modulo the prime q."""
    symbol = torch.full((q,), -1, dtype=torch.int64)
    symbol[torch.arange(1, q) ** 2 % q] = 1
    symbol[0] = 0
    index = torch.arange(q)
    return symbol[(index[:, None] - index[None, :]) % q]


@functools.cache
def base_matrix(order: int) -> torch.Tensor:
    """Return the +1/-1 matrix int64 [order, order] for an order in BASE_ORDERS: Paley I (12, 20) or Paley II (28)."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if order in (12, 20):  # q = order - 1 is 3 modulo 4: I + [[0, 1], [-1, Q]]
        core = torch.zeros(order, order, dtype=torch.int64)
        core[0, 1:] = 1
        core[1:, 0] = -1
        core[1:, 1:] = _jacobsthal(order - 1)
        return core + torch.eye(order, dtype=torch.int64)
    if order == 28:  # q = 13 is 1 modulo 4: in [[0, 1], [1, Q]] put `on` for 1, -`on` for -1 and `off` for 0
        core = torch.zeros(14, 14, dtype=torch.int64)
        core[0, 1:] = 1
        core[1:, 0] = 1
        core[1:, 1:] = _jacobsthal(13)
        on, off = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return torch.kron(core, on) + torch.kron(torch.eye(14, dtype=torch.int64), off)
    raise ValueError(f"No base Hadamard matrix of order {order}; the orders are {BASE_ORDERS}.")


def hadamard_matrix(dim: int) -> torch.Tensor:
    """Return the +1/-1 matrix int64 [dim, dim]: kron(base_matrix(base), Sylvester matrix of order 2**power).

    So the butterflies run inside each run of 2**power neighbouring coordinates, and the base matrix mixes the runs.
    """
    base, power = hadamard_factors(dim)
    matrix = base_matrix(base)
    for _ in range(power):
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]]))
    return matrix
