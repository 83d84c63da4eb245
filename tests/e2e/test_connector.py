"""A cache that leaves the engine and comes back: vLLM's own KV connectors carry TurboQuant pages.

vLLM's ExampleConnector writes the pages of whole blocks to files and reads them into another engine, its
OffloadingConnector keeps what a GPU has lost in the CPU's memory. An engine that gets its pages so has to answer as one
that read the prompt itself, and must not if the pages are others.

It reads its prompts in other chunks all the same: the tails alone, after codes. So the tolerance is that of the crowd:
three times the largest distance of a request between two engines without a connector that cut prompts differently.
"""

import pytest
import safetensors.torch
import torch
from compare import distances, worst
from engine import CUDA, FAULTS, Phase, Request, Result, run

pytestmark = pytest.mark.engine

BLOCK = 32
# float32: bf16 activations alone move log-probabilities half as far as a wrong block does, 8-bit codes a twentieth.
ENGINE = {"kv_cache_dtype": "turboquant:k8v8", "block_size": BLOCK, "dtype": "float32"}


class Alone:
    """Three prompts of ten blocks and a bit, read without a connector, and the noise floor of what is answered."""

    def __init__(self, model, text_ids, directory):
        self.model, self.directory = model, directory
        prompts = [text_ids[400 * i : 400 * i + 10 * BLOCK + 7 * i] for i in range(3)]
        self.requests = [
            Request(f"r{i}", p, forced=text_ids[1300 + 40 * i : 1324 + 40 * i]) for i, p in enumerate(prompts)
        ]
        self.outputs = self.read()
        self.floor = max(distances(self.outputs, self.read(max_num_batched_tokens=64)).values())

    def run(self, *phases: Phase, **engine) -> Result:
        return run(self.model, ENGINE | engine, list(phases), self.directory)

    def read(self, **engine):
        return self.run(Phase("read", self.requests), **engine).phases["read"]

    def check(self, outputs) -> None:
        found = distances(self.outputs, outputs)
        print(f"floor {self.floor:.4f} nats, farthest {max(found.values()):.4f}")
        assert max(found.values()) <= 3 * self.floor, f"floor {self.floor:.4f}; {worst(found)}"


@pytest.fixture(scope="module")
def alone(first_layers, text_ids, tmp_path_factory):
    return Alone(first_layers, text_ids, tmp_path_factory.mktemp("engine"))


def test_pages_go_through_a_connector(alone, tmp_path):
    folder = tmp_path / "pages"
    connector = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }  # fmt: skip
    writes, reads = alone.read(kv_transfer_config=connector), alone.read(kv_transfer_config=connector)
    assert all(output.cached_tokens == 0 for output in writes.values())
    assert all(output.cached_tokens >= 9 * BLOCK for output in reads.values())
    alone.check(writes)
    alone.check(reads)

    files = list(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        pages = safetensors.torch.load_file(file)["kv_cache"]  # [num_tokens, num_kv_heads, slot_bytes]
        assert pages.dtype == torch.uint8
        first = pages[:BLOCK].repeat(len(pages) // BLOCK, 1, 1)  # whole pages, but those of other tokens
        safetensors.torch.save_file({"kv_cache": first}, file)
    with pytest.raises(AssertionError, match="floor"):
        alone.check(alone.read(kv_transfer_config=connector))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_pages_are_offloaded_to_the_cpu(alone):
    """vLLM's OffloadingConnector: pages that the GPU has lost come back from the CPU's memory, and are the same."""
    connector = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 256 << 20},
    }  # fmt: skip
    # Each phase begins with an empty prefix cache; in the last ones what is loaded is read wrongly.
    phases = [Phase(name, alone.requests) for name in ("stored", "loaded")]
    phases += [Phase(fault, alone.requests, inject=fault) for fault in FAULTS]
    result = alone.run(*phases, enable_prefix_caching=True, kv_transfer_config=connector)
    stored, *loaded = result.phases.values()
    assert all(output.cached_tokens == 0 for output in stored.values())
    assert all(output.cached_tokens >= 9 * BLOCK for outputs in loaded for output in outputs.values())
    alone.check(stored)
    alone.check(result.phases["loaded"])
    for fault in FAULTS:
        with pytest.raises(AssertionError, match="floor"):
            alone.check(result.phases[fault])
