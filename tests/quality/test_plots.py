"""The plots of bench/quality: what they read out of docs/quality.md, and what they say without matplotlib."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench" / "quality"))

import plots  # noqa: E402

DOCUMENT = (ROOT / "docs" / "quality.md").read_text()


def test_rows_are_those_of_the_document():
    default, gemma = plots.document_rows(DOCUMENT).values()
    assert {"family": "tq_vllm", "bytes_per_token": 6120, "perplexity": 12.65, "kl_mean": 0.0111} in default
    assert {"family": "fp8", "bytes_per_token": 9216, "perplexity": 13.04, "kl_mean": 0.0094} in gemma
    assert not any(row["family"] == "SnapKV" for row in default + gemma)  # it has no figures of all text
    assert {row["family"] for row in default} >= {"tq_vllm", "tq_vllm, prod", "KIVI", "PolarQuant"}


def test_a_document_without_the_table_is_refused():
    with pytest.raises(ValueError, match="got 0, allowed 1"):
        plots.document_rows("| cache | bytes/token |")


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in plots.plot({}, tmp_path / "x.svg")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_it_draws(tmp_path):
    path = tmp_path / "x.svg"
    assert plots.plot(plots.document_rows(DOCUMENT), path) == f"Plots: {path}"
    assert "<svg" in path.read_text()
