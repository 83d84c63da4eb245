"""The correctness gate: no figure of a cache dtype without its own attention class and a right answer.

Pure functions on what an engine said of itself; both benchmarks use them.
"""

import math

from tq_vllm.config import PRESETS

QUESTION, ANSWER = "What is the capital of France?", "Paris"
DUMMY_PROMPT = list(range(1, 65))  # token ids for a model of dummy weights
GATE_TOKENS = 24
OUR_IMPL = ("tq_vllm.plugin.impl", "TurboQuantImpl")
UNCOMPRESSED = ("auto", "float16", "bfloat16", "float32")


class GateRefusedError(RuntimeError):
    """The engine does not do what the row would claim: its figures mean nothing."""


def check_attention(dtype: str, layers: list[dict]) -> str:
    """Check which classes attend, and on which cache.

    Args:
        dtype: as given to --kv-cache-dtype.
        layers: a dict a layer: name, module, impl, kv_cache_dtype.

    Returns:
        What the row says, as "TurboQuantImpl on 30 of 30 layers".

    Raises:
        GateRefusedError: no layer has that cache, or another class than the dtype's own attends to it.
    """
    allowed = UNCOMPRESSED if dtype == "auto" else (dtype,)
    mine = [layer for layer in layers if layer["kv_cache_dtype"] in allowed]
    if not mine:
        got = sorted({layer["kv_cache_dtype"] for layer in layers})
        raise GateRefusedError(f"no layer has a {dtype} cache: got {', '.join(got) or 'no attention layers'}.")
    for layer in mine:
        ours = (layer["module"], layer["impl"]) == OUR_IMPL
        if ours != (dtype in PRESETS):
            expected = ".".join(OUR_IMPL) if dtype in PRESETS else "a class of vLLM"
            raise GateRefusedError(
                f"{layer['module']}.{layer['impl']} attends to the {dtype} cache of {layer['name']}: "
                f"expected {expected}."
            )
    return f"{', '.join(sorted({layer['impl'] for layer in mine}))} on {len(mine)} of {len(layers)} layers"


def check_answer(text: str, expected: str = ANSWER) -> str:
    """Raises: GateRefusedError if a real model's greedy answer does not hold `expected`; returns the answer."""
    if expected.lower() not in text.lower():
        raise GateRefusedError(f"the greedy answer {text.strip()[:80]!r} does not hold {expected!r}.")
    return text.strip()


def check_logprobs(logprobs: list[float | None]) -> str:
    """Raises: GateRefusedError unless there are log-probabilities, finite and not above 0; returns what was seen."""
    wrong = [p for p in logprobs if p is None or not math.isfinite(p) or p > 0]
    if wrong or not logprobs:
        raise GateRefusedError(f"log-probabilities of dummy weights must be finite and at most 0: got {logprobs[:8]}.")
    return f"{len(logprobs)} finite log-probabilities, mean {sum(logprobs) / len(logprobs):.3f}"
