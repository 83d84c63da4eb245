"""Every request of a crowd against its solo run, teacher-forced, under everything vLLM does with a cache.

A rounding cache is not bitwise invariant to batching or chunking: the chunk that a prompt is read in decides which
tokens are seen raw. So the tolerance is three times the noise floor, and the floor is measured: the largest distance
of a request between two solo runs with different chunk sizes. Injected faults must stand out of the same tolerance.
"""

from dataclasses import replace

import pytest
from compare import distances, teacher_forced, worst
from engine import Phase, Result, run

pytestmark = pytest.mark.engine

CHUNKED = {"max_num_batched_tokens": 64}
UNCHUNKED = {"max_num_batched_tokens": 2048, "enable_chunked_prefill": False}


class Runs:
    """The solo runs of one preset, and its noise floor."""

    def __init__(self, preset, model, crowd, tmp_path_factory):
        self.preset, self.model, self.crowd, self.tmp_path_factory = preset, model, crowd, tmp_path_factory
        self.solo = {}
        forced = self.start(CHUNKED, lambda _: [Phase("solo", crowd, sequential=True)]).phases["solo"]
        self.solo = forced
        self.unchunked = self.start(
            UNCHUNKED,
            lambda crowd: [Phase("solo", crowd, sequential=True), Phase("crowd", _arriving(crowd))],
        ).phases
        self.floor = max(distances(self.solo, self.unchunked["solo"]).values())

    def start(self, engine: dict, phases) -> Result:
        requests = teacher_forced(self.crowd, self.solo) if self.solo else self.crowd
        engine = {"kv_cache_dtype": self.preset} | engine
        result = run(self.model, engine, phases(requests), self.tmp_path_factory.mktemp("engine"))
        assert result.impls == ["TurboQuantImpl"]
        return result

    def check(self, outputs) -> None:
        found = distances(self.solo, outputs)
        assert max(found.values()) <= 3 * self.floor, f"floor {self.floor:.4f}; {worst(found)}"


def _arriving(requests, every: int = 2):
    return [replace(r, arrive=every * i) for i, r in enumerate(requests)]


@pytest.fixture(scope="module", params=["turboquant", "turboquant:k8v8"])
def runs(request, model, crowd, tmp_path_factory):
    return Runs(request.param, model, crowd, tmp_path_factory)


def test_crowd_without_chunked_prefill(runs):
    runs.check(runs.unchunked["crowd"])


def test_crowd_with_chunked_prefill_faults_and_cancellations(runs):
    def phases(crowd):
        arriving = _arriving(crowd)
        leaving = [replace(r, cancel=r.arrive + 5 + i) if i % 4 == 1 else r for i, r in enumerate(arriving)]
        return [
            Phase("all at once", crowd),
            Phase("arriving", arriving),
            Phase("cancelled", leaving),
            Phase("lost prefix", crowd, inject="lost prefix"),
            Phase("wrong block", crowd, inject="wrong block"),
        ]

    result = runs.start(CHUNKED, phases)
    runs.check(result.phases["all at once"])
    runs.check(result.phases["arriving"])
    assert len(result.phases["cancelled"]) < len(runs.crowd)
    runs.check(result.phases["cancelled"])
    for fault in ("lost prefix", "wrong block"):
        with pytest.raises(AssertionError, match="floor"):
            runs.check(result.phases[fault])


def test_prefix_cache_hits_and_partial_hits_in_mixed_batches(runs):
    def phases(crowd):
        return [
            Phase("cold", _arriving(crowd)),
            Phase("warm", _arriving(crowd), reset_prefix_cache=False),
        ]

    result = runs.start(CHUNKED | {"enable_prefix_caching": True, "block_size": 32}, phases)
    hits = {i: o.cached_tokens for i, o in result.phases["warm"].items()}
    assert sum(n > 0 for n in hits.values()) >= 12 and any(0 < n < 320 for n in hits.values()), hits
    assert any(o.cached_tokens for o in result.phases["cold"].values())  # the shared 300 tokens, within the crowd
    runs.check(result.phases["cold"])
    runs.check(result.phases["warm"])


def test_forced_preemption(runs):
    few_blocks = {"block_size": 16, "num_gpu_blocks_override": 72, "max_num_batched_tokens": 512}
    result = runs.start(few_blocks, lambda crowd: [Phase("crowd", crowd)])
    assert result.preemptions > 0
    runs.check(result.phases["crowd"])
