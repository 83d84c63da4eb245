"""Plots of a run, with matplotlib where it is installed: one bar chart a figure, or curves against concurrency."""

import importlib.util
from pathlib import Path

from engine_bench.rows import PERCENTILES

NO_MATPLOTLIB = "No plots: they need matplotlib (pip install matplotlib)."


def _figure(num_panels: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, num_panels, figsize=(5 * num_panels, 4), squeeze=False)
    return figure, list(axes[0])


def _bars(axis, rows: list[dict], figure: str, title: str) -> None:
    rows = [row for row in rows if row.get(figure) is not None]
    bars = axis.bar([row["dtype"] for row in rows], [row[figure] for row in rows])
    axis.bar_label(bars, fmt="%.4g")
    axis.tick_params(axis="x", rotation=20)
    axis.set_title(title)


def _save(figure, path: Path) -> str:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return f"Plots: {path}"


def plot_rows(rows: list[dict], columns: list, path: Path) -> str:
    """Draw one panel a column and one of the tokens that fit; returns a sentence for the reader."""
    if importlib.util.find_spec("matplotlib") is None:
        return NO_MATPLOTLIB
    figure, axes = _figure(len(columns) + 1)
    for axis, column in zip(axes, columns, strict=False):
        _bars(axis, rows, column.figure, column.title)
    _bars(axes[-1], rows, "kv_tokens", "KV tokens that fit")
    return _save(figure, path)


def plot_serve(rows: list[dict], path: Path) -> str:
    """Draw throughput against concurrency, TTFT and TPOT percentiles, the Pareto front and the tokens that fit."""
    if importlib.util.find_spec("matplotlib") is None:
        return NO_MATPLOTLIB
    figure, (throughput, ttft, tpot, pareto, fit) = _figure(5)
    ok = [row for row in rows if row["status"] == "ok"]
    for dtype in dict.fromkeys(row["dtype"] for row in ok):
        mine = sorted((row for row in ok if row["dtype"] == dtype), key=lambda row: row["concurrency"] or 0)
        at = [row["concurrency"] or row["num_prompts"] for row in mine]
        line = throughput.plot(at, [row["output_tokens_per_s"] for row in mine], marker="o", label=dtype)[0]
        for axis, metric in ((ttft, "ttft"), (tpot, "tpot")):
            for p, style in zip(PERCENTILES, ("-", "--", ":"), strict=True):
                values = [row[f"{metric}_p{p}_ms"] for row in mine]
                axis.plot(at, values, style, marker=".", color=line.get_color(), label=f"{dtype} p{p}")
        speeds = [1e3 / row["tpot_p50_ms"] if row["tpot_p50_ms"] else 0 for row in mine]
        pareto.plot(speeds, [row["output_tokens_per_s"] for row in mine], marker="o", label=dtype)
    for axis, title, label in (
        (throughput, "Output tokens/s", "concurrency"),
        (ttft, "TTFT, ms", "concurrency"),
        (tpot, "TPOT, ms", "concurrency"),
        (pareto, "Output tokens/s against speed of one user", "tokens/s of one user (1 / median TPOT)"),
    ):
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.legend(fontsize="x-small")
    _bars(fit, list({row["dtype"]: row for row in ok}.values()), "kv_tokens", "KV tokens that fit")
    return _save(figure, path)
