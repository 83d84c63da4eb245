"""The plot of kernel times."""

import importlib.util
import json

import kernel_plot
import pytest

ROWS = [
    {"name": "turboquant 32x8192", "of_copy": 0.76, "fa3_bf16_ratio": 3.0, "fa3_fp8_ratio": 1.8, "tq4_ratio": 11.4},
    {"name": "turboquant 8x1024", "of_copy": 0.2, "fa3_bf16_ratio": 1.6, "fa3_fp8_ratio": 1.2},  # a rival is missing
]


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"device": "a GPU", "copy": 3e12, "commit": "1234567", "rows": ROWS}))
    return path


@pytest.mark.parametrize("rows", [ROWS, [{"name": "a", "of_copy": 0.5}]], ids=["rivals", "no rivals"])
def test_a_png_stands_beside_the_json(results, rows):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results.write_text(json.dumps(json.loads(results.read_text()) | {"rows": rows}))
    assert kernel_plot.plot(results) == f"Plot: {results.with_suffix('.png')}"
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so(results, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernel_plot.plot(results) == kernel_plot.NO_MATPLOTLIB
    assert not results.with_suffix(".png").exists()
