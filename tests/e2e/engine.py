"""Run real vLLM in a process of its own, forked from one that has imported it: that is most of the time of a start.

A job is one engine and a list of phases. A phase is a list of requests that arrive, and may be cancelled, at given
engine steps; the next one begins when all have finished. A request with `forced` tokens is teacher-forced: whatever the
model prefers, those tokens are its output, and the log-probabilities returned are the model's own for them.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# As vLLM sets it, but before the question below is asked: without it the answer initialises CUDA's driver, and no
# worker can be forked any more.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch  # noqa: E402

CUDA = torch.cuda.is_available()


@dataclass
class Request:
    """One request; steps count engine iterations from the start of its phase."""

    id: str
    prompt: list[int]
    forced: list[int] | None = None
    max_tokens: int = 16
    arrive: int = 0
    cancel: int | None = None
    n: int = 1
    prompt_logprobs: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    top_logprobs: int = 0


@dataclass
class Phase:
    """Requests that run together.

    `inject` names a fault of FAULTS, to prove that a check can fail; in the worker of that rank only, or in all.
    """

    name: str
    requests: list[Request]
    reset_prefix_cache: bool = True
    sequential: bool = False
    inject: str | None = None
    inject_rank: int | None = None


@dataclass
class Output:
    """What vLLM returned for the first sequence of a request; `siblings` are the others (n > 1)."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    text: str
    finish_reason: str | None
    cached_tokens: int
    top: list[dict[str, float]]
    siblings: list["Output"] = field(default_factory=list)


@dataclass
class Result:
    """`backends` and `impls`: attention classes of the layers; `capacity`: tokens of cache that the engine has.

    `workers`: processes that hold a part of the model. `accepted_drafts`: tokens that speculation saved. `key_offsets`:
    SHA-256 of the key offsets of all layers, of every worker; empty where no layer has one.
    """

    backends: list[str]
    impls: list[str]
    workers: int
    capacity: int
    block_size: int
    preemptions: int
    accepted_drafts: int
    key_offsets: str
    phases: dict[str, dict[str, Output]]


ENGINE_DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
if CUDA:
    # vLLM wants this share of the GPU free at a start, whatever it takes: engines may run beside each other.
    ENGINE_DEFAULTS |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.1}
# vLLM's default on a GPU, in fewer sizes: torch.compile, decodes in full CUDA graphs.
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}}

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",  # threads that wait for each other stall when anything else wants the cores
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # engines that compile at the same time would write the same files
}

# Importing vLLM makes no CUDA context, so that what is forked afterwards can: vLLM starts its own engines like this.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["vllm.entrypoints.llm"])


def run(
    model: str,
    engine: dict,
    phases: list[Phase],
    tmp_path: Path,
    timeout: float = 1800,
    environment: dict | None = None,
    centred: bool = True,
) -> Result:
    """Run a job in a subprocess and return its result; a failing engine raises with the end of its log.

    Without `centred` the presets do without their key offsets.
    """
    log, result = tmp_path / "engine.log", tmp_path / "result.json"
    engine = ENGINE_DEFAULTS | engine
    job = {"model": model, "engine": engine, "phases": [asdict(p) for p in phases], "centred": centred}
    result.unlink(missing_ok=True)
    process = _processes.Process(target=_run_job, args=(job, ENVIRONMENT | (environment or {}), log, result))
    process.start()
    try:
        process.join(timeout)
        if process.exitcode != 0:
            raise RuntimeError(
                f"engine failed ({process.exitcode}; None: not done in {timeout} s):\n{log.read_text()[-4000:]}"
            )
    finally:
        with suppress(ProcessLookupError):  # workers that hang would keep their GPU
            os.killpg(process.pid, signal.SIGKILL)
    data = json.loads(result.read_text())
    data["phases"] = {
        name: {i: Output(**(o | {"siblings": [Output(**s) for s in o["siblings"]]})) for i, o in outputs.items()}
        for name, outputs in data["phases"].items()
    }
    result = Result(**data)
    _check_classes(result, engine)
    return result


def _check_classes(result: Result, engine: dict) -> None:
    """On a CPU vLLM's own turboquant dtypes start without an error and generate garbage: no text counts as proof of
    what computed it."""
    ours = engine.get("kv_cache_dtype", "auto").partition(":")[0] == "turboquant"
    stock = not ours or "kv_cache_dtype_skip_layers" in engine
    for classes, name in ((result.backends, "TurboQuantBackend"), (result.impls, "TurboQuantImpl")):
        classes = {found.rpartition("_")[2] for found in classes}  # ChunkedLocalAttention_128_TurboQuantBackend
        assert (name in classes) == ours and (classes != {name}) == stock, (engine, classes)


def _second_runner() -> bool:
    """Whether this process's engine has vLLM's second model runner, whose logits processors are of another kind."""
    return CUDA and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"


