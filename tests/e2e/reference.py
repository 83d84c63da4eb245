"""The served model once more, without vLLM: transformers, with keys and values that go through tq_vllm.core."""

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from tq_vllm.config import TurboQuantConfig
from tq_vllm.core.cache import kv_roundtrip


class _CompressedLayer(DynamicLayer):
    """Keeps decoded keys and values; a step sees its own tokens raw, unless it is a decode step of one token."""

    def __init__(self, config: TurboQuantConfig):
        super().__init__()
        self.turboquant = config
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states, value_states, *args, **kwargs):
        # [1, num_kv_heads, num_tokens, head_dim] -> the core's [num_tokens, num_kv_heads, head_dim] and back
        k, v = (x[0].transpose(0, 1) for x in (key_states, value_states))
        k_hat, v_hat = (x.transpose(0, 1)[None].to(key_states.dtype) for x in kv_roundtrip(k, v, self.turboquant))
        own = (k_hat, v_hat) if key_states.shape[2] == 1 else (key_states, value_states)
        seen = [torch.cat([*(p[i] for p in self.past), own[i]], 2) for i in range(2)]
        self.past.append((k_hat, v_hat))
        return tuple(seen)

    def get_seq_length(self) -> int:
        return sum(k.shape[2] for k, _ in self.past)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


@torch.inference_mode()
def teacher_forced_logprobs(
    model: str, tokens: list[int], steps: list[int], config: TurboQuantConfig, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Log-probability of tokens[1:], nats, when the model reads `tokens` in steps of the given lengths."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    cache = Cache(layers=[_CompressedLayer(config) for _ in range(network.config.num_hidden_layers)])
    ids = torch.tensor([tokens])
    logits = []
    for part in ids.split(steps, 1):
        logits.append(network(part, past_key_values=cache, use_cache=True).logits[0])
    logprobs = torch.cat(logits)[:-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
