"""`tq-vllm eval`: what a cache format costs a model in quality, on real vLLM, against the uncompressed cache."""

import argparse
import json
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tq_vllm.cli.capacity import parse_memory
from tq_vllm.cli.config_file import read_config
from tq_vllm.cli.demo_model import NAME, demo_model
from tq_vllm.cli.model_config import model_shape
from tq_vllm.cli.progress import StatusLine
from tq_vllm.cli.table import print_table
from tq_vllm.config import PRESETS

CHUNK, OTHER_CHUNK = 16, 64  # tokens of its prompt that a request reads in a step
TOP = 1000
CPU_MEMORY = "1GiB"


def add_parser(commands) -> None:
    parser = commands.add_parser("eval", help="measure what a cache format costs in quality", description=__doc__)
    parser.add_argument("model", nargs="?", help=f"directory or Hugging Face name (default: the embedded {NAME})")
    parser.add_argument("--kv-cache-dtype", nargs="+", metavar="NAME",
                        default=["fp8", *(name for name in PRESETS if name != "turboquant:k4v4")],  # = turboquant
                        help="formats to measure beside auto (default: fp8 and every preset)")  # fmt: skip
    parser.add_argument("--size", choices=("ci", "small", "full"),
                        help="how much text and how many tasks (default: small on a CPU, full on a GPU)")  # fmt: skip
    parser.add_argument("--needles", nargs="+", type=int, metavar="TOKENS",
                        help="lengths of text around a needle (default: those of the size)")  # fmt: skip
    parser.add_argument("--text-only", action="store_true", help="perplexity, KL and top-1 alone, no tasks")
    parser.add_argument("--dtype", help="of the model (default: float32 on a CPU, the checkpoint's on a GPU)")
    parser.add_argument("--kv-cache-memory", type=parse_memory, metavar="SIZE",
                        help=f"of every engine (default: {CPU_MEMORY} on a CPU, vLLM's own on a GPU)")  # fmt: skip
    parser.add_argument("--enforce-eager", action="store_true",
                        help="as vLLM's: engines without torch.compile and CUDA graphs start sooner")  # fmt: skip
    parser.add_argument("--top", type=int, default=TOP, metavar="K",
                        help=f"log-probabilities kept at a position, -1: all (default {TOP})")  # fmt: skip
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep vLLM's logs there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 if every format has figures, 1 if one was refused or failed."""
    from tq_vllm.quality.rows import COLUMNS, LEGEND, cells, needle_grid
    from tq_vllm.quality.text import text_note

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the engine ends with this process, as on Ctrl-C
    directory = arguments.logs or Path(tempfile.mkdtemp(prefix="tq_vllm_eval_"))
    directory.mkdir(parents=True, exist_ok=True)
    rows, settings = measure(arguments, directory)
    failed = any(row["status"] != "ok" for row in rows)
    if arguments.json:
        print(json.dumps({**settings, "text": text_note(), "rows": rows}, indent=2))
        return int(failed)
    notes = [LEGEND, text_note()]
    notes += [f"needles, {row['cache']}: {needle_grid(row)}" for row in rows if row.get("needles")]
    notes += [f"{row['cache']} {row['status']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    if left_out := settings["needles_left_out"]:
        notes.append(f"Needles in {left_out} tokens are left out: the model's sequences are shorter.")
    title = f"{settings['model']}, size {settings['size']}, {CHUNK} tokens of a prompt a step"
    print_table(title, COLUMNS, [cells(row) for row in rows], [*notes, f"vLLM's logs: {directory}"])
    return int(failed)


def measure(arguments: argparse.Namespace, directory: Path) -> tuple[list[dict], dict]:
    """Rows of the reference, of its noise floor and of every format, and the settings that all have in common."""
    import torch

    from tq_vllm.quality.process import engine_arguments, run_engine
    from tq_vllm.quality.rows import make_row
    from tq_vllm.quality.tasks import AROUND_NEEDLE, SIZES, longest_sequence

    cuda = torch.cuda.is_available()
    size_name = arguments.size or ("full" if cuda else "small")
    size = SIZES[size_name]
    if arguments.needles:
        size = replace(size, needle_lengths=tuple(arguments.needles))
    context = _max_model_len(arguments.model or str(demo_model()))
    left_out = [] if context is None else sorted({*size.needle_lengths} - {*size.within(context).needle_lengths})
    if left_out and arguments.needles:
        raise ValueError(f"--needles: got {left_out}, allowed up to {context - AROUND_NEEDLE} tokens for this model, "
                         f"whose longest sequence has {context}.")  # fmt: skip
    size = size if context is None else size.within(context)
    longest = longest_sequence(size)
    size = size.text_only() if arguments.text_only else size
    model = arguments.model or str(demo_model())
    memory = arguments.kv_cache_memory or (None if cuda else parse_memory(CPU_MEMORY))
    options = {"dtype": arguments.dtype or ("auto" if cuda else "float32")}
    options["max_model_len"] = longest
    options |= {"kv_cache_memory_bytes": memory} if memory else {}
    if memory and cuda:  # vLLM wants this share of the GPU free at a start, whatever it takes: others may use the rest
        options["gpu_memory_utilization"] = 0.1
    options["enforce_eager"] = arguments.enforce_eager or not cuda  # compiling on a CPU takes a minute, gains nothing

    def row_of(name: str, dtype: str, chunk: int, reference, size=size):
        status = None if arguments.json else StatusLine(name)
        row, result = make_row(
            name,
            lambda: run_engine(
                model, engine_arguments(dtype, chunk, size, options), size, arguments.top, directory,
                on_line=status.show if status else None,
            ),
            reference,
        )  # fmt: skip
        if status:
            status.end(f"KL {row['kl_mean']:.5f}" if row["status"] == "ok" else f"{row['status']}: {row['reason']}")
        return row, result

    row, reference = row_of("auto", "auto", CHUNK, None)
    if reference is None:
        raise ValueError(f"the uncompressed reference has no figures: {row['reason']}")
    rows = [row, row_of(f"auto, steps of {OTHER_CHUNK}", "auto", OTHER_CHUNK, reference, size.text_only())[0]]
    for dtype in arguments.kv_cache_dtype:
        if dtype != "auto":
            rows.append(row_of(dtype, dtype, CHUNK, reference)[0])
    settings = {"model": arguments.model or NAME, "size": size_name, "dtype": row["dtype"], "tokens_a_step": CHUNK}
    settings |= {"top": arguments.top, "python": sys.version.split()[0], "needles_left_out": left_out}
    return rows, settings


def _max_model_len(model: str) -> int | None:
    """The longest sequence of a model; None where only vLLM can tell, or say what is wrong."""
    from huggingface_hub import hf_hub_download

    with suppress(OSError, ValueError):
        config = model if Path(model).exists() else hf_hub_download(model, "config.json")  # vLLM will want it, too
        return model_shape(read_config(config)[0]).max_model_len
    return None
