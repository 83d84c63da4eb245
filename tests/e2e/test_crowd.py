"""Every request of a crowd against its solo run, teacher-forced, under everything vLLM does with a cache.

A rounding cache is not bitwise invariant to batching or chunking: the chunk that a prompt is read in decides which
tokens are seen raw. So the tolerance is three times the noise floor, and the floor is measured: the largest distance
of a request between two solo runs with different chunk sizes. Injected faults must stand out of the same tolerance.
"""

from dataclasses import replace

import pytest
import torch
from compare import distances, worst
from engine import Phase, Request, Result, run

pytestmark = pytest.mark.engine

CHUNKED = {"max_num_batched_tokens": 64}
UNCHUNKED = {"max_num_batched_tokens": 2048, "enable_chunked_prefill": False}


class Runs:
    """The solo runs of one preset, and its noise floor."""

    def __init__(self, preset, model, crowd, tmp_path_factory):
        self.preset, self.model, self.crowd, self.tmp_path_factory = preset, model, crowd, tmp_path_factory
        solo = Phase("solo", crowd, sequential=True)
        arriving = _arriving(crowd)
        leaving = [replace(r, cancel=r.arrive + 5 + i) if i % 4 == 1 else r for i, r in enumerate(arriving)]
        self.leaving = {r.id for r in leaving if r.cancel is not None}
        self.chunked = self.start(
            CHUNKED,
            solo,
            Phase("all at once", crowd),
            Phase("arriving", arriving),
            Phase("cancelled", leaving),
            Phase("lost prefix", crowd, inject="lost prefix"),
            Phase("wrong block", crowd, inject="wrong block"),
        ).phases
        self.unchunked = self.start(UNCHUNKED, solo, Phase("arriving", arriving)).phases
        self.floor = max(distances(self.chunked["solo"], self.unchunked["solo"]).values())

    def start(self, engine: dict, *phases: Phase, environment: dict | None = None) -> Result:
        engine = {"kv_cache_dtype": self.preset} | engine
        directory = self.tmp_path_factory.mktemp("engine")
        result = run(self.model, engine, list(phases), directory, environment=environment)
        assert result.impls == ["TurboQuantImpl"]
        return result

    def check(self, outputs, solo=None, cancelled=frozenset()) -> None:
        found = distances(solo or self.chunked["solo"], outputs, cancelled)
        assert max(found.values()) <= 3 * self.floor, f"floor {self.floor:.4f}; {worst(found)}"


def _arriving(requests, every: int = 2):
    return [replace(r, arrive=every * i) for i, r in enumerate(requests)]


@pytest.fixture(scope="module", params=["turboquant", "turboquant:k8v8"])
def runs(request, first_layers, crowd, tmp_path_factory):
    return Runs(request.param, first_layers, crowd, tmp_path_factory)


@pytest.mark.parametrize("phase", ["all at once", "arriving"])
def test_crowd_with_chunked_prefill(runs, phase):
    runs.check(runs.chunked[phase])


def test_crowd_without_chunked_prefill(runs):
    runs.check(runs.unchunked["arriving"])


def test_crowd_with_cancellations(runs):
    assert len(runs.chunked["cancelled"]) < len(runs.crowd)
    runs.check(runs.chunked["cancelled"], cancelled=runs.leaving)


@pytest.mark.parametrize("fault", ["lost prefix", "wrong block"])
def test_the_check_can_fail(runs, fault):
    with pytest.raises(AssertionError, match="floor"):
        runs.check(runs.chunked[fault])


def test_prefix_cache_hits_and_partial_hits_in_mixed_batches(runs):
    result = runs.start(
        CHUNKED | {"enable_prefix_caching": True, "block_size": 32},
        Phase("cold", _arriving(runs.crowd)),
        Phase("warm", _arriving(runs.crowd), reset_prefix_cache=False),
    )
    hits = {i: o.cached_tokens for i, o in result.phases["warm"].items()}
    assert sum(n > 0 for n in hits.values()) >= 12 and any(0 < n < 320 for n in hits.values()), hits
    assert any(o.cached_tokens for o in result.phases["cold"].values())  # the shared 300 tokens, within the crowd
    runs.check(result.phases["cold"])
    runs.check(result.phases["warm"])


def test_forced_preemption(runs, text_ids):
    requests = [
        Request(f"p{i}", text_ids[150 * i : 150 * i + 70 + i], forced=text_ids[2000 + 40 * i : 2040 + 40 * i])
        for i in range(12)
    ]
    result = runs.start(
        {"max_num_batched_tokens": 512, "block_size": 16, "num_gpu_blocks_override": 66},
        Phase("solo", requests, sequential=True),
        Phase("crowd", requests),
    )
    assert result.preemptions >= 3
    runs.check(result.phases["crowd"], result.phases["solo"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("runner", ["1", "2"])
def test_crowd_in_cuda_graphs(runs, runner):
    """Compiled, decodes in full CUDA graphs, on both of vLLM's model runners."""
    result = runs.start(
        CHUNKED | {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}},
        Phase("arriving", _arriving(runs.crowd)),
        environment={"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "2"))},
    )
    runs.check(result.phases["arriving"])


def test_several_samples_of_a_prompt(runs):
    """Drawn in a crowd with shared prefixes; every sample's log-probabilities again, alone and teacher-forced to it."""
    requests = [replace(r, forced=None, max_tokens=12, n=3, temperature=1.0) for r in runs.crowd[2:7]]
    drawn = runs.start(CHUNKED | {"enable_prefix_caching": True}, Phase("drawn", _arriving(requests))).phases["drawn"]
    samples, alone = {}, []
    for request in requests:
        first = drawn[request.id]
        assert len({tuple(sample.tokens) for sample in (first, *first.siblings)}) == 3
        for i, sample in enumerate((first, *first.siblings)):
            samples[f"{request.id}.{i}"] = sample
            alone.append(Request(f"{request.id}.{i}", request.prompt, forced=sample.tokens))
    runs.check(samples, runs.start(CHUNKED, Phase("alone", alone, sequential=True)).phases["alone"])
