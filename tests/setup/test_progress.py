"""Long steps tell where they are, and a failed one what it said."""

import sys

import pytest

from tq_vllm.cli import progress
from tq_vllm.cli.progress import Progress, StepFailed


def test_a_long_step_speaks_while_it_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    code = "import time; print('Downloading a wheel', flush=True); time.sleep(0.8)"
    Progress(tmp_path / "log", total=2).run("fetch", [sys.executable, "-c", code], "nothing")
    out = capsys.readouterr().out
    assert "[1/2] fetch ... 0 s  Downloading a wheel" in out
    assert "[1/2] fetch: done in" in out


def test_a_failed_step_carries_its_last_words_and_the_way_out(tmp_path, capsys):
    code = "import sys; [print(f'line {i}') for i in range(40)]; sys.exit('the disk is full')"
    with pytest.raises(StepFailed) as failure:
        Progress(tmp_path / "log", total=1).run("unpack", [sys.executable, "-c", code], "free some space")
    assert "the disk is full" in failure.value.what and "line 5\n" not in failure.value.what
    assert failure.value.what_to_do == "free some space"
    assert "line 5\n" in (tmp_path / "log").read_text()
    assert "[1/1] unpack: failed" in capsys.readouterr().out
