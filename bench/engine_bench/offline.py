"""The process of one offline row: `python -m engine_bench.offline SETTINGS.json bench throughput FLAGS`.

Runs vLLM's own benchmark command unchanged, on an engine that passed the gate first. Afterwards, in the same engine,
the same prompts are answered with one token each: the time of the prefill, which vLLM's commands do not give.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy

from engine_bench.gate import (
    DUMMY_PROMPT,
    GATE_TOKENS,
    GateRefusedError,
    check_answer,
    check_attention,
    check_logprobs,
)


def check_engine(llm, settings: dict) -> dict:
    """The gate on a vllm.LLM; returns the worker's report with `attention` and `answer`. Raises: GateRefusedError."""
    from vllm import SamplingParams

    report = llm.collective_rpc("attention_report")[0]
    report["attention"] = check_attention(settings["kv_cache_dtype"], report.pop("layers"))
    params = SamplingParams(temperature=0, max_tokens=GATE_TOKENS, logprobs=0, ignore_eos=settings["dummy"])
    if settings["dummy"]:
        output = llm.generate([{"prompt_token_ids": DUMMY_PROMPT}], params, use_tqdm=False)[0].outputs[0]
        chosen = zip(output.token_ids, output.logprobs, strict=True)
        report["answer"] = check_logprobs([logprobs[token].logprob for token, logprobs in chosen])
    else:
        if llm.get_tokenizer().chat_template:
            outputs = llm.chat([{"role": "user", "content": settings["question"]}], params, use_tqdm=False)
        else:
            outputs = llm.generate([settings["question"]], params, use_tqdm=False)
        report["answer"] = check_answer(outputs[0].outputs[0].text, settings["answer"])
    llm.reset_prefix_cache()
    return report


def time_prefill(llm, prompts: list, params, repeats: int) -> float:
    """Median seconds in which `prompts` get one token each."""
    params = [p.clone() for p in params] if isinstance(params, list) else params.clone()
    for p in params if isinstance(params, list) else [params]:
        p.max_tokens = 1
    seconds = []
    for _ in range(repeats):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    settings, sys.argv[:] = json.loads(Path(sys.argv[1]).read_text()), ["vllm", *sys.argv[2:]]
    from vllm import LLM
    from vllm.entrypoints.cli.main import main as vllm_main

    engines, calls = [], []

    def from_engine_args(cls, engine_args):
        llm = cls(**vars(engine_args))
        try:
            report = check_engine(llm, settings)
        except GateRefusedError as refusal:
            Path(settings["report"]).write_text(json.dumps({"refused": str(refusal)}))
            raise
        Path(settings["report"]).write_text(json.dumps(report))
        generate = llm.generate

        def recorded(prompts, sampling_params=None, **kwargs):
            calls.append((prompts, sampling_params))
            return generate(prompts, sampling_params, **kwargs)

        llm.generate = recorded
        numpy.random.seed(settings["seed"])  # `vllm bench latency` draws its prompts without seeding
        engines.append((llm, report))
        return llm

    LLM.from_engine_args = classmethod(from_engine_args)
    vllm_main()
    (llm, report), (prompts, params) = engines[0], calls[-1]
    output_lens = [p.max_tokens for p in params] if isinstance(params, list) else [params.max_tokens] * len(prompts)
    report["output_lens"] = output_lens
    if max(output_lens) > 1:
        report["prefill_seconds"] = time_prefill(llm, prompts, params, 1 if "throughput" in sys.argv else 3)
    Path(settings["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
