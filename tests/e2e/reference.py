"""The served model once more, without vLLM: transformers, with keys and values that go through tq_vllm.core."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tq_vllm.config import TurboQuantConfig
from tq_vllm.core.cache import kv_roundtrip
from tq_vllm.format import SEGMENT_TOKENS
from tq_vllm.plugin.key_mean import pass_token_ids


class _CompressedLayer(DynamicLayer):
    """Keeps decoded keys and values; a step sees its own tokens raw, unless it is a decode step of one token."""

    def __init__(self, config: TurboQuantConfig, key_offset: torch.Tensor | None):
        super().__init__()
        self.turboquant = config
        self.key_offset = key_offset
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states, value_states, *args, **kwargs):
        # [1, num_kv_heads, num_tokens, head_dim] -> the core's [num_tokens, num_kv_heads, head_dim] and back
        k, v = (x[0].transpose(0, 1) for x in (key_states, value_states))
        positions = self.get_seq_length() + torch.arange(k.shape[0])
        stored = kv_roundtrip(k, v, self.turboquant, positions, self.key_offset)
        k_hat, v_hat = (x.transpose(0, 1)[None].to(key_states.dtype) for x in stored)
        own = (k_hat, v_hat) if key_states.shape[2] == 1 else (key_states, value_states)
        seen = [torch.cat([*(p[i] for p in self.past), own[i]], 2) for i in range(2)]
        self.past.append((k_hat, v_hat))
        return tuple(seen)

    def get_seq_length(self) -> int:
        return sum(k.shape[2] for k, _ in self.past)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


@torch.inference_mode()
def _key_offsets(network: PreTrainedModel, pass_tokens: int, num_segments: int) -> list[torch.Tensor]:
    """Of each layer, [num_segments, num_kv_heads, head_dim]: the mean of its keys before RoPE, rotated, averaged.

    The keys are those of the fixed ids that a server reads at startup, without the first; the first segment has none.
    """
    outputs = []
    handles = [
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        for layer in network.model.layers
    ]
    network(pass_token_ids(network.config.vocab_size, pass_tokens)[None])
    for handle in handles:
        handle.remove()
    positions = torch.arange(num_segments * SEGMENT_TOKENS)[None]
    cos, sin = network.model.rotary_emb(outputs[0], positions)  # [1, num_positions, head_dim]
    offsets = []
    for output in outputs:
        mean = output[1:].mean(0).view(1, -1, 1, cos.shape[-1])  # [1, num_kv_heads, 1, head_dim]
        rotated, _ = apply_rotary_pos_emb(mean, mean, cos, sin)  # [1, num_kv_heads, num_positions, head_dim]
        offset = rotated[0].unflatten(1, (num_segments, SEGMENT_TOKENS)).mean(2).transpose(0, 1).contiguous()
        offset[0] = 0
        offsets.append(offset)
    return offsets


@torch.inference_mode()
def teacher_forced_logprobs(
    model: str,
    tokens: list[int],
    steps: list[int],
    config: TurboQuantConfig,
    pass_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Log-probability of tokens[1:], nats, when the model reads `tokens` in steps of the given lengths.

    Args:
        pass_tokens: how many ids the served model's pass for the mean of its keys has.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    offsets = [None] * network.config.num_hidden_layers  # 8-bit keys are not centred by a mean
    if config.key_bits < 8:
        offsets = _key_offsets(network, pass_tokens, -(-len(tokens) // SEGMENT_TOKENS))
    cache = Cache(layers=[_CompressedLayer(config, offset) for offset in offsets])
    ids = torch.tensor([tokens])
    logits = []
    for part in ids.split(steps, 1):
        logits.append(network(part, past_key_values=cache, use_cache=True).logits[0])
    logprobs = torch.cat(logits)[:-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
