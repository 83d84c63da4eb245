"""Run one engine of an evaluation in a process of its own and read its result."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tq_vllm.cli.engine_log import log_error
from tq_vllm.quality.gate import RefusedError
from tq_vllm.quality.metrics import Distributions
from tq_vllm.quality.tasks import Size

WORKER = ("-m", "tq_vllm.plugin.eval_worker")


class EngineFailedError(RuntimeError):
    """The engine did not start, or stopped; the text is vLLM's own reason."""


@dataclass
class Result:
    """What an engine answered; `report` is the worker's."""

    text: Distributions
    report: dict


def engine_arguments(dtype: str, chunk: int, size: Size, options: dict) -> dict:
    """Arguments of vllm.LLM: every request reads `chunk` tokens of its prompt a step, `size.num_seqs` at a time."""
    return {
        "kv_cache_dtype": dtype,
        "long_prefill_token_threshold": chunk,
        "max_num_batched_tokens": chunk * size.num_seqs,
        "max_num_seqs": size.num_seqs,
        "enable_prefix_caching": False,
        **options,
    }


def run_engine(
    model: str, engine: dict, size: Size, top: int, directory: Path, worker: tuple[str, ...] = WORKER, on_line=None
) -> Result:
    """Run one engine over the tasks of `size`; its job, log and result stay in `directory`.

    Args:
        engine: arguments of vllm.LLM. top: log-probabilities kept at a position of text, -1: the vocabulary.
        worker: arguments of Python that start the worker.
        on_line: called about twice a second with the last line of the log.

    Raises:
        RefusedError: the gate refuses the engine. EngineFailedError: it has no result.
    """
    name = f"{engine['kv_cache_dtype'].replace(':', '_')}-steps-of-{engine['long_prefill_token_threshold']}"
    job, result, log = (directory / f"{name}{suffix}" for suffix in (".json", ".npz", ".log"))
    job.write_text(json.dumps({"model": model, "engine": engine, "size": asdict(size), "top": top}))
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | os.environ
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *worker, str(job), str(result)],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.5)
                if on_line:
                    on_line(_last_line(log))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
    if process.returncode:
        raise EngineFailedError(log_error(log.read_text(errors="replace"), process.returncode))
    return load_result(result)


def load_result(path: Path) -> Result:
    """Read a worker's result. Raises: RefusedError if the gate refused the engine."""
    with np.load(path) as arrays:
        report = json.loads(str(arrays["report"]))
        if "refused" in report:
            raise RefusedError(report["refused"])
        return Result(Distributions(**{key: arrays[key] for key in arrays.files if key != "report"}), report)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace")[-400:].split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