def _lose_prefix(table: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> None:
    """Every request forgets what it stored before its newest block: it reads vLLM's null block instead."""
    newest = (seq_lens - 1) // block_size
    table *= newest.new_tensor(range(table.shape[1])) >= newest[:, None]


def _wrong_block(table: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> None:
    """The first block of every request is taken from its neighbour in the batch."""
    table[:, 0] = table[:, 0].roll(1)


FAULTS = {"lost prefix": _lose_prefix, "wrong block": _wrong_block}
_active = {"fault": None}  # of this worker


def install_fault_point(worker=None) -> None:
    """Have the fault that `_active` names happen in every step of this process; before graphs are captured or after."""
    from tq_vllm.plugin.metadata import TurboQuantMetadataBuilder

    build = TurboQuantMetadataBuilder.build

    def build_with_fault(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        if _active["fault"]:
            for requests in filter(None, (metadata.decodes, metadata.prefills)):
                if not CUDA:  # there it is vLLM's only table; on a GPU a copy made for this step, which graphs read
                    requests.block_table = requests.block_table.clone()
                FAULTS[_active["fault"]](requests.block_table, requests.seq_lens, self.kv_cache_spec.block_size)
        return metadata

    TurboQuantMetadataBuilder.build = build_with_fault


def set_fault(worker, fault: str | None, rank: int | None = None) -> None:
    """Switch a fault on or off in a worker, if it is of that rank."""
    _active["fault"] = fault if rank in (None, getattr(worker, "rank", None)) else None


def _report(worker) -> dict:
    """What a worker says of its layers, as Result has it."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    layers = get_layers_from_vllm_config(worker.vllm_config, Attention).values()
    return {
        "backends": [layer.attn_backend.__name__ for layer in layers],
        "impls": [type(layer.impl).__name__ for layer in layers],
        "key_offsets": _hash(
            [layer.impl.key_offset for layer in layers if getattr(layer.impl, "key_offset", None) is not None]
        ),
    }


def _hash(tensors: list) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if tensors else ""


def _output(completion, request_output) -> dict:
    def chosen(ids, dicts):
        return [d[t].logprob for t, d in zip(ids, dicts or [], strict=False) if d]

    return asdict(
        Output(
            tokens=list(completion.token_ids),
            logprobs=chosen(completion.token_ids, completion.logprobs),
            prompt_logprobs=chosen(request_output.prompt_token_ids, request_output.prompt_logprobs),
            text=completion.text,
            finish_reason=completion.finish_reason,
            cached_tokens=request_output.num_cached_tokens or 0,
            top=[{str(t): p.logprob for t, p in d.items()} for d in completion.logprobs or []],
        )
    )


def _run_phase(engine, phase: dict) -> dict:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    waiting = sorted(phase["requests"], key=lambda r: r["arrive"])
    outputs: dict[str, dict] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (
            not engine.has_unfinished_requests() if phase["sequential"] else waiting[0]["arrive"] <= step
        ):
            r = waiting.pop(0)
            params = SamplingParams(
                n=r["n"], temperature=r["temperature"], logprobs=r["top_logprobs"], ignore_eos=r["ignore_eos"],
                max_tokens=len(r["forced"]) if r["forced"] else r["max_tokens"],
                prompt_logprobs=0 if r["prompt_logprobs"] else None,
                output_kind=RequestOutputKind.FINAL_ONLY,  # all samples of a request in its one output
                extra_args={"forced": r["forced"], "prompt_len": len(r["prompt"])} if r["forced"] else None,
            )  # fmt: skip
            engine.add_request(r["id"], {"prompt_token_ids": r["prompt"]}, params)
        for r in phase["requests"]:
            if r["cancel"] == step and r["id"] not in outputs:
                engine.abort_request([r["id"]])
        for output in engine.step():
            if output.finished:
                first, *rest = [_output(c, output) for c in output.outputs]
                outputs[output.request_id] = first | {"siblings": rest}
        step += 1
    return outputs


def _run_job(job: dict, environment: dict, log: Path, result: Path) -> None:
    """The forked process; it leads a process group, of which its workers are."""
    os.setsid()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        result.write_text(json.dumps(asdict(_result_of(job))))
    finally:
        sys.stdout.flush()


def _result_of(job: dict) -> Result:
    from tq_vllm.config import PRESETS

    if not job["centred"]:
        PRESETS.update({name: replace(preset, key_offset=False) for name, preset in PRESETS.items()})
    from vllm import LLM

    force_tokens = f"force_tokens:{'SecondRunner' if _second_runner() else 'FirstRunner'}"
    processors = [] if "speculative_config" in job["engine"] else [force_tokens]  # vLLM refuses both together
    llm = LLM(model=job["model"], logits_processors=processors, **job["engine"])
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    faulty = any(p["inject"] for p in job["phases"])
    if faulty:
        llm.collective_rpc(install_fault_point)
    phases = {}
    for phase in job["phases"]:
        if phase["reset_prefix_cache"]:
            assert llm.reset_prefix_cache()
        if faulty:
            llm.collective_rpc(set_fault, args=(phase["inject"], phase["inject_rank"]))
        phases[phase["name"]] = _run_phase(engine, phase)

    def count(metric: str) -> int:
        return int(sum(m.value for m in llm.get_metrics() if m.name == metric))

    reports = llm.collective_rpc(_report)
    return Result(
        backends=sorted({name for report in reports for name in report["backends"]}),
        impls=sorted({name for report in reports for name in report["impls"]}),
        workers=len(reports),
        capacity=cache.num_gpu_blocks * cache.block_size,
        block_size=cache.block_size,
        preemptions=count("vllm:num_preemptions"),
        accepted_drafts=count("vllm:spec_decode_num_accepted_tokens"),
        key_offsets="".join(report["key_offsets"] for report in reports),
        phases=phases,
    )
