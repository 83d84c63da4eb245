"""Time to first token and per output token of cache dtypes, all workloads in one engine: `python bench/latency.py`.

`vllm bench latency` starts an engine for every workload, which takes longer than the workload itself; here one engine
of stock vLLM serves them all, one process a cache dtype, the same gate as the other benchmarks. Times are taken at the
engine's outputs: the first token of a request, and the time between steps while every request of the batch decodes.
What an engine measured before it failed or ran out of time is kept.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHUNK = 8192  # tokens of a step
PROFILED_STEPS = 32


@dataclass(frozen=True)
class Workload:
    """`batch` requests of input_len random tokens at once; `cached` tokens before them, the same in all, are cached."""

    name: str
    batch: int
    input_len: int
    output_len: int
    cached: int = 0
    repeats: int = 3

    @property
    def seq_len(self) -> int:
        return self.cached + self.input_len + self.output_len


WORKLOADS = [
    Workload("b1-1k", 1, 1024, 128),
    Workload("b8-1k", 8, 1024, 128),
    Workload("8x32k", 8, 32_768, 128, repeats=1),
    Workload("b1-128k", 1, 130_048, 128, repeats=1),
    Workload("prefill-32k", 1, 32_768, 1),
    Workload("prefix-hit", 1, 512, 1, cached=32_768),
]


COLUMNS = {"ttft_ms": ("TTFT ms", ".1f"), "tpot_ms": ("TPOT ms", ".2f"), "decode_tokens_per_s": ("decode tok/s", ".0f")}
COMPARED = ("ttft_ms", "tpot_ms")


def run(engine, workload: Workload, seed: int) -> tuple[float, float | None]:
    """Seconds to the first token (median over requests), and per output token (None for a single one)."""
    import numpy
    from vllm import SamplingParams

    random = numpy.random.default_rng(seed)
    vocab_size = engine.model_config.get_vocab_size()

    def tokens(count: int) -> list[int]:
        return random.integers(10, vocab_size - 10, count).tolist()

    prefix = tokens(workload.cached)
    if prefix:
        answer(engine, "prefix", [prefix], SamplingParams(max_tokens=1, ignore_eos=True))
    prompts = [prefix + tokens(workload.input_len) for _ in range(workload.batch)]
    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
    start, first, last = answer(engine, workload.name, prompts, params)
    to_first = sorted(t - start for t in first.values())[len(first) // 2]
    steps = [t for t in last if max(first.values()) <= t]
    return to_first, (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else None


def answer(engine, name: str, prompts: list[list[int]], params) -> tuple[float, dict[str, float], list[float]]:
    """Serve prompts; the time before, of each request's first token, and of the steps before the first one finished."""
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{i}-{start}", {"prompt_token_ids": prompt}, params.clone())
    first, steps, finished = {}, [], 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now)
            finished += output.finished
        if outputs and not finished:
            steps.append(now)
    return start, first, steps


def profile(engine, workload: Workload) -> dict[str, dict]:
    """Kernels (step_profile.py) up to every request's first token, and of steps in which all of them decode."""
    import numpy
    from engine_bench.step_profile import Kernel, profile_steps, summary
    from vllm import SamplingParams

    def recorded() -> list[Kernel]:
        found = engine.collective_rpc("stop_profile_of_kernels")[0]
        return sorted((Kernel(*kernel) for kernel in found), key=lambda kernel: kernel.start)

    random = numpy.random.default_rng(99)
    vocab_size = engine.model_config.get_vocab_size()
    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
    engine.collective_rpc("start_profile_of_kernels")
    for i in range(workload.batch):
        tokens = random.integers(10, vocab_size - 10, workload.cached + workload.input_len).tolist()
        engine.add_request(f"profile-{i}", {"prompt_token_ids": tokens}, params.clone())
    decoding: set[str] = set()
    while len(decoding) < workload.batch:
        decoding.update(output.request_id for output in engine.step() if output.outputs[0].token_ids)
    profiles = {"to first tokens": summary(recorded())}
    engine.collective_rpc("start_profile_of_kernels")
    for _ in range(PROFILED_STEPS):
        engine.step()
    profiles["decode step"] = profile_steps(recorded(), PROFILED_STEPS)
    while engine.has_unfinished_requests():
        engine.step()
    return profiles


def worker(settings: dict) -> None:
    """One engine: the gate, then every workload; settings["result"] gets the rows so far as JSON after each."""
    from engine_bench.offline import check_engine
    from vllm import LLM

    llm = LLM(
        model=settings["model"], kv_cache_dtype=settings["kv_cache_dtype"], load_format="dummy",
        kv_cache_memory_bytes=settings["memory"], max_num_batched_tokens=CHUNK, max_num_seqs=64,
        enable_prefix_caching=True, worker_extension_cls="engine_bench.worker.AttentionReport",
        enforce_eager=settings["eager"], tensor_parallel_size=settings["tensor_parallel_size"],
        compilation_config={"cudagraph_capture_sizes": sizes} if (sizes := settings["capture_sizes"]) else None,
    )  # fmt: skip
    report = check_engine(llm, settings)
    rows = []
    max_model_len = llm.llm_engine.model_config.max_model_len
    for workload in WORKLOADS:
        if workload.name not in settings["workloads"] or workload.seq_len > max_model_len:
            continue
        times = [run(llm.llm_engine, workload, seed) for seed in range(workload.repeats + 1)]
        times = times[1:] if workload.repeats > 1 else times[-1:]  # the first one warms up
        middle = len(times) // 2
        to_first = sorted(t[0] for t in times)[middle]
        row = {"workload": workload.name, "ttft_ms": to_first * 1e3}
        if times[0][1] is not None:
            per_token = sorted(t[1] for t in times)[middle]
            row |= {"tpot_ms": per_token * 1e3, "decode_tokens_per_s": workload.batch / per_token}
            if settings["profile"]:
                row["profile"] = profile(llm.llm_engine, workload)
        rows.append(row)
        Path(settings["result"]).write_text(json.dumps({"attention": report["attention"], "rows": rows}))


