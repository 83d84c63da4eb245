"""The served model against the same model computed with tq_vllm.core, teacher-forced, in float32.

Float noise flips roundings, every flip changes what later tokens see, and a decode has one such step a token: at 4 bits
the log-probabilities of an answer drift apart as far as another rounding of the same cache would take them. How far two
exact computations are apart is measured, by doing the reference in float32 and in float64.
"""

from statistics import mean

import pytest
import torch
from engine import Phase, Request, run
from reference import teacher_forced_logprobs

from tq_vllm.config import get_config

CHUNK = 48  # tokens a step, and of the pass for the mean of keys: fewer than its usual 64
PROMPT = 300
DECODED = 40
STEPS = [CHUNK] * (PROMPT // CHUNK) + [PROMPT % CHUNK] + [1] * DECODED


def _distance(a: list[float], b: list[float]) -> float:
    return mean(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("preset", ["turboquant", "turboquant:k8v8"])
def test_logprobs_of_prompt_and_answer_are_those_of_core(preset, model, text_ids, tmp_path):
    tokens = text_ids[: PROMPT + DECODED]
    request = Request("r", tokens[:PROMPT], forced=tokens[PROMPT:], prompt_logprobs=True)
    engine = {"kv_cache_dtype": preset, "max_num_batched_tokens": CHUNK, "max_num_seqs": 1}
    result = run(model, engine, [Phase("read", [request])], tmp_path)
    assert result.impls == ["TurboQuantImpl"]
    output = result.phases["read"]["r"]
    served = output.prompt_logprobs + output.logprobs
    config = get_config(preset)
    expected = teacher_forced_logprobs(model, tokens, STEPS, config, CHUNK)
    prompt, answer = (_distance(served[part], expected[part]) for part in (slice(PROMPT - 1), slice(PROMPT - 1, None)))
    exact = teacher_forced_logprobs(model, tokens, STEPS, config, CHUNK, torch.float64)
    floor = _distance(expected[PROMPT - 1 :], exact[PROMPT - 1 :])
    print(f"{preset}: mean |difference| {prompt:.4f} (prompt), {answer:.4f} (answer; noise floor {floor:.4f}) nats")
    assert prompt < 0.02
    assert answer < max(0.02, 3 * floor)
    uncompressed = teacher_forced_logprobs(model, tokens, [len(tokens)], config, CHUNK)
    assert _distance(served[:PROMPT], uncompressed[:PROMPT]) > 3 * prompt  # the codes were read
