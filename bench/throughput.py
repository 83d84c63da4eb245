"""Tokens per second without a server: vLLM's own `vllm bench throughput` and `latency`, one process a cache dtype.

python bench/throughput.py --workload main --shape llama-3.1-8b
python bench/throughput.py --dtypes auto,turboquant -- --num-prompts 8 --random-input-len 256 --random-output-len 32

What follows `--` goes to vLLM unchanged. Every engine has the same memory, requests and seed, and passes a gate before
it is timed: the attention class of its dtype, and a greedy answer (dummy weights: finite log-probabilities). The decode
phase is the time beyond that of the same prompts answered with one token each, measured afterwards in the same engine.
"""

import argparse
import json
import sys
from pathlib import Path

from engine_bench.options import VLLM, Setup, add_options, check_vllm_flags, shown, split_flags
from engine_bench.plots import plot_rows
from engine_bench.process import EngineProcess, RowFailedError, kv_tokens
from engine_bench.rows import (
    Column,
    add_ratios,
    latency_figures,
    predicted_tokens,
    provenance,
    table,
    throughput_figures,
    write_json,
)

from tq_vllm.cli.table import print_table

COLUMNS = {
    "throughput": [
        Column("output tok/s", "output_tokens_per_s", ".1f", compared=True),
        Column("decode tok/s", "decode_tokens_per_s", ".1f", compared=True),
        Column("prefill s", "prefill_s", ".2f"),
    ],
    "latency": [
        Column("output tok/s", "output_tokens_per_s", ".1f"),
        Column("TTFT ms", "ttft_ms", ".1f", compared=True),
        Column("TPOT ms", "tpot_ms", ".2f", compared=True),
    ],
}


def bench_command(setup: Setup, command: str, dtype: str, vllm_flags: list[str], result: Path) -> list[str]:
    """The `vllm bench` command of a row; flags given by the user come last and win."""
    workload = setup.workload.offline_flags() if setup.workload else []
    return [
        *VLLM, "bench", command, "--model", setup.model, "--seed", str(setup.options.seed),
        *setup.engine_flags(dtype), *workload, *vllm_flags, "--output-json", str(result),
    ]  # fmt: skip


def measure(setup: Setup, command: str, dtype: str, vllm_flags: list[str], number: int) -> dict:
    """Run one dtype. The row has `status` "ok", "refused" (by the gate) or "failed", and a `reason` unless ok."""
    out, stem = setup.options.out, f"{command}-{dtype.replace(':', '_')}"
    paths = {name: out / f"{stem}.{name}" for name in ("result.json", "report.json", "settings.json", "log")}
    for path in paths.values():
        path.unlink(missing_ok=True)
    settings = {"kv_cache_dtype": dtype, "dummy": setup.dummy, "seed": setup.options.seed}
    settings |= {"report": str(paths["report.json"].resolve())}
    settings |= {"question": setup.options.question, "answer": setup.options.answer}
    paths["settings.json"].write_text(json.dumps(settings))
    words = bench_command(setup, command, dtype, vllm_flags, paths["result.json"].resolve())
    row = {"dtype": dtype, "status": "ok", "command": shown(words), "note": setup.capture_note(dtype)}
    gated = [sys.executable, "-m", "engine_bench.offline", str(paths["settings.json"]), *words[len(VLLM) :]]
    title = f"[{number}/{len(setup.dtypes)}] {dtype}"
    with EngineProcess(title, gated, paths["log"], setup.options.timeout, setup.environment()) as process:
        try:
            log = process.wait()
            report, result = (json.loads(paths[name].read_text()) for name in ("report.json", "result.json"))
            if command == "throughput":
                row |= throughput_figures(log, result, report)
            else:
                row |= latency_figures(result, report)
            row["kv_tokens"] = kv_tokens(log)
            row["kv_tokens_predicted"] = predicted_tokens(setup.model, dtype, setup.memory_bytes, setup.device, report)
            row["engine"] = report
            process.status.end(f"{row['output_tokens_per_s']:.1f} output tokens/s; {report['attention']}")
        except (RowFailedError, ValueError, OSError) as failure:
            row |= {"status": "failed", "reason": str(failure)}
            report = json.loads(paths["report.json"].read_text()) if paths["report.json"].exists() else {}
            if "refused" in report:
                row |= {"status": "refused", "reason": report["refused"]}
            process.status.end(f"{row['status']}: {row['reason'][:200]}")
    return row


def main(argv: list[str]) -> int:
    """0 if every row has figures, 1 if one was refused or failed, 2 for a wrong command line."""
    own, *parts = split_flags(argv)
    vllm_flags = parts[0] if parts else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--command", choices=COLUMNS, help="of `vllm bench` (default: the workload's, or throughput)")
    options = parser.parse_args(own)
    try:
        if len(parts) > 1:
            raise ValueError("more than one `--`: this benchmark runs one command of vLLM, everything after the first "
                             "goes to it.")  # fmt: skip
        check_vllm_flags(vllm_flags)
        setup = Setup(options)
        command = options.command or (setup.workload.offline_command if setup.workload else "throughput")
    except ValueError as error:
        parser.error(str(error))
    name = options.workload or "own flags"
    title = f"vllm bench {command}, {name}, {setup.name}, {setup.memory_bytes / 2**30:g} GiB of KV cache"
    header = provenance() | {"benchmark": command, "workload": name, "model": setup.name, "device": setup.device}
    path, rows = options.out / f"{command}-{options.workload or 'custom'}.json", []
    columns = COLUMNS[command]
    for number, dtype in enumerate(setup.dtypes, 1):
        rows.append(measure(setup, command, dtype, vllm_flags, number))
        add_ratios(rows, [column.figure for column in columns if column.compared])
        write_json(path, header, rows)
    print_table(title, *table(rows, columns))
    print(f"JSON: {path}. {plot_rows(rows, columns, path.with_suffix('.png'))}")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
