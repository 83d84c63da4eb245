"""What could make a preset better: KL divergence with one thing changed at a time, without vLLM.

    python bench/levers.py

transformers runs the default model in float32 over 1024 tokens of documentation in steps of 32; keys and values of
earlier steps come out of tq_vllm.core, keys centred as the plugin does it. Rows "by the text" are bounds: no cache
knows its text beforehand.
"""

import dataclasses
import pydoc_data.topics

import torch
from key_mean_choices import keys_before_rope, offsets, without_first_segment
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

from tq_vllm.cli.demo_model import demo_model
from tq_vllm.config import TurboQuantConfig, get_config
from tq_vllm.core.cache import kv_roundtrip, offset_at
from tq_vllm.core.splitmix import splitmix64

STEP, TOKENS = 32, 1024


class Layer(DynamicLayer):
    """Keeps keys and values as codes, and as they came where a lever says so; a step sees its own tokens raw.

    `basis` [num_kv_heads, head_dim, head_dim]: keys are multiplied by it before they are quantized, and by its inverse
    after. The oldest `first` and the newest `recent` tokens are read raw.
    """

    def __init__(
        self,
        config: TurboQuantConfig,
        offset: torch.Tensor | None,
        basis: torch.Tensor | None = None,
        first: int = 0,
        recent: int = 0,
    ):
        super().__init__()
        self.turboquant, self.offset, self.basis, self.first, self.recent = config, offset, basis, first, recent
        self.raw, self.stored = [], []

    def update(self, key_states, value_states, *args, **kwargs):
        past = self.get_seq_length()
        k, v = (x[0].transpose(0, 1) for x in (key_states, value_states))  # [num_tokens, num_kv_heads, head_dim]
        centre = 0 if self.offset is None else offset_at(self.offset, past + torch.arange(k.shape[0]))
        k = k - centre
        if self.basis is not None:
            k = torch.einsum("hij,thj->thi", self.basis, k)
        k, v = kv_roundtrip(k.contiguous(), v, self.turboquant)
        if self.basis is not None:
            k = torch.einsum("hij,thj->thi", torch.linalg.inv(self.basis), k)
        self.raw.append((key_states, value_states))
        age = torch.arange(past + k.shape[0])
        raw = ((age < self.first) | (age >= past - self.recent))[:, None]
        stored = [x.transpose(0, 1)[None] for x in (k + centre, v)]
        seen = [
            torch.where(raw, torch.cat([r[i] for r in self.raw], 2), torch.cat([*(s[i] for s in self.stored), own], 2))
            for i, own in enumerate((key_states, value_states))
        ]
        self.stored.append(stored)
        return tuple(seen)

    def get_seq_length(self) -> int:
        return sum(k.shape[2] for k, _ in self.stored)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def queries_and_keys(network, ids: torch.Tensor, before_rope: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_layers, num_tokens, num_heads, head_dim] and [..., num_kv_heads, head_dim] f32 of ids [num_tokens]."""
    projected = [[], []]
    handles = [
        layer.self_attn.get_submodule(name).register_forward_hook(lambda m, a, output, to=to: to.append(output[0]))
        for layer in network.model.layers
        for name, to in zip(("q_proj", "k_proj"), projected, strict=True)
    ]
    network(ids[None])
    for handle in handles:
        handle.remove()
    q, k = (torch.stack(x).unflatten(-1, (-1, network.config.head_dim)).float() for x in projected)
    if before_rope:
        return q, k
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = network.model.rotary_emb(q, torch.arange(ids.shape[0])[None])
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def channel_scales(q: torch.Tensor, k: torch.Tensor, pairs: bool) -> torch.Tensor:
    """Diagonal bases [num_layers, num_kv_heads, head_dim, head_dim] with the least mean error of q . k.

    An error of variance s in every scaled channel costs sum(q_i^2 / d_i^2) s, and s grows with sum(d_i^2 k_i^2): least
    for d_i^2 = rms(q_i) / rms(k_i). With `pairs` the two channels that RoPE turns into each other get the same scale.
    """
    q2 = q.unflatten(2, (k.shape[2], -1)).square().mean((1, 3))
    k2 = k.square().mean(1)
    if pairs:
        q2, k2 = (torch.cat([sum(x.chunk(2, -1))] * 2, -1) for x in (q2, k2))
    q2, k2 = (x + 1e-4 * x.mean(-1, keepdim=True) for x in (q2, k2))  # channels may be dead
    return torch.diag_embed((q2 / k2) ** 0.25)


def matrices(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Bases like `channel_scales`, of all matrices: the geometric mean of one covariance and the other's inverse."""
    q = q.unflatten(2, (k.shape[2], -1)).flatten(1, 1).transpose(2, 3).flatten(1, 2)  # groups beside tokens
    cq, ck = (torch.einsum("lthi,lthj->lhij", x, x).double() for x in (q, k))
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    cq, ck = (c + 1e-4 * c.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye for c in (cq, ck))
    root = _square_root(ck)
    inverse = torch.linalg.inv(root)
    return _square_root(inverse @ _square_root(root @ cq @ root) @ inverse).float()


