"""One engine of `tq-vllm eval`: `python -m tq_vllm.plugin.eval_worker JOB.json RESULT.npz`.

The job names the model, the engine's arguments, the size, and how many log-probabilities are kept at each position of
text (-1: all). The result has the arrays of text, and as JSON the answers, the continuations and what the engine says
of itself. A request reads its prompt in steps of `long_prefill_token_threshold` tokens, several requests a step.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from vllm import LLM, SamplingParams

from tq_vllm.quality.gate import RefusedError, check_attention
from tq_vllm.quality.tasks import Size, build_tasks


class EngineReport:
    """Mixed into vLLM's worker (--worker-extension-cls): a method that `collective_rpc` can call."""

    def engine_report(self) -> dict:
        """Layers with their attention class and cache dtype, and the bytes that a token takes in this worker, and a
        sequence for its newest tokens."""
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        from tq_vllm.plugin.recent import RecentTokens

        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        recent = get_layers_from_vllm_config(self.vllm_config, RecentTokens)
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        newest = [group for group in groups if group.layer_names[0] in recent]
        groups = [group for group in groups if group not in newest]
        return {
            "layers": [
                {
                    "name": name,
                    "impl": f"{type(layer.impl).__module__}.{type(layer.impl).__name__}",
                    "kv_cache_dtype": str(layer.kv_cache_dtype),
                    "known": bool(layer.attn_backend.supports_kv_cache_dtype(layer.kv_cache_dtype)),
                }
                for name, layer in layers.items()
            ],
            "bytes_per_token": sum(_page_bytes(group) / group.kv_cache_spec.block_size for group in groups),
            "bytes_per_sequence": sum(_page_bytes(group) * _window_blocks(group.kv_cache_spec) for group in newest),
        }


def _page_bytes(group) -> int:
    """Bytes that the layers of a KV cache group take for one block, padding included."""
    per_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)  # layers of different page sizes
    if per_layer:
        return sum(spec.page_size_bytes for spec in per_layer.values())
    return len(group.layer_names) * group.kv_cache_spec.page_size_bytes


def _window_blocks(spec) -> int:
    """Blocks that a sequence holds of a sliding window's cache between two steps."""
    return -(-(spec.sliding_window - 1) // spec.block_size) + 1


def _prompt(tokens: list[int]) -> dict:
    return {"prompt_token_ids": tokens}


def read_text(llm, windows: list[list[int]], top: int, num_seqs: int) -> dict[str, np.ndarray]:
    """Arrays of metrics.Distributions over all windows in order; their first tokens are not predicted."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top, flat_logprobs=True, detokenize=False)
    parts = {"ids": [], "logprobs": [], "target": [], "target_logprob": []}
    for start in range(0, len(windows), num_seqs):
        batch = windows[start : start + num_seqs]
        for output in llm.generate([_prompt(w) for w in batch], params, use_tqdm=False):
            flat, positions = output.prompt_logprobs, len(output.prompt_token_ids) - 1
            ids = np.array(flat.token_ids, np.int32).reshape(positions, -1)  # [N, 1 + k], the actual token first
            logprobs = np.array(flat.logprobs, np.float32).reshape(positions, -1)
            for name, array in (("ids", ids[:, 1:]), ("logprobs", logprobs[:, 1:]), ("target", ids[:, 0]),
                                ("target_logprob", logprobs[:, 0])):  # fmt: skip
                parts[name].append(array)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def ask(llm, questions) -> list[dict]:
    """Rank and log-probability of the answer tokens of every question."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([_prompt(q.tokens) for q in questions], params, use_tqdm=False)
    answers = []
    for question, output in zip(questions, outputs, strict=True):
        seen = [output.prompt_logprobs[i][question.tokens[i]] for i in question.answers]
        answers.append(
            {
                "kind": question.kind,
                "name": question.name,
                "ranks": [s.rank for s in seen],
                "logprobs": [s.logprob for s in seen],
            }
        )
    return answers


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    size, dtype = Size(**job["size"]), job["engine"]["kv_cache_dtype"]
    llm = LLM(
        model=job["model"],
        worker_extension_cls="tq_vllm.plugin.eval_worker.EngineReport",
        max_logprobs=-1,
        **job["engine"],
    )
    workers = llm.collective_rpc("engine_report")
    config = llm.llm_engine.vllm_config
    report = {
        # What a sequence takes once counts over a window of text.
        "bytes_per_token": sum(w["bytes_per_token"] + w["bytes_per_sequence"] / size.window_tokens for w in workers),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "vocab_size": config.model_config.get_vocab_size(),
        "kv_tokens": config.cache_config.kv_cache_size_tokens,  # as the engine prints it
    }
    arrays = {}
    try:
        report["attention"] = check_attention(dtype, [layer for worker in workers for layer in worker["layers"]])
    except RefusedError as refusal:
        report["refused"] = str(refusal)
    else:
        tasks, started = build_tasks(llm.get_tokenizer(), size), time.monotonic()
        top = job["top"] if job["top"] == -1 else min(job["top"], report["vocab_size"])
        arrays = read_text(llm, tasks.windows, top, size.num_seqs)
        report["answers"] = ask(llm, tasks.questions)
        params = SamplingParams(temperature=0, max_tokens=size.greedy_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([_prompt(p) for p in tasks.prompts], params, use_tqdm=False)
        report["continuations"] = [list(output.outputs[0].token_ids) for output in outputs]
        report["seconds"] = time.monotonic() - started
    np.savez(sys.argv[2], report=json.dumps(report), **arrays)


if __name__ == "__main__":
    main()
