"""A scheduler fuzz: random arrivals, lengths, shared prefixes, cancellations and few blocks, checked like the crowd."""

import random
from dataclasses import replace

import pytest
from compare import distances, teacher_forced, worst
from engine import Phase, Request, run

pytestmark = pytest.mark.engine

REQUESTS = 36


@pytest.mark.parametrize("seed", [0, 1])
def test_every_finished_request_is_its_solo_run(seed, model, text_ids, tmp_path):
    rng = random.Random(seed)
    prefixes = [text_ids[i : i + length] for i, length in ((0, 96), (700, 200), (1500, 33))]
    requests = []
    for i in range(REQUESTS):
        start, length = rng.randrange(2000, 4000), rng.choice([1, 2, 15, 16, 31, 60, 120, 250])
        prompt = rng.choice([[], *prefixes]) + text_ids[start : start + length]
        requests.append(Request(f"r{i}", prompt, max_tokens=rng.randint(2, 14)))
    engine = {"kv_cache_dtype": "turboquant", "block_size": 16, "enable_prefix_caching": True, "max_num_seqs": 12}
    chunked, unchunked = {"max_num_batched_tokens": 160}, {"max_num_batched_tokens": 2048}
    without_cache = engine | unchunked | {"enable_prefix_caching": False}
    solo = run(model, without_cache, [Phase("solo", requests, sequential=True)], tmp_path).phases["solo"]
    forced = teacher_forced(requests, solo)
    arriving = [replace(r, arrive=rng.randrange(60)) for r in forced]
    cancelled = {r.id for r in arriving if rng.random() < 0.2}
    arriving = [replace(r, cancel=r.arrive + rng.randrange(1, 12)) if r.id in cancelled else r for r in arriving]
    result = run(
        model,
        engine | chunked | {"num_gpu_blocks_override": 40},
        [Phase("solo", forced, sequential=True), Phase("fuzz", arriving)],
        tmp_path,
    )
    assert result.preemptions > 0
    floor = max(distances(solo, result.phases["solo"]).values())
    found = distances(solo, result.phases["fuzz"])
    assert len(found) >= REQUESTS // 2
    assert max(found.values()) <= 3 * floor, f"floor {floor:.4f}; {worst(found)}"