def table(found: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a row a workload and dtype, with ratios to auto and fp8; "-" where there is no figure.

    Args:
        found: dtype -> {"rows": [{"workload", and of COLUMNS what was measured}]}.
    """
    from engine_bench.rows import BASES, add_ratios

    header = ["workload", "cache"]
    for figure, (title, _) in COLUMNS.items():
        header += [title, *(f"x {base}" for base in BASES if figure in COMPARED)]
    rows = [{"dtype": dtype, **row} for dtype, report in found.items() for row in report["rows"]]
    cells = []
    for workload in WORKLOADS:
        same = [row for row in rows if row["workload"] == workload.name]
        add_ratios(same, list(COMPARED))
        for row in same:
            cells.append([workload.name, row["dtype"]])
            for figure, (_, form) in COLUMNS.items():
                cells[-1].append(format(row[figure], form) if figure in row else "-")
                for base in BASES if figure in COMPARED else ():
                    ratio = row["ratios"].get(figure, {}).get(base)
                    cells[-1].append("-" if ratio is None else f"{ratio:.2f}")
    return header, cells


def main() -> None:
    import torch
    from engine_bench.options import SLOW_TO_CAPTURE
    from engine_bench.process import BENCH_DIRECTORY, EngineProcess, RowFailedError
    from engine_bench.rows import provenance
    from engine_bench.shapes import SHAPES, write_shape
    from engine_bench.step_profile import step_table

    from tq_vllm.cli.capacity import parse_memory
    from tq_vllm.cli.table import print_table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--dtypes", default="auto,fp8,turboquant")
    names = ",".join(workload.name for workload in WORKLOADS)
    parser.add_argument("--workloads", default=names, help=f"comma-separated, of {names}; too long ones are left out")
    parser.add_argument("--kv-cache-memory", default="36GiB", help="of every engine, on each GPU (default 36GiB)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of an engine (default 1)")
    parser.add_argument("--capture-sizes", help="CUDA graph capture sizes, comma-separated, for the dtypes of vLLM "
                        f"that hang while capturing all ({', '.join(SLOW_TO_CAPTURE)}), as 1,2,4,8,16")  # fmt: skip
    parser.add_argument("--profile", action="store_true",
                        help="also show kernels and gaps to the first token and of a decode step")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=900, help="seconds one dtype may take")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    if options.profile and not torch.cuda.is_available():
        parser.error("--profile records kernels of a GPU, and there is none: leave it out.")
    options.out.mkdir(parents=True, exist_ok=True)
    model = str(write_shape(options.shape, Path(tempfile.gettempdir()) / "tq_vllm_shapes"))
    found: dict[str, dict] = {}
    notes = []
    for dtype in options.dtypes.split(","):
        result, log = options.out / f"latency-{dtype}.rows.json", options.out / f"latency-{dtype}.log"
        result.unlink(missing_ok=True)
        short = options.capture_sizes if dtype in SLOW_TO_CAPTURE else None
        settings = {"model": model, "kv_cache_dtype": dtype, "memory": parse_memory(options.kv_cache_memory),
                    "dummy": True, "workloads": options.workloads.split(","), "result": str(result.resolve()),
                    "eager": not torch.cuda.is_available(), "tensor_parallel_size": options.tensor_parallel_size,
                    "profile": options.profile,
                    "capture_sizes": [int(size) for size in short.split(",")] if short else None}  # fmt: skip
        command = [sys.executable, str(BENCH_DIRECTORY / "latency.py"), "--worker", json.dumps(settings)]
        status = "done"
        with EngineProcess(dtype, command, log, options.timeout, {"HF_HUB_OFFLINE": "1"}) as process:
            try:
                process.wait()
            except RowFailedError as failure:
                status = f"failed: {str(failure)[:200]}"
                notes.append(f"{dtype} {status}")
            process.status.end(status)
        if result.exists():
            found[dtype] = json.loads(result.read_text()) | {"status": status, "capture_sizes": short}
            notes.append(f"{dtype}: {found[dtype]['attention']}"
                         + (f"; CUDA graphs for batches of {short} only" if short else ""))  # fmt: skip
        settings = {"shape": options.shape, "tensor_parallel_size": options.tensor_parallel_size}
        (options.out / "latency.json").write_text(json.dumps(provenance() | settings | {"dtypes": found}, indent=2))
    gpus = f"tensor parallel {options.tensor_parallel_size}, {options.kv_cache_memory} of KV cache on each GPU"
    print_table(f"{options.shape}, {gpus}", *table(found), notes)
    for dtype, report in found.items():
        for row in report["rows"]:
            for what, found_profile in row.get("profile", {}).items():
                title = f"{row['workload']}, {dtype}, {what}: " + "{us:.0f} us (mean of {steps}), {idle_us:.0f} idle"
                print_table(title.format(**found_profile), *step_table(found_profile), [])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.path.insert(0, str(Path(__file__).parent))
        worker(json.loads(sys.argv[2]))
    else:
        main()
