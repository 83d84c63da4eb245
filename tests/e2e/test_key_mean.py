"""Keys centred by their mean, in real vLLM: the same offsets at every start, and a better model than without them."""

import math

import pytest
import torch
from engine import Phase, Request, Result, run

TOKENS = 449


def _perplexity(result: Result) -> float:
    logprobs = result.phases["read"]["r"].prompt_logprobs
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs keys are not centred by a mean yet")
def test_a_mean_makes_two_bit_keys_better_and_is_the_same_at_every_start(model, text_ids, tmp_path):
    phases = [Phase("read", [Request("r", text_ids[:TOKENS], max_tokens=1, prompt_logprobs=True)])]
    engine = {"kv_cache_dtype": "turboquant:k2v2", "max_num_batched_tokens": 64}
    centred = run(model, engine, phases, tmp_path)
    assert (
        "keys of 30 layers centred by their mean over a fixed pass of 64 tokens"
        in (tmp_path / "engine.log").read_text()
    )
    again = run(model, engine | {"max_num_batched_tokens": 96}, phases, tmp_path)
    uncentred = run(model, engine, phases, tmp_path, centred=False)
    assert centred.key_offsets == again.key_offsets != uncentred.key_offsets == ""
    print(f"perplexity {_perplexity(centred):.2f}, uncentred {_perplexity(uncentred):.2f}")
    assert _perplexity(centred) < 0.95 * _perplexity(uncentred)
