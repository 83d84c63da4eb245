"""Reader of bench/quality: in steps and from a cache it predicts what the model predicts in one pass."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "quality"))

from rivals import RIVALS, Eviction, presets  # noqa: E402
from simulate import Reader  # noqa: E402

WINDOWS = torch.randint(0, 50, (2, 49), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def expected(network):
    """Log-probabilities of the tokens that come, [batch, n], of one pass with the model's own attention."""
    network.set_attn_implementation("eager")
    ids = torch.tensor(WINDOWS)
    with torch.inference_mode():
        logprobs = network(ids).logits.log_softmax(-1)
    return logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def found(distributions) -> torch.Tensor:
    return torch.from_numpy(distributions.target_logprob).view(len(WINDOWS), -1)


def test_reading_in_steps_is_reading_at_once_with_sliding_windows_too(network, expected):
    text = Reader(network, WINDOWS, chunk=5, top=50).read(RIVALS[0])
    torch.testing.assert_close(found(text), expected, rtol=0, atol=1e-4)


def test_evicted_tokens_leave_the_positions_of_the_others_alone(network, expected):
    everything = Eviction("all kept", 1.0, False, window=4)
    text = Reader(network, WINDOWS, chunk=5, top=50).read_after_prompt(everything)
    torch.testing.assert_close(found(text), expected[:, 24:], rtol=0, atol=1e-4)


def test_a_preset_takes_its_key_offsets_and_scales(network, expected):
    generator = torch.Generator().manual_seed(2)
    offsets = torch.randn(2, 1, 2, 16, generator=generator)
    reader = Reader(network, WINDOWS, chunk=5, top=50)
    plain = found(reader.read(presets(list(offsets * 0), None)[0]))
    moved = found(reader.read(presets(list(offsets), list(torch.rand(2, 16, generator=generator) + 0.5))[0]))
    assert 0 < (plain - expected).abs().mean() < 0.5 and 0 < (moved - expected).abs().mean() < 0.5
    assert not torch.equal(moved, plain)
