"""KL and perplexity against real bytes per token, one curve a family, with matplotlib where it is installed."""

import importlib.util
from pathlib import Path

NO_MATPLOTLIB = "No plots: they need matplotlib (pip install matplotlib)."


def plot(rows: list[dict], path: Path) -> str:
    """Draw the rows that have figures of all text; returns a sentence for the reader."""
    if importlib.util.find_spec("matplotlib") is None:
        return NO_MATPLOTLIB
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    rows = [row for row in rows if row.get("kl_mean") is not None]
    for axis, key, title in zip(axes, ("kl_mean", "perplexity"), ("mean KL, nats", "perplexity"), strict=True):
        for family in dict.fromkeys(row["family"] for row in rows):
            mine = sorted((row for row in rows if row["family"] == family), key=lambda row: row["bytes_per_token"])
            mine = [row for row in mine if row[key] > 1e-6]  # the reference has no KL, and the axis is logarithmic
            axis.plot([row["bytes_per_token"] for row in mine], [row[key] for row in mine], marker="o", label=family)
        axis.set(xlabel="bytes per token", ylabel=title, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return f"Plots: {path}"
