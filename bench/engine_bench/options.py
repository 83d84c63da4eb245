"""The command line that both benchmarks share, and the flags of vLLM that it stands for."""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from engine_bench.gate import ANSWER, QUESTION
from engine_bench.shapes import SHAPES, write_shape
from engine_bench.workloads import WORKLOADS, get_workload
from tq_vllm.cli.capacity import parse_memory
from tq_vllm.cli.demo_model import demo_model

DEFAULT_DTYPES = {
    "cuda": ["auto", "fp8", "int4_per_token_head", "turboquant_4bit_nc", "turboquant"],
    "cpu": ["auto", "fp8", "turboquant"],
}
SLOW_TO_CAPTURE = ("int4_per_token_head", "turboquant_4bit_nc")  # capturing all sizes did not finish on an H100
OWN_FLAGS = ("--model", "--kv-cache-dtype", "--kv-cache-memory-bytes", "--worker-extension-cls", "--load-format",
             "--output-json", "--async-engine", "--prequeue-requests", "--seed", "--served-model-name", "--host",
             "--port", "--base-url", "--save-result", "--result-dir", "--result-filename",
             "--max-concurrency")  # fmt: skip
WORKER = "engine_bench.worker.AttentionReport"
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of throughput.py and serve.py."""
    workloads = "; ".join(f"{name}: {workload.what}" for name, workload in WORKLOADS.items())
    parser.add_argument("--workload", choices=WORKLOADS, help=f"requests and memory by name. {workloads}")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="directory or Hugging Face name (default: the embedded SmolLM2-135M)")
    model.add_argument("--shape", choices=SHAPES, help="a shape with dummy weights instead of a model")
    parser.add_argument("--dtypes", help="cache dtypes, comma-separated (default: by device)")
    parser.add_argument("--kv-cache-memory", help="of every engine, as 16GiB (default: the workload's; else 1GiB)")
    parser.add_argument("--capture-sizes", help="CUDA graph capture sizes, comma-separated, for the dtypes of vLLM "
                        f"that hang while capturing all ({', '.join(SLOW_TO_CAPTURE)}), as 1,2,4,8,16; "
                        "their rows say so")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default 0)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds one dtype may take (default 1800)")
    parser.add_argument("--question", default=QUESTION, help=f"greedy question of the gate (default {QUESTION!r})")
    parser.add_argument("--answer", default=ANSWER, help=f"what its answer must hold (default {ANSWER!r})")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="directory of JSON, logs and plots")


class Setup:
    """What the options mean on this device: model, dtypes, memory, and the flags of an engine."""

    def __init__(self, options: argparse.Namespace):
        import torch  # importing it is all: is_available() makes no CUDA context

        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.workload = get_workload(options.workload) if options.workload else None
        self.dtypes = options.dtypes.split(",") if options.dtypes else DEFAULT_DTYPES[self.device]
        default_memory = str(self.workload.kv_cache_memory_bytes) if self.workload else "1GiB"
        self.memory_bytes = parse_memory(options.kv_cache_memory or default_memory)
        self.dummy = bool(options.shape)
        if self.dummy:
            self.model = str(write_shape(options.shape, Path(tempfile.gettempdir()) / "tq_vllm_shapes"))
        else:
            self.model = options.model or str(demo_model())
        self.name = options.shape or options.model or "SmolLM2-135M-Instruct"
        options.out.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Variables of every process of vLLM."""
        return {"HF_HUB_OFFLINE": "1"} if Path(self.model).is_dir() else {}

    def engine_flags(self, dtype: str) -> list[str]:
        """Flags of the engine, without the model."""
        flags = ["--kv-cache-dtype", dtype, "--kv-cache-memory-bytes", str(self.memory_bytes)]
        flags += ["--worker-extension-cls", WORKER]
        flags += ["--load-format", "dummy"] if self.dummy else []
        flags += ["--enforce-eager"] if self.device == "cpu" else []  # compiling takes a minute and gains nothing
        flags += self.workload.engine_flags() if self.workload else []
        if self.capture_note(dtype):
            flags += ["--cudagraph-capture-sizes", *self.options.capture_sizes.split(",")]
        return flags

    def capture_note(self, dtype: str) -> str:
        """What the row says of a short list of capture sizes, or ""."""
        short = self.options.capture_sizes and dtype in SLOW_TO_CAPTURE
        return f"CUDA graphs for batches of {self.options.capture_sizes} only" if short else ""


def split_flags(argv: list[str]) -> tuple[list[str], ...]:
    """Split at every `--`: own options first, then the lists that go to vLLM unchanged."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return tuple(parts)


def check_vllm_flags(flags: list[str]) -> None:
    """Raises: ValueError for a flag that the benchmark sets itself."""
    for flag in flags:
        if flag.split("=")[0].replace("_", "-") in OWN_FLAGS:
            raise ValueError(
                f"{flag} after --: this benchmark sets it or cannot check the engine with it; "
                "use its own options (--help) or run `vllm bench` yourself."
            )


def shown(command: list[str]) -> str:
    """A command as a user types it."""
    words = ["vllm", *command[len(VLLM) :]] if command[: len(VLLM)] == VLLM else command
    return shlex.join(words)
