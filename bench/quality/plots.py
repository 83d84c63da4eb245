"""KL and perplexity against real bytes per token, one curve a method, with matplotlib where it is installed.

    pip install matplotlib
    python bench/quality/plots.py docs/quality.md docs/quality.svg

draws the figures of the table under "Rivals on the same tokens". table.py draws what it measures as table.png.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

NO_MATPLOTLIB = "No plots: they need matplotlib (pip install matplotlib)."
HEADER = "| cache | bytes/token | perplexity | KL |"
MODELS = ("SmolLM2-135M-Instruct", "Gemma 3 270M")  # left and right part of the document's table
COLUMNS = 6  # of one part


def family_of(name: str) -> str:
    """The curve of a row in the plots."""
    if name.startswith("turboquant:prod"):
        return "tq_vllm, prod"
    if name.startswith("turboquant:") and name.endswith("-r128"):
        return "tq_vllm, newest 128 finer"
    if name.startswith("turboquant"):
        return "tq_vllm"
    if name.startswith("TurboQuant paper"):
        return "TurboQuant paper, QJL keys" if "QJL" in name else "TurboQuant paper"
    if name.startswith("vLLM turboquant"):
        return "vLLM's turboquant_*"
    return name.split(",")[0].split(" ")[0]


def document_rows(text: str) -> dict[str, list[dict]]:
    """Return the rows by model of the table in docs/quality.md that have a perplexity and a KL.

    Raises:
        ValueError: the table is not there.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(HEADER) and "Gemma" in line]
    if len(starts) != 1:
        raise ValueError(f"Tables that begin with {HEADER!r} and have Gemma's columns: got {len(starts)}, allowed 1.")
    models: dict[str, list[dict]] = {model: [] for model in MODELS}
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip().strip("`").replace(",", "") for cell in line.strip("|").split("|"))
        for i, model in enumerate(MODELS):
            size, perplexity, kl = cells[COLUMNS * i : COLUMNS * i + 3]
            if perplexity and kl:
                row = {"family": family_of(name), "bytes_per_token": float(size)}
                models[model].append(row | {"perplexity": float(perplexity), "kl_mean": float(kl)})
    return models


def plot(models: dict[str, list[dict]], path: Path) -> str:
    """Draw the rows of every model that have figures of all text, a line of plots a model; return a sentence about it.

    Args:
        models: name -> rows with "family", "bytes_per_token" and, of all text, "kl_mean" (nats) and "perplexity".
    """
    if importlib.util.find_spec("matplotlib") is None:
        return NO_MATPLOTLIB
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = dict.fromkeys(row["family"] for rows in models.values() for row in rows)  # each looks alike everywhere
    looks = dict(zip(families, zip(itertools.cycle("osv^Dp*X"), map("C{}".format, itertools.count())), strict=False))
    figure, lines = pyplot.subplots(len(models), 2, figsize=(12, 5 * len(models)), squeeze=False)
    for axes, (model, rows) in zip(lines, models.items(), strict=True):
        rows = [row for row in rows if (row.get("kl_mean") or 0) > 1e-6]  # the axis is logarithmic
        for axis, key, title in zip(axes, ("kl_mean", "perplexity"), ("mean KL, nats", "perplexity"), strict=True):
            for family in dict.fromkeys(row["family"] for row in rows):
                mine = sorted((row for row in rows if row["family"] == family), key=lambda row: row["bytes_per_token"])
                sizes, figures = [row["bytes_per_token"] for row in mine], [row[key] for row in mine]
                marker, colour = looks[family]
                axis.plot(sizes, figures, marker=marker, color=colour, label=family)
            axis.set(xlabel="bytes per token", ylabel=title, yscale="log", title=model)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    return f"Plots: {path}"


if __name__ == "__main__":
    print(plot(document_rows(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
