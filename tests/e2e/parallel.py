"""One model on several workers: what the tests of it share, on CPUs and on GPUs.

The tolerance is that of the crowd: three times the largest distance of a request between two engines of one worker that
read their prompts in different chunks. A worker that reads a wrong block must stand out of it.
"""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from compare import distances, worst
from engine import CUDA, Output, Phase, Request, Result, run

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from engine_bench.shapes import write_shape  # noqa: E402

CHUNKED = {"max_num_batched_tokens": 64}
UNCHUNKED = {"max_num_batched_tokens": 2048}
FAULT = "wrong block"
KINDS = ("prompt_logprobs", "logprobs")  # what is compared: of teacher-forced prompts, and of decoded tokens
SHARDED = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 128, "initializer_range": 0.05,
}  # fmt: skip


def write_model(directory: Path) -> str:
    """A Llama with random weights and a tokenizer; its heads can be shared by two workers.

    What attention reads makes most of what its weights compute, so that a wrong cache shows; larger ones (0.1) make
    rounding show just as much.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    path = write_shape("llama-tiny", directory)
    config = json.loads((path / "config.json").read_text()) | SHARDED
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_dict(config)).save_pretrained(path)
    return str(path)


def make_requests(count: int = 8) -> list[Request]:
    """Requests of 5 to 600 random tokens, teacher-forced for 16 to 19, one every two steps; the first are the short."""
    rng, requests = random.Random(0), []
    for i, length in enumerate([5, 200, 64, 128, 600, 333, 90, 450][:count]):
        tokens = rng.choices(range(10, 16_000), k=length + 16 + i % 4)
        prompt, forced = tokens[:length], tokens[length:]
        requests.append(Request(f"r{i}", prompt, forced=forced, arrive=2 * i, prompt_logprobs=True))
    return requests


class OneWorker:
    """Two runs of one worker, in different chunks, and the noise floors of prompts and of decoded tokens.

    With 8-bit codes the floor is hardly above that of bf16 arithmetic, with 4-bit ones ten times that.
    """

    def __init__(self, preset: str, requests: list[Request], tmp_path_factory):
        self.preset, self.requests, self.tmp_path_factory = preset, requests, tmp_path_factory
        self.model = write_model(tmp_path_factory.mktemp("model"))
        with ThreadPoolExecutor(2 if CUDA else 1) as pool:
            chunked, unchunked = pool.map(self.start, (CHUNKED, UNCHUNKED))
        self.outputs = chunked.phases["read"]
        self.floors = {of: max(self._distances(unchunked.phases["read"], of).values()) for of in KINDS}

    def start(self, engine: dict, environment: dict | None = None) -> Result:
        """An engine; if it has several workers, the last one reads a wrong block in the phase FAULT."""
        phases = [Phase("read", self.requests)]
        if engine.get("tensor_parallel_size", 1) > 1:
            phases.append(Phase(FAULT, self.requests, inject=FAULT, inject_rank=engine["tensor_parallel_size"] - 1))
        engine = {"kv_cache_dtype": self.preset, "skip_tokenizer_init": True} | engine
        return run(self.model, engine, phases, self.tmp_path_factory.mktemp("engine"), 300, environment)

    def _distances(self, outputs: dict[str, Output], of: str) -> dict[str, float]:
        return distances(self.outputs, outputs, of=of)

    def check(self, outputs: dict[str, Output], kinds: tuple[str, ...] | None = None) -> None:
        for of in kinds or KINDS:
            found, floor = self._distances(outputs, of), self.floors[of]
            print(f"{self.preset}, {of}: floor {floor:.4f} nats, farthest {max(found.values()):.4f}")
            assert max(found.values()) <= 3 * floor, f"{of}: floor {floor:.4f}; {worst(found)}"
