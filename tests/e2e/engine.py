"""Run real vLLM in a process of its own, forked from one that has imported it: that is most of the time of a start.

A job is one engine and a list of phases. A phase is a list of requests that arrive, and may be cancelled, at given
engine steps; the next one begins when all have finished. A request with `forced` tokens is teacher-forced: whatever the
model prefers, those tokens are its output, and the log-probabilities returned are the model's own for them.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch


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
    """Requests that run together. `inject` names a fault of FAULTS, to prove that a check can fail."""

    name: str
    requests: list[Request]
    reset_prefix_cache: bool = True
    sequential: bool = False
    inject: str | None = None


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

    `accepted_drafts`: tokens that speculation saved. `key_offsets`: SHA-256 of the key offsets of all layers; empty
    where no layer has one.
    """

    backends: list[str]
    impls: list[str]
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

_processes = multiprocessing.get_context("forkserver")
if not torch.cuda.is_available():
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
    engine = ENGINE_DEFAULTS | ({"dtype": "bfloat16"} if torch.cuda.is_available() else {}) | engine
    job = {"model": model, "engine": engine, "phases": [asdict(p) for p in phases], "centred": centred}
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",  # threads that wait for each other stall when anything else wants the cores
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **(environment or {}),
    }
    result.unlink(missing_ok=True)
    process = _processes.Process(target=_run_job, args=(job, env, log, result))
    process.start()
    process.join(timeout)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(
            f"engine failed ({process.exitcode}; None: not done in {timeout} s):\n{log.read_text()[-4000:]}"
        )
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
        assert (name in classes) == ours and (classes != [name]) == stock, (engine, classes)


def _force_tokens_class():
    """For vLLM's first model runner."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class ForceTokens(AdapterLogitsProcessor):
        def is_argmax_invariant(self):
            return False

        def new_req_logits_processor(self, params):
            forced = (params.extra_args or {}).get("forced")
            if forced is None:
                return None

            def force(output_ids, logits):
                masked = torch.full_like(logits, float("-inf"))
                masked[forced[len(output_ids)]] = 0
                return masked

            return force

    return ForceTokens


def _force_tokens_class_of_second_runner():
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

    class ForceTokens(LogitsProcessor):
        def __init__(self, vllm_config, req_states):
            self.forced = {}

        def add_request(self, req_idx, sampling_params):
            extra = sampling_params.extra_args or {}
            self.forced[req_idx] = extra.get("forced"), extra.get("prompt_len")
            return extra.get("forced") is not None

        def apply(self, logits, ctx):
            rows = zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)
            for row, (slot, position) in enumerate(rows):
                forced, prompt_len = self.forced.get(slot, (None, None))
                if forced and 0 <= (index := position + 1 - prompt_len) < len(forced):
                    logits[row] = float("-inf")
                    logits[row, forced[index]] = 0
            return logits

    return ForceTokens


def _second_runner() -> bool:
    """Whether this process's engine has vLLM's second model runner, whose logits processors are of another kind."""
    return torch.cuda.is_available() and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"


def _lose_prefix(requests, block_size: int) -> None:
    """Every request forgets what it stored before its newest block: it reads vLLM's null block instead."""
    newest = (requests.seq_lens - 1) // block_size
    columns = newest.new_tensor(range(requests.block_table.shape[1]))
    requests.block_table = requests.block_table * (columns[None, :] >= newest[:, None])


def _wrong_block(requests, block_size: int) -> None:
    """The first block of every request is taken from its neighbour in the batch."""
    requests.block_table = requests.block_table.clone()
    requests.block_table[:, 0] = requests.block_table[:, 0].roll(1)


FAULTS = {"lost prefix": _lose_prefix, "wrong block": _wrong_block}


def _install_fault_point(active: dict, block_size: int) -> None:
    from tq_vllm.plugin.metadata import TurboQuantMetadataBuilder

    build = TurboQuantMetadataBuilder.build

    def build_with_fault(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        if active["fault"]:
            for requests in filter(None, (metadata.decodes, metadata.prefills)):
                FAULTS[active["fault"]](requests, block_size)
        return metadata

    TurboQuantMetadataBuilder.build = build_with_fault


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
    """The forked process."""
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
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    force_tokens = _force_tokens_class_of_second_runner() if _second_runner() else _force_tokens_class()
    processors = [] if "speculative_config" in job["engine"] else [force_tokens]  # vLLM refuses both together
    llm = LLM(model=job["model"], logits_processors=processors, **job["engine"])
    engine = llm.llm_engine
    config = engine.vllm_config
    layers = get_layers_from_vllm_config(config, Attention).values()
    cache = config.cache_config
    active = {"fault": None}
    if any(p["inject"] for p in job["phases"]):
        _install_fault_point(active, cache.block_size)
    phases = {}
    for phase in job["phases"]:
        if phase["reset_prefix_cache"]:
            assert llm.reset_prefix_cache()
        active["fault"] = phase["inject"]
        phases[phase["name"]] = _run_phase(engine, phase)

    def count(metric: str) -> int:
        return int(sum(m.value for m in llm.get_metrics() if m.name == metric))

    return Result(
        backends=sorted({layer.attn_backend.__name__ for layer in layers}),
        impls=sorted({type(layer.impl).__name__ for layer in layers}),
        capacity=cache.num_gpu_blocks * cache.block_size,
        block_size=cache.block_size,
        preemptions=count("vllm:num_preemptions"),
        accepted_drafts=count("vllm:spec_decode_num_accepted_tokens"),
        key_offsets=_hash(
            [layer.impl.key_offset for layer in layers if getattr(layer.impl, "key_offset", None) is not None]
        ),
        phases=phases,
    )
