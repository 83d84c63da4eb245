"""What centring keys by their mean is worth: KL divergence to the uncompressed cache, with and without, in real vLLM.

    python bench/key_mean.py turboquant turboquant:k3v3

The default model in float32 on a CPU reads two texts of 512 tokens in steps of 64, so that nearly everything is read
from codes: documentation, and a chat. One process an engine; one row a preset.
"""

import dataclasses
import math
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

STEP, TOKENS = 64, 512
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def _texts(tokenizer) -> list[list[int]]:
    topics = pydoc_data.topics.topics
    question = {"role": "user", "content": topics["assert"] + "\nExplain this."}
    chat = tokenizer.apply_chat_template([question, {"role": "assistant", "content": topics["import"]}], tokenize=False)
    return [tokenizer(text)["input_ids"][:TOKENS] for text in (topics["debugger"], chat)]


def worker(kv_cache_dtype: str, centred: bool, result: Path) -> None:
    """Save the log-probabilities, nats, [2, TOKENS - 1, vocabulary], of an engine with this cache."""
    from tq_vllm.cli.demo_model import demo_model
    from tq_vllm.config import PRESETS

    if not centred:
        PRESETS[kv_cache_dtype] = dataclasses.replace(PRESETS[kv_cache_dtype], key_offset=False)
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models.llama import LlamaForCausalLM

    engine = dict(max_num_batched_tokens=STEP, max_num_seqs=1, max_model_len=1024, enable_prefix_caching=False)
    memory = dict(kv_cache_memory_bytes=256 << 20, kv_cache_dtype=kv_cache_dtype)
    llm = LLM(model=str(demo_model()), dtype="float32", enforce_eager=True, **engine, **memory)
    steps, compute_logits = [], LlamaForCausalLM.compute_logits

    def noted(self, hidden_states):
        logits = compute_logits(self, hidden_states)
        steps.append(logits.clone())
        return logits

    LlamaForCausalLM.compute_logits = noted
    params, logprobs = SamplingParams(max_tokens=1, prompt_logprobs=0), []
    for tokens in _texts(llm.get_tokenizer()):
        steps.clear()
        (output,) = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
        logits = torch.cat([step for step in steps if len(step) > 1])[: TOKENS - 1]  # single rows pick the next token
        logprobs.append(logits.log_softmax(-1))
        chosen = logprobs[-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
        theirs = [d[t].logprob for t, d in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
        assert math.dist(chosen, theirs) < 1e-3, "the logits are not those of the prompt's positions"
    torch.save(torch.stack(logprobs), result)


def _read(kv_cache_dtype: str, centred: bool) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "logprobs.pt")
        arguments = [kv_cache_dtype, str(int(centred)), str(result)]
        environment = os.environ | ENVIRONMENT
        subprocess.run([sys.executable, __file__, "--worker", *arguments], env=environment, check=True)
        return torch.load(result)


def main() -> None:
    """Run the reference and two engines a preset; print the rows at the end."""
    reference = _read("auto", True)
    rows = []
    for preset in sys.argv[1:] or ["turboquant"]:
        divergence = [
            (reference.exp() * (reference - _read(preset, centred))).sum(-1).flatten() for centred in (True, False)
        ]
        centred, uncentred = (f"{kl.mean():.5f} ({kl.quantile(0.99):.3f})" for kl in divergence)
        change = divergence[0].mean() / divergence[1].mean() - 1
        rows.append(f"{preset}: mean KL (99th percentile) centred {centred}, uncentred {uncentred}, {change:+.0%}")
    print(*rows, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3] == "1", Path(sys.argv[4]))
    else:
        main()
