"""The attention implementation: batches of vLLM through store and attention, against dense attention on raw K and V.

With `turboquant:k8v8` a cache is close enough to its input for a dense oracle; every fault this file is about (a wrong
slice, position, window, offset) is far outside the tolerance, which the last tests show.
"""

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from tq_vllm.plugin.metadata import TurboQuantMetadataBuilder

LAYER = "model.layers.0.self_attn.attn"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 32
TOLERANCE = 0.05


class Sequences:
    """Raw query, key and value of three growing sequences, and the engine's side of a step over them."""

    def __init__(self, layer, config, offset: torch.Tensor | None = None, scale: torch.Tensor | None = None):
        g = torch.Generator().manual_seed(1)
        self.layer, self.config = layer, config
        self.query = torch.randn(3, 200, NUM_HEADS, HEAD_DIM, generator=g)
        self.key = torch.randn(3, 200, NUM_KV_HEADS, HEAD_DIM, generator=g)
        self.value = torch.randn(3, 200, NUM_KV_HEADS, HEAD_DIM, generator=g)
        if offset is not None:
            self.key += offset[torch.arange(200) // 64]
        layer.impl.key_scale = scale
        layer.impl.key_offset = offset if scale is None or offset is None else offset * scale
        self.lengths = [0, 0, 0]
        self.block_table = torch.randperm(24, generator=g).int().view(3, 8)
        layer.kv_cache = torch.zeros(24, NUM_KV_HEADS, BLOCK, layer.impl.page.slot_bytes, dtype=torch.uint8)
        spec = FullAttentionSpec(
            block_size=BLOCK,
            num_kv_heads=NUM_KV_HEADS,
            head_size=HEAD_DIM,
            dtype=torch.uint8,
            kv_quant_mode=get_kv_quant_mode(layer.kv_cache_dtype),
        )
        with set_current_vllm_config(config):
            self.builder = TurboQuantMetadataBuilder(spec, [LAYER], config, torch.device("cpu"))

    def step(self, tokens_of: dict[int, int], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the next tokens of some sequences; return output and dense output, [num_tokens, num_heads, head_dim]."""
        rows, slots, seq_lens, expected = [], [], [], []
        for sequence, num_tokens in tokens_of.items():
            for position in range(self.lengths[sequence], self.lengths[sequence] + num_tokens):
                rows.append((sequence, position))
                slots.append(int(self.block_table[sequence, position // BLOCK]) * BLOCK + position % BLOCK)
                expected.append(self.dense(sequence, position))
            self.lengths[sequence] += num_tokens
            seq_lens.append(self.lengths[sequence])
        starts = torch.tensor([0, *tokens_of.values()]).cumsum(0).int()
        sequence, position = torch.tensor(rows).T
        query, key, value = (x[sequence, position] for x in (self.query, self.key, self.value))
        query, key, value = (torch.cat([x, torch.full((padding, *x.shape[1:]), 9.0)]) for x in (query, key, value))
        slot_mapping = torch.tensor(slots + [-1] * padding)
        metadata = self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
                num_reqs=len(seq_lens),
                num_actual_tokens=len(slot_mapping),
                max_query_len=max(tokens_of.values()),
                max_seq_len=max(seq_lens),
                block_table_tensor=self.block_table[list(tokens_of)],
                slot_mapping=slot_mapping,
            ),
        )
        with set_forward_context({LAYER: metadata}, self.config, slot_mapping={LAYER: slot_mapping}):
            output = self.layer(query.flatten(1), key.flatten(1), value.flatten(1))
        return output.view(-1, NUM_HEADS, HEAD_DIM)[: len(rows)], torch.stack(expected)

    def dense(self, sequence: int, position: int) -> torch.Tensor:
        """Attention of one token in float64: [num_heads, head_dim]."""
        impl = self.layer.impl
        first = max(0, position - impl.sliding_window + 1) if impl.sliding_window else 0
        seen = slice(first, position + 1)
        group = NUM_HEADS // NUM_KV_HEADS
        key = self.key[sequence, seen].double().repeat_interleave(group, 1)  # [keys, num_heads, head_dim]
        value = self.value[sequence, seen].double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,khd->hk", self.query[sequence, position].double(), key) * impl.scale
        if impl.logits_soft_cap:
            scores = impl.logits_soft_cap * (scores / impl.logits_soft_cap).tanh()
        if impl.sinks is not None:
            scores = torch.cat([scores, impl.sinks.double()[:, None]], 1)
            value = torch.cat([value, torch.zeros(1, NUM_HEADS, HEAD_DIM, dtype=torch.float64)])
        return torch.einsum("hk,khd->hd", scores.softmax(1), value).float()


STEPS = [
    {0: 5, 1: 40},  # two prompts
    {0: 1, 1: 30, 2: 7},  # a decode, a chunk over a compressed prefix, a prompt
    {0: 1, 2: 1, 1: 64},  # decodes first, as the runner orders them
    {0: 1, 1: 1, 2: 1},
]


def _run(sequences: Sequences, padding: int = 0) -> float:
    errors = []
    for step in STEPS:
        got, expected = sequences.step(step, padding)
        errors.append((got - expected).abs().max().item())
    return max(errors)


@pytest.fixture
def make(tiny_config, attention_layer, single_rank):
    def make(offset=None, scale=None, **kwargs) -> Sequences:
        config = tiny_config(kv_cache_dtype="turboquant:k8v8")
        return Sequences(attention_layer(config, prefix=LAYER, **kwargs), config, offset, scale)

    return make


def _offset() -> torch.Tensor:
    return torch.randn(4, NUM_KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2)) * 20


def _scale() -> torch.Tensor:
    return torch.rand(HEAD_DIM, generator=torch.Generator().manual_seed(3)) + 0.5


FEATURES = {
    "plain": {},
    "sliding window": dict(per_layer_sliding_window=20),
    "soft cap": dict(logits_soft_cap=2.0),
    "sinks": dict(sinks=torch.tensor([0.0, 1.0, 2.0, -1.0])),
    "all": dict(per_layer_sliding_window=33, logits_soft_cap=5.0, sinks=torch.tensor([0.0, 1.0, 2.0, -1.0])),
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("features", FEATURES)
def test_mixed_batches(make, features, padding):
    assert _run(make(**FEATURES[features]), padding) < TOLERANCE


@pytest.mark.parametrize("padding", [0, 5])
def test_mixed_batches_with_a_key_offset(make, padding):
    assert _run(make(_offset()), padding) < TOLERANCE


@pytest.mark.parametrize("offset", [False, True])
def test_mixed_batches_with_key_scales(make, offset):
    assert _run(make(_offset() if offset else None, _scale()), padding=5) < TOLERANCE


def test_a_query_that_was_not_scaled_would_show(make):
    sequences = make(scale=_scale())
    sequences.step(STEPS[0])
    sequences.layer.impl.key_scale = None
    got, expected = sequences.step(STEPS[1])
    assert (got - expected).abs().max() > 4 * TOLERANCE


def test_profiling_without_metadata_gives_zeros(make):
    sequences = make()
    query = torch.randn(6, NUM_HEADS, HEAD_DIM)
    out = torch.full_like(query, torch.nan)
    impl = sequences.layer.impl
    assert impl.forward(sequences.layer, query, None, None, None, None, output=out) is out and (out == 0).all()


def test_fused_output_quantization_is_refused(make):
    layer = make().layer
    assert not layer.impl.fused_output_quant_supported(None)
    with pytest.raises(NotImplementedError, match="got on, allowed off"):
        layer.impl.forward(layer, None, None, None, None, None, output=None, output_scale=torch.ones(1))


def test_a_layer_that_shares_a_cache_reads_the_owners(make, attention_layer):
    """All comes from the owner's codes, offset and scale; the raw key and value handed to the sharing layer do not."""
    sequences = make(_offset(), _scale())
    sharing = attention_layer(
        sequences.config, prefix="model.layers.1.self_attn.attn", kv_sharing_target_layer_name=LAYER
    )
    sequences.step({0: 100})
    sharing.kv_cache = sequences.layer.kv_cache
    metadata = sequences.builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=torch.tensor([0, 60], dtype=torch.int32),
            query_start_loc_cpu=torch.tensor([0, 60], dtype=torch.int32),
            seq_lens=torch.tensor([100], dtype=torch.int32),
            num_reqs=1,
            num_actual_tokens=60,
            max_query_len=60,
            max_seq_len=100,
            block_table_tensor=sequences.block_table[:1],
            slot_mapping=torch.zeros(60, dtype=torch.int64),
        ),
    )
    query, wrong = sequences.query[0, 40:100], torch.full((60, NUM_KV_HEADS * HEAD_DIM), 50.0)
    with set_forward_context({sharing.layer_name: metadata}, sequences.config, slot_mapping={}):
        output = sharing(query.flatten(1), wrong, wrong).view(-1, NUM_HEADS, HEAD_DIM)
    expected = torch.stack([sequences.dense(0, position) for position in range(40, 100)])
    assert (output - expected).abs().max() < TOLERANCE


def test_wrong_positions_would_show(make, monkeypatch):
    sequences = make(_offset())
    monkeypatch.setattr(sequences.builder, "_write_positions", lambda common: None)
    assert _run(sequences) > 4 * TOLERANCE


def test_a_wrong_block_would_show(make):
    sequences = make()
    sequences.step(STEPS[0])
    sequences.block_table[1] = sequences.block_table[1].roll(1)
    got, expected = sequences.step(STEPS[1])
    assert (got - expected).abs().max() > 4 * TOLERANCE
