"""Plot of what bench/kernels.py wrote, with matplotlib where it is installed: python bench/kernel_plot.py FILE.json."""

import argparse
import importlib.util
import json
from pathlib import Path

NO_MATPLOTLIB = "No plot: it needs matplotlib (pip install matplotlib)."
RIVALS = {"fa3_bf16": "FlashAttention 3, bf16", "fa3_fp8": "FlashAttention 3, fp8", "tq4": "turboquant_4bit_nc"}


def plot(results: Path) -> str:
    """Draw share of copy bandwidth and ratios to rivals into a PNG beside `results`; returns a sentence to print."""
    if importlib.util.find_spec("matplotlib") is None:
        return NO_MATPLOTLIB
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head = json.loads(results.read_text())
    rows = head["rows"][::-1]  # barh draws upwards
    rivals = {name: label for name, label in RIVALS.items() if any(f"{name}_ratio" in row for row in rows)}
    figure, axes = pyplot.subplots(
        1, 1 + len(rivals), figsize=(5 + 3 * len(rivals), 1.2 + 0.28 * len(rows)), sharey=True, squeeze=False
    )
    share, *over = axes[0]
    share.barh([row["name"] for row in rows], [100 * row["of_copy"] for row in rows], color="tab:blue")
    share.set(title="% of copy bandwidth", xlim=(0, 100))
    for axis, (name, label) in zip(over, rivals.items(), strict=True):
        axis.barh([row["name"] for row in rows], [row.get(f"{name}_ratio", 0) for row in rows], color="tab:green")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=f"times {label}")
    figure.suptitle(f"{head['device']}, copy {head['copy'] * 1e-12:.2f} TB/s, {head['commit']}")
    figure.tight_layout()
    target = results.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return f"Plot: {target}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="written by bench/kernels.py --json")
    print(plot(parser.parse_args().results))
