"""Engines of an evaluation that end without a result."""

import pytest

from tq_vllm.quality.process import EngineFailedError, engine_arguments, run_engine
from tq_vllm.quality.tasks import SIZES


@pytest.mark.parametrize(
    "code, reason",
    [
        ("raise ValueError('no memory')", "no memory"),
        ("print('[rank0]: AssertionError: not detected\\n[rank0]: Warning: left'); exit(1)", "not detected"),
        ("exit(3)", "it left with exit code 3"),
    ],
)
def test_the_reason_is_the_error_in_the_log(code, reason, tmp_path):
    engine = engine_arguments("turboquant", 16, SIZES["ci"], {})
    with pytest.raises(EngineFailedError, match=f"^{reason}$"):
        run_engine("model", engine, SIZES["ci"], 10, tmp_path, worker=("-c", code))
