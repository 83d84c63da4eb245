"""bench/paper/logits.py: each of its kernels against float64 logits, which it checks before it times."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "paper"))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_format_is_checked(triton_ops):
    from logits import run

    rows = run(2, 128, 128, 3, DEVICE, lambda launch, copies: 1.0)
    assert [(row["format"], row["bytes"]) for row in rows] == [
        ("float32", 512), ("bf16", 256), ("fp8", 128), ("4-bit codes", 66),
    ]  # fmt: skip


def test_wrong_logits_have_no_time(triton_ops):
    from logits import Logits, WrongResultError

    case = Logits(2, 128, 128, 3, DEVICE)
    launch, keys, _ = case.codes(1)
    keys[0, 0] += 1
    with pytest.raises(WrongResultError, match="4-bit codes"):
        case.check("4-bit codes", launch, keys, case.query)
