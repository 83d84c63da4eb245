"""What could make a preset better: KL divergence with one thing changed at a time, without vLLM.

    python bench/levers.py [MODEL [TOKENS]]    # default, or "": the embedded model (bench/quality/second_model.py
                                               # prints another one) on 512 tokens

transformers runs the model in float32 over tokens of documentation in steps of 32; keys and values of earlier steps
come out of tq_vllm.core, keys centred as the plugin does it. Rows "by the text" are bounds: no cache knows its text
beforehand.
"""

import dataclasses
import pydoc_data.topics
import sys
from types import SimpleNamespace

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tq_vllm.cli.demo_model import demo_model
from tq_vllm.config import TurboQuantConfig, get_config
from tq_vllm.core.cache import kv_roundtrip, offset_at
from tq_vllm.format import SEGMENT_TOKENS
from tq_vllm.plugin.key_mean import PASS_TOKENS, first_token, pass_token_ids

STEP, TOKENS = 32, 512
LONG_TEXT_STARTS = 20_000  # token of all topics, in order of their names


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


class Model:
    """A model in float32 whose queries and keys can be looked at."""

    def __init__(self, path: str):
        self.network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.config, self.seen = self.network.config, {}
        AttentionInterface.register("noted", self._attend)
        AttentionMaskInterface.register("noted", sdpa_mask)
        self.network.set_attn_implementation("noted")

    def _attend(self, module, query, key, value, mask, **kwargs):
        self.seen[module.layer_idx] = [x[0].transpose(0, 1) for x in (query, key)]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    def queries_and_keys(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """After RoPE, [num_layers, num_tokens, num_heads, head_dim] and [..., num_kv_heads, head_dim] f32."""
        self.network(ids[None])
        return tuple(torch.stack(x) for x in zip(*(self.seen[i] for i in sorted(self.seen)), strict=True))

    def rotate(self, layer: int, x: torch.Tensor, sign: int = 1) -> torch.Tensor:
        """RoPE of x [num_tokens, num_heads, head_dim] at positions 0, 1, ...; with sign -1 back to position 0."""
        kinds = getattr(self.config, "layer_types", None) if "gemma" in self.config.model_type else None
        more = (kinds[layer],) if kinds else ()
        cos, sin = self.network.model.rotary_emb(x, torch.arange(x.shape[0])[None], *more)
        return apply_rotary_pos_emb(x[None], x[None], cos, sign * sin, 2)[0][0]

    def pass_ids(self, tokenizer) -> torch.Tensor:
        """What the plugin's pass reads."""
        return pass_token_ids(self.config.vocab_size, PASS_TOKENS, first_token(tokenizer))

    def offsets(self, keys: torch.Tensor, first: int | None, num_tokens: int = TOKENS) -> torch.Tensor:
        """As the plugin makes them of a pass's keys, [num_layers, num_segments, num_kv_heads, head_dim].

        first: the token that every text begins with, or None.
        """
        found = []
        for layer, key in enumerate(keys):
            mean = self.rotate(layer, key, -1)[1:].mean(0, keepdim=True)
            segments = self.rotate(layer, mean.expand(num_tokens, -1, -1)).unflatten(0, (-1, SEGMENT_TOKENS)).mean(1)
            segments[0] = 0 if first is None else key[0]
            found.append(segments)
        return torch.stack(found)

    def scales_by_norms(self) -> torch.Tensor | None:
        """Diagonal bases, as the plugin makes them of the weights of the norms."""
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm  # what the plugin looks for

        from tq_vllm.plugin import key_scale

        head_dim, found = self.config.head_dim, []
        kind = GemmaRMSNorm if "gemma" in self.config.model_type else RMSNorm
        for layer in self.network.model.layers:
            parent = SimpleNamespace(rotary_emb=SimpleNamespace(rotary_dim=head_dim, is_neox_style=True))
            for name in ("q_norm", "k_norm"):
                norm = getattr(layer.self_attn, name, None)
                if norm is None:
                    return None
                setattr(parent, name, kind.__new__(kind))
                torch.nn.Module.__init__(getattr(parent, name))
                getattr(parent, name).weight = norm.weight
            found.append(torch.diag(key_scale.compute(parent, head_dim))[None])
        return torch.stack(found)


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


class Setting:
    """A model, what the plugin does to its keys, and a text: what all rows have in common."""

    def __init__(self, path: str, num_tokens: int = TOKENS):
        self.model, tokenizer = Model(path), AutoTokenizer.from_pretrained(path)
        topics = pydoc_data.topics.topics
        text = topics["debugger"]
        if num_tokens > TOKENS:
            text = "\n\n".join(topics[name] for name in sorted(topics))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[LONG_TEXT_STARTS if num_tokens > TOKENS else 0 :]
        first = first_token(tokenizer)
        self.text = torch.tensor(([] if first is None else [first]) + ids[:num_tokens])[:num_tokens]
        self.pass_ids = self.model.pass_ids(tokenizer)
        self.pass_queries, self.pass_keys = self.model.queries_and_keys(self.pass_ids)
        self.offset = self.model.offsets(self.pass_keys, first, num_tokens)
        self.without_first_key = self.model.offsets(self.pass_keys, None, num_tokens)
        self.none = [None] * len(self.offset)
        self.by_norms = self.model.scales_by_norms()
        self.basis = self.none if self.by_norms is None else self.by_norms

    def kl(self, layers: list[Layer], ids: torch.Tensor, step: int = STEP) -> torch.Tensor:
        """KL divergence of every position, nats, of reading ids with these layers of a cache, `step` at a time."""
        reference = self.model.network(ids[None]).logits[0].log_softmax(-1)
        cache = Cache(layers=layers)
        parts = [self.model.network(part, past_key_values=cache).logits[0] for part in ids[None].split(step, 1)]
        return (reference.exp() * (reference - torch.cat(parts).log_softmax(-1))).sum(-1)


@torch.inference_mode()
def main() -> None:
    """Print a row a lever: mean KL and its 99th percentile, nats."""
    path, num_tokens, *_ = [*sys.argv[1:], None, None]
    setting = Setting(path or str(demo_model()), int(num_tokens or TOKENS))
    offset, basis, none = setting.offset, setting.basis, setting.none
    q, k = setting.model.queries_and_keys(setting.text)
    k = k - torch.stack([offset_at(x, torch.arange(len(setting.text))) for x in offset])
    preset = get_config("turboquant")
    rows = {
        "turboquant (K4V4)": (preset, offset, basis, {}),
        "keys not centred": (preset, none, basis, {}),
        "first keys not centred": (preset, setting.without_first_key, basis, {}),
        "key channels not scaled": (preset, offset, none, {}),
        "key channels scaled by the text": (preset, offset, channel_scales(q, k, pairs=False), {}),
        "key matrices by the text": (preset, offset, matrices(q, k), {}),
        "K5V3, the same bytes": (dataclasses.replace(preset, key_bits=5, value_bits=3), offset, basis, {}),
        "K5V4": (dataclasses.replace(preset, key_bits=5), offset, basis, {}),
        "first token raw": (preset, offset, basis, {"first": 1}),
        "first 4 tokens raw": (preset, offset, basis, {"first": 4}),
        "first 64 tokens raw": (preset, offset, basis, {"first": 64}),
        "newest 32 tokens raw": (preset, offset, basis, {"recent": 32}),
        "newest 128 tokens raw": (preset, offset, basis, {"recent": 128}),
        "K3V3": (get_config("turboquant:k3v3"), offset, basis, {}),
        "K3V3, newest 128 tokens raw": (get_config("turboquant:k3v3"), offset, basis, {"recent": 128}),
    }
    for name, (config, offsets, bases, raw) in rows.items():
        if name == "key channels not scaled" and setting.by_norms is None:
            continue  # the first row
        layers = [Layer(config, o, b, **raw) for o, b in zip(offsets, bases, strict=True)]
        kl = setting.kl(layers, setting.text)
        print(f"{name:32s} {kl.mean():.5f}  {kl.quantile(0.99):.4f}", flush=True)


if __name__ == "__main__":
    main()
