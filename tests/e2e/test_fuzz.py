"""A scheduler fuzz: random arrivals, lengths, shared prefixes, cancellations and few blocks, checked like the crowd."""

import random
from dataclasses import replace

import pytest
from compare import distances, worst
from engine import Phase, Request, run

pytestmark = pytest.mark.engine

REQUESTS = 24


def test_every_finished_request_is_its_solo_run(first_layers, text_ids, tmp_path):
    rng = random.Random(0)
    prefixes = [text_ids[i : i + length] for i, length in ((0, 96), (700, 200), (1500, 33))]
    requests = []
    for i in range(REQUESTS):
        start, length = rng.randrange(2000, 4000), rng.choice([1, 2, 15, 16, 31, 60, 120])
        prompt = rng.choice([[], *prefixes]) + text_ids[start : start + length]
        forced = text_ids[start + length : start + length + rng.randint(2, 24)]
        requests.append(Request(f"r{i}", prompt, forced=forced, arrive=rng.randrange(40)))
    solo = Phase("solo", [replace(r, arrive=0) for r in requests], sequential=True)
    cancelled = {r.id for r in requests if rng.random() < 0.2}
    requests = [replace(r, cancel=r.arrive + rng.randrange(1, 12)) if r.id in cancelled else r for r in requests]

    engine = {"kv_cache_dtype": "turboquant", "block_size": 16, "max_num_seqs": 12, "max_model_len": 512}
    chunked = engine | {"max_num_batched_tokens": 48}
    few_blocks = engine | {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 44, "enable_prefix_caching": True}
    other = run(first_layers, chunked, [solo], tmp_path)
    result = run(first_layers, few_blocks, [solo, Phase("fuzz", requests)], tmp_path)
    assert result.preemptions > 0
    floor = max(distances(result.phases["solo"], other.phases["solo"]).values())
    found = distances(result.phases["solo"], result.phases["fuzz"], cancelled)
    assert len(found) >= REQUESTS // 2
    assert max(found.values()) <= 3 * floor, f"floor {floor:.4f}; {worst(found)}"
