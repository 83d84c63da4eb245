"""The profile of a step: whole steps only, overlap and gaps told apart."""

import pytest
from engine_bench.step_profile import Kernel, profile_steps, step_table

STEP = [Kernel("attention", 0, 10), Kernel("merge", 8, 4), Kernel("attention", 14, 10), Kernel("sample", 24, 1)]


def steps(count: int, length: float = 30) -> list[Kernel]:
    return [kernel._replace(start=1000 + i * length + kernel.start) for i in range(count) for kernel in STEP]


def test_overlap_counts_once_and_gaps_are_idle():
    profile = profile_steps(steps(9), 8)
    assert profile["steps"] == 8
    assert profile["us"] == pytest.approx(30)
    assert profile["idle_us"] == pytest.approx(2 + 5)  # before the second attention, between steps
    lines = {line["name"]: line for line in profile["kernels"]}
    assert lines["attention"]["count"] == 2 and lines["attention"]["duration"] == pytest.approx(20)
    assert lines["merge"]["duration"] == pytest.approx(4) and lines["merge"]["advance"] == pytest.approx(2)
    assert sum(line["advance"] for line in lines.values()) == pytest.approx(profile["us"])


def test_parts_of_a_step_at_either_end_are_left_out():
    for part in (steps(9)[2:], steps(9)[:-1]):
        profile = profile_steps(part, 8)
        assert profile["steps"] in (7, 8) and profile["us"] == pytest.approx(30)
        assert sum(line["duration"] for line in profile["kernels"]) == pytest.approx(25)


def test_without_a_kernel_of_every_step_there_is_no_profile():
    with pytest.raises(ValueError, match="none occurs once"):
        profile_steps(steps(2), 8)


def test_table_sums_up_the_many_small_ones():
    kernels = [Kernel(f"k{k}", 100 * i + k, 0.5) for i in range(9) for k in range(20)]
    header, cells = step_table(profile_steps(kernels, 8))
    assert len(cells) == 15 and cells[-1][0] == "6 others" and len(header) == len(cells[0])
    assert sum(float(row[1]) for row in cells) == 20
