"""One row a cache format: figures against the reference run of the same model on the same tokens."""

import statistics
from collections.abc import Callable

from tq_vllm.quality.gate import RefusedError
from tq_vllm.quality.metrics import compare_text, divergence_point
from tq_vllm.quality.process import EngineFailedError, Result

COLUMNS = ["cache", "bytes/token", "perplexity", "KL", "KL p99", "top-1 %", "greedy", "needles", "copy %", "look-up %"]
LEGEND = (
    "KL: nats to the reference, mean and 99th percentile over the positions of text. top-1: positions with the same "
    "most likely token. greedy: tokens until a continuation differs, median (all: never). needles: found of all."
)


def make_row(name: str, run: Callable[[], Result], reference: Result | None) -> tuple[dict, Result | None]:
    """Run an engine and compare it; returns the row and the result (None if it has no figures).

    The row has `status` "ok", "refused" (by the gate) or "failed", and a `reason` unless ok.
    """
    try:
        result = run()
    except RefusedError as refusal:
        return {"cache": name, "status": "refused", "reason": str(refusal)}, None
    except EngineFailedError as failure:
        return {"cache": name, "status": "failed", "reason": str(failure)}, None
    return {"cache": name, "status": "ok", **figures(result, reference or result)}, result


def figures(result: Result, reference: Result) -> dict:
    """All figures of a run; see docs/quality.md for what each means."""
    report = result.report
    row = {key: report[key] for key in ("bytes_per_token", "dtype", "attention", "kv_tokens", "seconds")}
    row |= compare_text(reference.text, result.text, report["vocab_size"])
    if pairs := list(zip(reference.report["continuations"], report["continuations"], strict=False)):
        row["divergence"] = [divergence_point(a, b) for a, b in pairs]
        row["greedy_tokens"] = len(pairs[0][0])
    by_kind = {kind: [a for a in report["answers"] if a["kind"] == kind] for kind in ("needle", "copy", "lookup")}
    row["needles"] = {a["name"]: set(a["ranks"]) == {1} for a in by_kind["needle"]}
    for kind, answers in by_kind.items():
        if answers:
            ranks = [rank for a in answers for rank in a["ranks"]]
            row[f"{kind}_accuracy"] = sum(rank == 1 for rank in ranks) / len(ranks)
            row[f"{kind}_nats"] = -statistics.fmean(p for a in answers for p in a["logprobs"])
    return row


def cells(row: dict) -> list[str]:
    """A row of the table; "-" where there is no figure."""
    if row["status"] != "ok":
        return [row["cache"], *["-"] * (len(COLUMNS) - 1)]
    divergence = row.get("divergence")
    point = statistics.median(divergence) if divergence else None
    return [
        row["cache"],
        f"{row['bytes_per_token']:,.0f}",
        f"{row['perplexity']:.3f}",
        f"{row['kl_mean']:.5f}",
        f"{row['kl_p99']:.4f}",
        f"{100 * row['top1']:.1f}",
        "-" if point is None else "all" if point == row["greedy_tokens"] else f"{point:.0f}",
        f"{sum(row['needles'].values())}/{len(row['needles'])}" if row["needles"] else "-",
        *(f"{100 * row[key]:.1f}" if key in row else "-" for key in ("copy_accuracy", "lookup_accuracy")),
    ]


def needle_grid(row: dict) -> str:
    """The needle grid as one line: a length and, from depth 0 to 1, + found or . missed."""
    grid: dict[str, str] = {}
    for name, found in row["needles"].items():
        length = name.split(" @ ")[0]
        grid[length] = grid.get(length, "") + ("+" if found else ".")
    return "  ".join(f"{length} {marks}" for length, marks in grid.items())
