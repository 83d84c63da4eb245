"""Every request of a crowd against its solo run, teacher-forced, under everything vLLM does with a cache.

A rounding cache is not bitwise invariant to batching or chunking: the chunk that a prompt is read in decides which
tokens are seen raw. So the tolerance is three times the noise floor, and the floor is measured: the largest distance
of a request between two solo runs with different chunk sizes. Injected faults must stand out of the same tolerance.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from compare import distances, worst
from engine import CUDA, FAULTS, GRAPHS, Phase, Request, Result, run

from tq_vllm.config import PRESETS

pytestmark = pytest.mark.engine

CHUNKED = {"max_num_batched_tokens": 64}
UNCHUNKED = {"max_num_batched_tokens": 2048, "enable_chunked_prefill": False}
FEW_BLOCKS = {"max_num_batched_tokens": 512, "block_size": 32}

# On a GPU once more, on both of vLLM's model runners, with and without torch.compile and CUDA graphs (decodes in full
# ones): mixed batches, chunked prefill, prefix hits and preemption in one engine. The tests above have the second
# runner without graphs.
ALL_AT_ONCE = CHUNKED | {"enable_prefix_caching": True, "block_size": 32}
ON_GPU = {"first runner": {}, "first runner, CUDA graphs": GRAPHS, "second runner, CUDA graphs": GRAPHS}
ENGINES_AT_ONCE = 4  # of a GPU: a core for each that compiles, and one for its helpers


def _few_blocks(preset: str, engine: dict) -> dict:
    """Blocks for one sequence of 1024 tokens and a few of the requests of `_preempted`, not for all of them."""
    blocks = 34
    if PRESETS[preset].recent_tokens:  # in blocks of 16: 32 slots of 68 bytes hold 16 of 132
        in_flight = engine["max_num_batched_tokens"] * (2 if CUDA else 1)
        blocks += -(-(PRESETS[preset].recent_tokens - 1 + in_flight) // 16) + 1
    return engine | {"num_gpu_blocks_override": blocks}


class Runs:
    """The solo runs of one preset, its noise floor, and the engines of the tests below.

    On a CPU an engine starts when its test asks for it; on a GPU, which has room for several, all start at once.
    """

    def __init__(self, preset, model, crowd, text_ids, tmp_path_factory):
        self.preset, self.model, self.crowd, self.tmp_path_factory = preset, model, crowd, tmp_path_factory
        solo, arriving = Phase("solo", crowd, sequential=True), Phase("arriving", _arriving(crowd))
        leaving = [replace(r, cancel=r.arrive + 5 + i) if i % 4 == 1 else r for i, r in enumerate(arriving.requests)]
        self.leaving = {r.id for r in leaving if r.cancel is not None}
        faults = [Phase(fault, crowd, inject=fault) for fault in FAULTS]
        rereading = [replace(arriving, name="cold"), replace(arriving, name="warm", reset_prefix_cache=False)]
        preempted, few = _preempted(text_ids), _few_blocks(preset, FEW_BLOCKS)
        self.jobs = {
            "chunked": (CHUNKED, [solo, Phase("all at once", crowd), arriving, Phase("cancelled", leaving), *faults]),
            "unchunked": (UNCHUNKED, [solo, arriving]),
            "prefixes": (CHUNKED | {"enable_prefix_caching": True, "block_size": 32}, rereading),
            "preemption": (few, [replace(solo, requests=preempted), Phase("crowd", preempted)]),
            "samples": (CHUNKED | {"enable_prefix_caching": True}, [Phase("drawn", _arriving(_sampled(crowd)))]),
        }
        for variant in ON_GPU if CUDA else ():
            few = _few_blocks(preset, ALL_AT_ONCE) | ON_GPU[variant]
            self.jobs[variant] = (few, [*rereading, Phase("crowd", preempted), faults[-1]])
        self.pool = ThreadPoolExecutor(ENGINES_AT_ONCE if CUDA else 1)
        self.results = {}
        for name in self.jobs if CUDA else ():
            self._submit(name)
        self.chunked, self.unchunked = self["chunked"].phases, self["unchunked"].phases
        self.floor = max(distances(self.chunked["solo"], self.unchunked["solo"]).values())
        print(f"{preset}: noise floor {self.floor:.4f} nats")

    def _submit(self, name: str) -> None:
        engine, phases = self.jobs[name]
        environment = {"VLLM_USE_V2_MODEL_RUNNER": str(int(name.startswith("second")))} if name in ON_GPU else None
        directory = self.tmp_path_factory.mktemp("engine")
        self.results[name] = self.pool.submit(self._run, directory, engine, phases, environment)

    def _run(self, directory, engine: dict, phases: list[Phase], environment: dict | None = None) -> Result:
        engine = {"kv_cache_dtype": self.preset} | engine
        result = run(self.model, engine, phases, directory, environment=environment)
        assert result.impls == ["TurboQuantImpl"]
        return result

    def __getitem__(self, name: str) -> Result:
        """The result of one of the jobs."""
        if name not in self.results:
            self._submit(name)
        return self.results[name].result()

    def start(self, engine: dict, *phases: Phase) -> Result:
        """One more engine, for what a job answered."""
        return self._run(self.tmp_path_factory.mktemp("engine"), engine, list(phases))

    def check(self, outputs, solo=None, cancelled=frozenset()) -> None:
        found = distances(solo or self.chunked["solo"], outputs, cancelled)
        assert max(found.values()) <= 3 * self.floor, f"floor {self.floor:.4f}; {worst(found)}"


def _arriving(requests, every: int = 2):
    return [replace(r, arrive=every * i) for i, r in enumerate(requests)]


def _sampled(requests):
    return [replace(r, forced=None, max_tokens=12, n=3, temperature=1.0) for r in requests[2:7]]


def _preempted(text_ids):
    """12 requests that do not fit together into `_few_blocks`."""
    return [
        Request(f"p{i}", text_ids[150 * i : 150 * i + 70 + i], forced=text_ids[2000 + 40 * i : 2040 + 40 * i])
        for i in range(12)
    ]


RECENT = "turboquant:k4v4-r128"  # codes of the default preset, and a cache of the newest tokens


@pytest.fixture(scope="module", params=[RECENT, "turboquant:k8v8", *(["turboquant"] if CUDA else [])])
def runs(request, first_layers, crowd, text_ids, tmp_path_factory):
    runs = Runs(request.param, first_layers, crowd, text_ids, tmp_path_factory)
    yield runs
    runs.pool.shutdown(cancel_futures=True)


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


def _check_prefix_hits(result: Result) -> None:
    hits = {i: o.cached_tokens for i, o in result.phases["warm"].items()}
    assert sum(n > 0 for n in hits.values()) >= 12 and any(0 < n < 320 for n in hits.values()), hits
    assert any(o.cached_tokens for o in result.phases["cold"].values())  # the shared 300 tokens, within the crowd


def test_prefix_cache_hits_and_partial_hits_in_mixed_batches(runs):
    _check_prefix_hits(runs["prefixes"])
    runs.check(runs["prefixes"].phases["cold"])
    runs.check(runs["prefixes"].phases["warm"])


def test_forced_preemption(runs):
    assert runs["preemption"].preemptions >= 3
    runs.check(runs["preemption"].phases["crowd"], runs["preemption"].phases["solo"])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("variant", ON_GPU)
def test_everything_on_both_runners_and_in_cuda_graphs(runs, variant):
    result = runs[variant]
    assert result.preemptions and any(o.cached_tokens for o in result.phases["warm"].values())
    runs.check(result.phases["cold"])
    runs.check(result.phases["warm"])
    runs.check(result.phases["crowd"], runs["preemption"].phases["solo"])
    with pytest.raises(AssertionError, match="floor"):  # graphs read what the fault writes
        runs.check(result.phases["wrong block"])


def test_several_samples_of_a_prompt(runs):
    """Drawn in a crowd with shared prefixes; every sample's log-probabilities again, alone and teacher-forced to it."""
    if runs.preset != RECENT and not CUDA:
        pytest.skip("on a CPU, for time, with the preset of two caches alone")
    drawn = runs["samples"].phases["drawn"]
    samples, alone = {}, []
    for request in _sampled(runs.crowd):
        first = drawn[request.id]
        assert len({tuple(sample.tokens) for sample in (first, *first.siblings)}) == 3
        for i, sample in enumerate((first, *first.siblings)):
            samples[f"{request.id}.{i}"] = sample
            alone.append(Request(f"{request.id}.{i}", request.prompt, forced=sample.tokens))
    runs.check(samples, runs.start(CHUNKED, Phase("alone", alone, sequential=True)).phases["alone"])
