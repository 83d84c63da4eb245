"""`turboquant:k8v8` answers with the text of the uncompressed cache, up to ties."""

from dataclasses import replace

import pytest
from engine import Phase, Request, run
from transformers import AutoTokenizer

pytestmark = pytest.mark.engine

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a binary search tree is.",
    "List three uses of copper.",
    "Translate to French: good morning.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What does the Python keyword yield do?",
)
TIE = 0.05  # nats between the two candidates in the uncompressed run


def test_near_lossless_preset_gives_the_uncompressed_text(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    requests = [
        Request(
            f"q{i}",
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            ),
            max_tokens=24, ignore_eos=False, top_logprobs=5,
        )
        for i, question in enumerate(QUESTIONS)
    ]  # fmt: skip
    outputs = {}
    for dtype, impl in (("auto", "CPUAttentionBackendImpl"), ("turboquant:k8v8", "TurboQuantImpl")):
        phases = [Phase("text", [replace(r) for r in requests])]
        result = run(model, {"kv_cache_dtype": dtype}, phases, tmp_path)
        assert result.impls == [impl]
        outputs[dtype] = result.phases["text"]
    ties = 0
    for request, question in zip(requests, QUESTIONS, strict=True):
        plain, ours = outputs["auto"][request.id], outputs["turboquant:k8v8"][request.id]
        if plain.tokens == ours.tokens:
            continue
        at = next(i for i, (a, b) in enumerate(zip(plain.tokens, ours.tokens, strict=False)) if a != b)
        other = plain.top[at].get(str(ours.tokens[at]))
        assert other is not None and plain.logprobs[at] - other < TIE, f"{question}: token {at}, {plain.top[at]}"
        ties += 1
        print(f"tie: {question!r}, token {at}: {plain.logprobs[at]:.4f} against {other:.4f}")
    assert ties <= len(QUESTIONS) // 2
