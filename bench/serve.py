"""Serving, as users measure it: a real `vllm serve` and vLLM's own `vllm bench serve`, one server a cache dtype.

python bench/serve.py --workload 8x32k --shape llama-3.1-8b
python bench/serve.py --dtypes auto,turboquant --concurrency 1,4 -- --max-model-len 1024 -- --num-prompts 8

What follows the first `--` goes to `vllm serve`, what follows the second to `vllm bench serve`, unchanged. Every server
has the same memory, requests and seed, and passes a gate before it is timed: the attention class of its dtype, and a
greedy answer (dummy weights: finite log-probabilities). The prefix cache is emptied before each concurrency.
"""

import argparse
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from engine_bench.gate import (
    DUMMY_PROMPT,
    GATE_TOKENS,
    GateRefusedError,
    check_answer,
    check_attention,
    check_logprobs,
)
from engine_bench.options import VLLM, Setup, add_options, check_vllm_flags, shown, split_flags
from engine_bench.plots import plot_serve
from engine_bench.process import EngineProcess, RowFailedError, kv_tokens
from engine_bench.rows import (
    PERCENTILES,
    Column,
    add_ratios,
    predicted_tokens,
    provenance,
    serve_figures,
    table,
    write_json,
)

from tq_vllm.cli.table import print_table

HOST = "127.0.0.1"
SERVED_NAME = "bench"
COLUMNS = [
    Column("at a time", "concurrency", "d"),
    Column("output tok/s", "output_tokens_per_s", ".1f", compared=True),
    *(Column(f"TTFT p{p} ms", f"ttft_p{p}_ms", ".1f", compared=p == 50) for p in PERCENTILES),
    *(Column(f"TPOT p{p} ms", f"tpot_p{p}_ms", ".2f", compared=p == 50) for p in PERCENTILES),
]


def server_command(setup: Setup, dtype: str, port: int, vllm_flags: list[str]) -> list[str]:
    """The `vllm serve` command of a row; flags given by the user come last and win."""
    return [
        *VLLM, "serve", setup.model, "--served-model-name", SERVED_NAME, "--host", HOST, "--port", str(port),
        "--seed", str(setup.options.seed), *setup.engine_flags(dtype), *vllm_flags,
    ]  # fmt: skip


