"""What the steps of an engine are made of: its kernels and the gaps between them, from torch's profiler (CUPTI).

Kernels overlap (programmatic dependent launch starts one while the one before it ends), so durations do not add up to a
step. `advance` does: the time by which a kernel moves the latest end seen so far, the gap before it included.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

MAX_IRREGULARITY = 2.0  # longest interval between two occurrences of what marks a step, over the median one
TOP = 14  # kernels that a table names


class Kernel(NamedTuple):
    """A kernel, copy or fill on the GPU; times in microseconds."""

    name: str
    start: float
    duration: float


class Line(NamedTuple):
    """A kernel's part of a step: times it runs; microseconds it takes, moves the latest end by, and waits before."""

    name: str
    count: float
    duration: float
    advance: float
    idle: float


def cut_steps(kernels: list[Kernel], expected: int) -> tuple[list[Kernel], int]:
    """The kernels of whole steps after the one that ends the step before them, in order, and how many steps these are.

    The rarest kernel that occurs in about every step marks its end.

    Args:
        kernels: of `expected` steps or somewhat more, in any order.

    Raises:
        ValueError: no kernel occurs once a step.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    counts = Counter(kernel.name for kernel in kernels)
    for name, count in sorted(counts.items(), key=lambda item: item[1]):
        if count < max(3, expected * 0.8):
            continue
        marks = [i for i, kernel in enumerate(kernels) if kernel.name == name]
        starts = [kernels[i].start for i in marks]
        intervals = sorted(b - a for a, b in zip(starts, starts[1:], strict=False))
        if intervals[-1] <= MAX_IRREGULARITY * intervals[len(intervals) // 2]:
            return kernels[marks[0] : marks[-1] + 1], len(marks) - 1
    raise ValueError(f"{len(kernels)} kernels, of which none occurs once in each of {expected} steps")


def profile_steps(kernels: list[Kernel], expected: int) -> dict:
    """What a step is made of, the mean of whole ones; see `summary`.

    Raises:
        ValueError: see cut_steps.
    """
    (before, *kernels), steps = cut_steps(kernels, expected)
    return summary(kernels, steps, before.start + before.duration)


def summary(kernels: list[Kernel], steps: int = 1, begin: float | None = None) -> dict:
    """Microseconds of a step, of that idle, and its kernels, the longest first: {"steps", "us", "idle_us", "kernels"}.

    Args:
        kernels: in order of their start, of `steps` steps that begin at `begin` (default: with the first kernel).
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    end = first = kernels[0].start if begin is None else begin
    for kernel in kernels:
        idle = max(0.0, kernel.start - end)
        advance = max(0.0, kernel.start + kernel.duration - end)
        end += advance
        for i, value in enumerate((1, kernel.duration, advance, idle)):
            found[kernel.name][i] += value / steps
    lines = sorted((Line(name, *values) for name, values in found.items()), key=lambda line: -line.advance)
    idle = sum(line.idle for line in lines)
    return {"steps": steps, "us": (end - first) / steps, "idle_us": idle, "kernels": [line._asdict() for line in lines]}


def step_table(profile: dict) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the kernels that move the end of a step most, and one line for the others."""
    header = ["kernel", "a step", "duration us", "advance us", "of it idle us"]
    lines = [Line(**line) for line in profile["kernels"]]
    if len(lines) > TOP:
        rest = [sum(values) for values in zip(*(line[1:] for line in lines[TOP:]), strict=True)]
        lines = [*lines[:TOP], Line(f"{len(lines) - TOP} others", *rest)]
    cells = [[line.name[:70], f"{line.count:.1f}", *(f"{value:.1f}" for value in line[2:])] for line in lines]
    return header, cells
