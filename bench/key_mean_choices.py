"""Which mean to centre keys by: KL divergence for the choices behind tq_vllm/plugin/key_mean.py, without vLLM.

    python bench/key_mean_choices.py

transformers runs the default model in float32 over 512 tokens of documentation in steps of 64; keys and values of
earlier steps come out of tq_vllm.core. Means are taken before RoPE and rotated as the plugin does. The last rows are
2048 tokens of another page by position, at 3 bits.
"""

import pydoc_data.topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tq_vllm.cli.demo_model import demo_model
from tq_vllm.config import TurboQuantConfig, get_config
from tq_vllm.core.cache import decode_kv, encode_kv
from tq_vllm.core.splitmix import splitmix64
from tq_vllm.format import SEGMENT_TOKENS

PRESETS = ("turboquant:k8v8", "turboquant:k8v4", "turboquant", "turboquant:k3v3")
STEP, TOKENS, LONG = 64, 512, 2048
SEGMENTS = LONG // SEGMENT_TOKENS


class CompressedLayer(DynamicLayer):
    """Writes with one key offset and reads with another; a step sees its own tokens raw."""

    def __init__(self, config: TurboQuantConfig, written: torch.Tensor | None, read: torch.Tensor | None):
        super().__init__()
        self.turboquant, self.written, self.read, self.past = config, written, read, []

    def update(self, key_states, value_states, *args, **kwargs):
        k, v = (x[0].transpose(0, 1) for x in (key_states, value_states))  # [num_tokens, num_kv_heads, head_dim]
        positions = self.get_seq_length() + torch.arange(k.shape[0])
        codes = encode_kv(k, v, self.turboquant, positions, self.written)
        stored = [x.transpose(0, 1)[None] for x in decode_kv(codes, self.turboquant, positions, self.read)]
        own = key_states, value_states
        seen = [torch.cat([*(past[i] for past in self.past), own[i]], 2) for i in range(2)]
        self.past.append(stored)
        return tuple(seen)

    def get_seq_length(self) -> int:
        return sum(k.shape[2] for k, _ in self.past)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def keys_before_rope(network, ids: torch.Tensor) -> torch.Tensor:
    """[num_layers, num_tokens, num_kv_heads, head_dim] f32 of ids [num_tokens]."""
    outputs, layers = [], network.model.layers
    handles = [x.self_attn.k_proj.register_forward_hook(lambda m, a, output: outputs.append(output[0])) for x in layers]
    network(ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack(outputs).unflatten(-1, (network.config.num_key_value_heads, -1)).float()


def offsets(network, keys: torch.Tensor) -> torch.Tensor:
    """[num_layers, num_segments, num_kv_heads, head_dim]: the mean of keys without the first, rotated, averaged."""
    mean = keys[:, 1:].mean(1)[:, :, None]  # [num_layers, num_kv_heads, 1, head_dim]
    cos, sin = network.model.rotary_emb(mean, torch.arange(LONG)[None])
    rotated, _ = apply_rotary_pos_emb(mean, mean, cos, sin)
    return rotated.unflatten(2, (SEGMENTS, SEGMENT_TOKENS)).mean(3).transpose(1, 2).contiguous()


def without_first_segment(offset: torch.Tensor) -> torch.Tensor:
    return offset * (torch.arange(SEGMENTS) > 0)[:, None, None]


def divergence(network, text: torch.Tensor, preset: str, written, read) -> torch.Tensor:
    """KL divergence to the uncompressed cache, nats, at each position of text [num_tokens]."""
    reference = network(text[None]).logits[0].log_softmax(-1)
    layers = [CompressedLayer(get_config(preset), w, r) for w, r in zip(written, read, strict=True)]
    cache = Cache(layers=layers)
    steps = [network(part, past_key_values=cache).logits[0] for part in text[None].split(STEP, 1)]
    return (reference.exp() * (reference - torch.cat(steps).log_softmax(-1))).sum(-1)


@torch.inference_mode()
def main() -> None:
    """Print a row a choice, with a column a preset."""
    path = str(demo_model())
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocab = network.config.vocab_size
    tokenizer, topics = AutoTokenizer.from_pretrained(path), pydoc_data.topics.topics
    text = torch.tensor(tokenizer(topics["debugger"])["input_ids"][:TOKENS])
    uniform = (splitmix64(0x6B65796D, 256) & (2**63 - 1)) % vocab
    octave = uniform % vocab.bit_length()
    by_rank = ((1 << octave) + ((splitmix64(1, 256) & (2**63 - 1)) % (1 << octave))) % vocab
    means = {
        "64 uniform ids": uniform[:64],
        "256 uniform ids": uniform,
        "64 ids, 1 / rank": by_rank[:64],
        "ids 1 to 256": torch.arange(1, 257),
        "the text itself": text,
    }
    found = {name: offsets(network, keys_before_rope(network, ids)) for name, ids in means.items()}
    choices = {name: (without_first_segment(x),) * 2 for name, x in found.items()}
    choices["64 uniform ids, first segment too"] = (found["64 uniform ids"],) * 2
    coarse = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    bf16 = without_first_segment(offsets(network, keys_before_rope(coarse, uniform[:64])))
    choices["64 uniform ids, read with the means of bf16"] = choices["64 uniform ids"][0], bf16
    choices["none"] = ([None] * network.config.num_hidden_layers,) * 2
    for name, choice in choices.items():
        row = [f"{preset} {divergence(network, text, preset, *choice).mean():.5f}" for preset in PRESETS]
        print(f"{name:45s}", *row, sep="  ", flush=True)
    long_text = torch.tensor(tokenizer(topics["specialnames"])["input_ids"][:LONG])
    for name in ("64 uniform ids", "none"):
        by_position = divergence(network, long_text, "turboquant:k3v3", *choices[name]).split(LONG // 8)
        print(f"{name:45s}", *(f"{part.mean():.4f}" for part in by_position), sep="  ", flush=True)


if __name__ == "__main__":
    main()