def client_command(setup: Setup, port: int, concurrency: int | None, vllm_flags: list[str], result: Path) -> list[str]:
    """The `vllm bench serve` command of a row; flags given by the user come last and win."""
    workload = setup.workload.client_flags() if setup.workload else ["--dataset-name", "random"]
    return [
        *VLLM, "bench", "serve", "--backend", "vllm", "--base-url", f"http://{HOST}:{port}", "--model", SERVED_NAME,
        "--tokenizer", setup.model, "--seed", str(setup.options.seed), "--temperature", "0", *workload,
        *(["--max-concurrency", str(concurrency)] if concurrency else []), *vllm_flags,
        "--percentile-metrics", "ttft,tpot", "--metric-percentiles", ",".join(map(str, PERCENTILES)),
        "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip


class Client:
    """HTTP requests to the server under test."""

    def __init__(self, port: int):
        self.url = f"http://{HOST}:{port}"

    def post(self, path: str, body: dict) -> dict:
        """The parsed answer. Raises: GateRefusedError with the server's words for any other status than 200."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.loads(response.read() or "{}")
        except urllib.error.HTTPError as error:
            words = error.read()[:300].decode(errors="replace")
            raise GateRefusedError(f"{path} answered {error.code}: {words}") from None

    def is_ready(self) -> bool:
        """Whether /health says 200."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as response:
                return response.status == 200
        except OSError:  # not listening yet
            return False


def check_server(client: Client, setup: Setup, dtype: str) -> dict:
    """The gate on a running server; returns the worker's report with `attention` and `answer`.

    Raises:
        GateRefusedError: see gate.py.
    """
    report = client.post("/collective_rpc", {"method": "attention_report"})["results"][0]
    report["attention"] = check_attention(dtype, report.pop("layers"))
    request = {"model": SERVED_NAME, "temperature": 0, "max_tokens": GATE_TOKENS}
    if setup.dummy:
        body = request | {"prompt": DUMMY_PROMPT, "logprobs": 1, "ignore_eos": True}
        choice = client.post("/v1/completions", body)["choices"][0]
        report["answer"] = check_logprobs(choice["logprobs"]["token_logprobs"])
    else:
        messages = [{"role": "user", "content": setup.options.question}]
        try:
            choice = client.post("/v1/chat/completions", request | {"messages": messages})["choices"][0]
            text = choice["message"]["content"]
        except GateRefusedError as refusal:
            if "template" not in str(refusal):
                raise
            choice = client.post("/v1/completions", request | {"prompt": setup.options.question})["choices"][0]
            text = choice["text"]
        report["answer"] = check_answer(text, setup.options.answer)
    return report


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def measure(
    setup: Setup, dtype: str, flags: tuple[list[str], list[str]], concurrencies: list[int | None], number: int
) -> list[dict]:
    """Rows of one dtype, one a concurrency; a single row with `status` and `reason` where there are no figures."""
    out, port, stem = setup.options.out.resolve(), free_port(), f"serve-{dtype.replace(':', '_')}"
    command, client = server_command(setup, dtype, port, flags[0]), Client(port)
    common = {"dtype": dtype, "server_command": shown(command), "note": setup.capture_note(dtype)}
    environment = setup.environment() | {"VLLM_SERVER_DEV_MODE": "1"}  # /collective_rpc and /reset_prefix_cache
    title, rows, failure = f"[{number}/{len(setup.dtypes)}] {dtype}", [], None
    with EngineProcess(title, command, out / f"{stem}.log", setup.options.timeout, environment) as server:
        try:
            while not client.is_ready():
                if not server.running():
                    server.wait()
                    raise RowFailedError("the server ended before it answered")
                time.sleep(0.5)
            report = check_server(client, setup, dtype)
            fit = kv_tokens(server.text())
            predicted = predicted_tokens(setup.model, dtype, setup.memory_bytes, setup.device, report)
            server.status.end(f"server checked after {server.status.elapsed():.0f} s; {report['attention']}")
            for concurrency in concurrencies:
                client.post("/reset_prefix_cache", {})
                result = out / f"{stem}-{concurrency or 'all'}.json"
                result.unlink(missing_ok=True)
                words = client_command(setup, port, concurrency, flags[1], result)
                row = common | {"status": "ok", "client_command": shown(words), "concurrency": concurrency}
                row |= {"kv_tokens": fit, "kv_tokens_predicted": predicted, "engine": report}
                log = result.with_suffix(".log")
                name = f"{title}, {concurrency or 'all'} at a time"
                with EngineProcess(name, words, log, setup.options.timeout, setup.environment()) as bench:
                    bench.wait()
                    found = json.loads(result.read_text())
                    rows.append(row | serve_figures(found) | {"num_prompts": found["num_prompts"]})
                    bench.status.end(f"{found['output_throughput']:.1f} output tokens/s")
        except GateRefusedError as refusal:
            failure = {"status": "refused", "reason": str(refusal)}
        except (RowFailedError, ValueError, KeyError, OSError) as error:
            failure = {"status": "failed", "reason": str(error)}
        if failure:
            server.status.end(f"{failure['status']}: {failure['reason'][:200]}")
            rows.append(common | failure)
    return rows


def main(argv: list[str]) -> int:
    """0 if every row has figures, 1 if one was refused or failed, 2 for a wrong command line."""
    own, *parts = split_flags(argv)
    flags = (parts[0] if parts else [], parts[1] if len(parts) > 1 else [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--concurrency", help="requests at a time, comma-separated (default: the workload's, or all)")
    options = parser.parse_args(own)
    try:
        if len(parts) > 2:
            raise ValueError("more than two `--`: the first begins flags of vllm serve, the second of `vllm bench`.")
        check_vllm_flags(flags[0] + flags[1])
        setup = Setup(options)
        default = setup.workload.batch if setup.workload else None
        concurrencies = [int(n) for n in options.concurrency.split(",")] if options.concurrency else [default]
    except ValueError as error:
        parser.error(str(error))
    name = options.workload or "own flags"
    title = f"vllm bench serve, {name}, {setup.name}, {setup.memory_bytes / 2**30:g} GiB of KV cache"
    header = provenance() | {"benchmark": "serve", "workload": name, "model": setup.name, "device": setup.device}
    path, rows = options.out / f"serve-{options.workload or 'custom'}.json", []
    for number, dtype in enumerate(setup.dtypes, 1):
        rows += measure(setup, dtype, flags, concurrencies, number)
        add_ratios(rows, [column.figure for column in COLUMNS if column.compared])
        write_json(path, header, rows)
    print_table(title, *table(rows, COLUMNS))
    print(f"JSON: {path}. {plot_serve(rows, path.with_suffix('.png'))}")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
