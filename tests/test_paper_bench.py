"""The benches of the paper at a tiny size: they run, check themselves, and refuse to print what fails its check."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench" / "paper"


@pytest.fixture
def bench(monkeypatch):
    """A function that loads a script of bench/paper as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"bench_paper_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # a small sphere, so that nothing is slow
        x = torch.randn(2000, 192, generator=torch.Generator().manual_seed(0))
        x = torch.nn.functional.normalize(x, dim=-1)
        monkeypatch.setattr(module.vectors, "load", lambda _, count: x[:count])
        return module

    yield load
    sys.modules.pop("vectors", None)
    torch.set_num_threads(threads)


def test_distortion(bench, tmp_path, capsys):
    distortion, report = bench("distortion"), tmp_path / "report.json"
    assert distortion.main(["--datasets", "synthetic", "--count", "200", "--sketches", "4", "--json", str(report)]) == 0
    assert "not printed" not in capsys.readouterr().out
    lines = json.loads(report.read_text())["lines"]
    measured = {(line["method"], line["bits"]): line["measured"] for line in lines if line["table"] == "distortion"}
    assert measured["mse", 2] == pytest.approx(0.117, rel=0.02)
    assert measured["prod", 2] == pytest.approx(0.57, rel=0.2)
    means = {(line["method"], line["t"]): line["mean"] for line in lines if line["table"] == "inner product"}
    assert means["mse", 0.8] == pytest.approx(-0.8 * 0.117, rel=0.05)
    assert abs(means["prod", 0.8]) < 0.02


def test_distortion_refuses_what_is_away_from_theory(bench, monkeypatch, capsys):
    distortion = bench("distortion")
    monkeypatch.setattr(distortion, "GAUSSIAN", (1.0, 0.36338, 0.15, 0.03454, 0.009497))
    assert distortion.main(["--datasets", "synthetic", "--count", "200", "--sketches", "4"]) == 1
    assert "mse     2  not printed: away from theory or bounds" in capsys.readouterr().out


def test_nearest_rows_of_turboquant(bench):
    """Without faiss: TurboQuant's rows come out, and a row whose scores are wrong does not."""
    nearest = bench("nearest")
    x = nearest.vectors.load("keys", 620)
    x, queries = x[:600], x[600:]
    queries = torch.nn.functional.normalize(queries + x[:20], dim=-1)
    rows = {name: make for name, make in nearest.methods(None, 192, 4).items() if "faiss" not in name}
    assert len(rows) == 4
    for name, make in rows.items():
        row = nearest.measure(make, x, queries, 4, 1)
        assert row["recall"] == sorted(row["recall"]) and row["recall"][-1] > 0.9
        assert row["bytes_per_vector"] == 192 / 2 + (8 if name == "same, centred" else 4)

    class Wrong(nearest.TurboQuant):
        def search(self, queries, k):
            scores, ids = super().search(queries, k)
            return scores * 1.5, ids

    assert nearest.measure(lambda: Wrong(192, 4), x, queries, 4, 1) is None


def test_nearest_without_faiss_says_so(bench, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert bench("nearest").main([]) == 1
    assert capsys.readouterr().err.strip().endswith("which is not installed: `pip install faiss-cpu`.")