def _square_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


@torch.inference_mode()
def main() -> None:
    """Print a row a lever: mean KL, that of the first half, and the 99th percentile, nats."""
    path = str(demo_model())
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = network.config
    text = torch.tensor(AutoTokenizer.from_pretrained(path)(pydoc_data.topics.topics["debugger"])["input_ids"][:TOKENS])
    ids = (splitmix64(0x6B65796D, 64) & (2**63 - 1)) % config.vocab_size
    offset = without_first_segment(offsets(network, keys_before_rope(network, ids)))
    q, k = (x[:, 1:] for x in queries_and_keys(network, ids, before_rope=True))
    by_pass = channel_scales(q, k - k.mean(1, keepdim=True), pairs=True)
    q, k = queries_and_keys(network, text, before_rope=False)
    k = k - torch.stack([offset_at(x, torch.arange(TOKENS)) for x in offset])
    none = [None] * config.num_hidden_layers
    preset = get_config("turboquant")
    rows = {
        "turboquant (K4V4)": (preset, offset, none, {}),
        "keys not centred": (preset, none, none, {}),
        "K5V3, the same bytes": (dataclasses.replace(preset, key_bits=5, value_bits=3), offset, none, {}),
        "K5V4": (dataclasses.replace(preset, key_bits=5), offset, none, {}),
        "key channels scaled by the pass": (preset, offset, by_pass, {}),
        "key channels scaled by the text": (preset, offset, channel_scales(q, k, pairs=False), {}),
        "key matrices by the text": (preset, offset, matrices(q, k), {}),
        "first token raw": (preset, offset, none, {"first": 1}),
        "first 4 tokens raw": (preset, offset, none, {"first": 4}),
        "first 64 tokens raw": (preset, offset, none, {"first": 64}),
        "newest 32 tokens raw": (preset, offset, none, {"recent": 32}),
        "newest 128 tokens raw": (preset, offset, none, {"recent": 128}),
    }
    reference = network(text[None]).logits[0].log_softmax(-1)
    for name, (preset, offsets_, bases, raw) in rows.items():
        layers = [Layer(preset, o, basis, **raw) for o, basis in zip(offsets_, bases, strict=True)]
        cache = Cache(layers=layers)
        steps = torch.cat([network(part, past_key_values=cache).logits[0] for part in text[None].split(STEP, 1)])
        kl = (reference.exp() * (reference - steps.log_softmax(-1))).sum(-1)
        print(f"{name:32s} {kl.mean():.5f}  {kl[: TOKENS // 2].mean():.5f}  {kl.quantile(0.99):.4f}", flush=True)


if __name__ == "__main__":
    main()
