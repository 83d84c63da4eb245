"""What the end-to-end tests share: the default model, fixed text, and crowds of requests made from it."""

import json
import pydoc_data.topics
import random
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from engine import Request  # noqa: E402

SHORT = 6


@pytest.fixture(scope="session")
def model() -> str:
    from tq_vllm.cli.demo_model import demo_model

    return str(demo_model())


@pytest.fixture(scope="session")
def first_layers(model, tmp_path_factory) -> str:
    """The default model's first SHORT layers, for tests that decode one request at a time: a fifth of the time.

    What a wrong cache does to its log-probabilities shows as it does in the whole model: injected faults prove it.
    """
    source, target = Path(model), tmp_path_factory.mktemp("first_layers")
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": SHORT}
    (target / "config.json").write_text(json.dumps(config))
    left_out = tuple(f"model.layers.{i}." for i in range(SHORT, 100))
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(left_out)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (target / name).symlink_to(source / name)
    return str(target)


@pytest.fixture(scope="session")
def text_ids(model) -> list[int]:
    """Token ids of Python's own documentation of its debugger: English and code that every Python ships."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(pydoc_data.topics.topics["debugger"])["input_ids"]


@pytest.fixture(scope="session")
def crowd(text_ids) -> list[Request]:
    """16 requests of mixed prompt lengths, 3 to 600 tokens; every third one starts with the same 300 tokens.

    All are teacher-forced to the 16 to 20 tokens that follow in the text.
    """
    rng = random.Random(0)
    requests = []
    for i, length in enumerate([3, 17, 40, 64, 65, 90, 128, 150, 200, 257, 300, 333, 400, 480, 555, 600]):
        start = rng.randrange(len(text_ids) - length - 20)
        prompt = text_ids[start : start + length]
        if i % 3 == 0:
            prompt = text_ids[1000:1300] + prompt[-max(1, length // 2) :]
        end = start + length
        requests.append(Request(f"r{i}", prompt, forced=text_ids[end : end + 16 + i % 5]))
    return requests
