"""RoPE in float64 from the formula, averaged over segments: the oracle of key offsets."""

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tq_vllm.format import SEGMENT_TOKENS

HEAD_DIM, NUM_KV_HEADS, THETA = 64, 2, 10000.0
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=THETA,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=1024,
)
YARN = dict(rope_type="yarn", rope_theta=THETA, factor=4.0, original_max_position_embeddings=512)
ROPES = {
    "plain": dict(rope_type="default", rope_theta=THETA),
    "llama3": LLAMA3,
    "yarn": YARN,
    "linear": dict(rope_type="linear", rope_theta=THETA, factor=2.0),
    "partial": dict(rope_type="default", rope_theta=THETA, partial_rotary_factor=0.5),
}


def _angles(rope: dict) -> tuple[torch.Tensor, float]:
    """Inverse frequencies float64 [rotary_dim / 2] and the factor on cos and sin, from transformers."""
    rotary_dim = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0))
    plain = THETA ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    if rope["rope_type"] == "default":
        return plain, 1.0
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=2048, rope_parameters=rope)
    inverse_frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return inverse_frequencies.double(), factor


def segment_means(rope: dict, bias: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Mean over each segment of RoPE (halves rotated) of `bias`, one position after the other."""
    inverse_frequencies, factor = _angles(rope)
    half = len(inverse_frequencies)
    means = torch.zeros(num_segments, *bias.shape, dtype=torch.float64)
    for position in range(num_segments * SEGMENT_TOKENS):
        cos, sin = (f(position * inverse_frequencies) * factor for f in (torch.cos, torch.sin))
        rotated = bias.double().clone()
        left, right = rotated[..., :half].clone(), rotated[..., half : 2 * half].clone()
        rotated[..., :half] = left * cos - right * sin
        rotated[..., half : 2 * half] = right * cos + left * sin
        means[position // SEGMENT_TOKENS] += rotated / SEGMENT_TOKENS
    return means
