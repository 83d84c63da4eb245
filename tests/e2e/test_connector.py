"""A cache that leaves the engine and comes back: vLLM's own KV connectors carry TurboQuant pages.

vLLM's ExampleConnector writes the pages of whole blocks to files and reads them into another engine. That engine has
to answer as one that read the prompt itself, and must not if the files hold other pages.
"""

import pytest
import safetensors.torch
import torch
from compare import distances, worst
from engine import CUDA, Phase, Request, run

PRESET = "turboquant:k8v8"
CLOSE = 0.05  # nats, as in test_features.py
BLOCK = 32


def test_pages_go_through_a_connector(first_layers, text_ids, tmp_path):
    folder = tmp_path / "pages"
    prompts = [text_ids[60 * i : 60 * i + 5 * BLOCK + 7 * i] for i in range(3)]
    phases = [
        Phase(
            "read", [Request(f"r{i}", p, forced=text_ids[900 + 40 * i : 924 + 40 * i]) for i, p in enumerate(prompts)]
        )
    ]
    engine = {"kv_cache_dtype": PRESET, "block_size": BLOCK, "enable_prefix_caching": False}
    connector = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }  # fmt: skip

    def read(**more):
        return run(first_layers, engine | more, phases, tmp_path).phases["read"]

    alone, writes, reads = read(), read(kv_transfer_config=connector), read(kv_transfer_config=connector)
    assert all(output.cached_tokens == 0 for output in writes.values())
    assert all(output.cached_tokens >= 4 * BLOCK for output in reads.values())
    for outputs in (writes, reads):
        found = distances(alone, outputs)
        assert max(found.values()) < CLOSE, worst(found)

    files = list(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        pages = safetensors.torch.load_file(file)["kv_cache"]  # [num_tokens, num_kv_heads, slot_bytes]
        assert pages.dtype == torch.uint8
        first = pages[:BLOCK].repeat(len(pages) // BLOCK, 1, 1)  # whole pages, but those of other tokens
        safetensors.torch.save_file({"kv_cache": first}, file)
    assert max(distances(alone, read(kv_transfer_config=connector)).values()) > 3 * CLOSE


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_pages_are_offloaded_to_the_cpu(first_layers, text_ids, tmp_path):
    """vLLM's OffloadingConnector: pages that the GPU has lost come back from the CPU's memory, and are the same."""
    prompts = [text_ids[400 * i : 400 * i + 10 * BLOCK + 7 * i] for i in range(3)]
    requests = [Request(f"r{i}", p, forced=text_ids[1300 + 40 * i : 1324 + 40 * i]) for i, p in enumerate(prompts)]
    phases = [Phase("stored", requests), Phase("loaded", requests)]  # a phase begins with an empty prefix cache
    connector = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 256 << 20},
    }  # fmt: skip
    engine = {"kv_cache_dtype": PRESET, "block_size": BLOCK, "enable_prefix_caching": True}
    result = run(first_layers, engine | {"kv_transfer_config": connector}, phases, tmp_path)
    stored, loaded = result.phases["stored"], result.phases["loaded"]
    assert all(output.cached_tokens == 0 for output in stored.values())
    assert all(output.cached_tokens >= 9 * BLOCK for output in loaded.values())
    found = distances(stored, loaded)
    assert max(found.values()) < CLOSE, worst(found)
