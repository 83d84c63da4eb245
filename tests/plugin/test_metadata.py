"""Metadata: where tokens stand, under padding too, and which requests decode."""

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from tq_vllm.plugin.metadata import TurboQuantMetadataBuilder, token_positions

LAYER = "model.layers.0.self_attn.attn"


def _common(query_lens, seq_lens, num_tokens=None, **changes) -> CommonAttentionMetadata:
    """A batch; `num_tokens` pads it as CUDA graphs do."""
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    num_reqs = len(query_lens)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=num_reqs,
        num_actual_tokens=num_tokens or int(starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(num_reqs * 4, dtype=torch.int32).view(num_reqs, 4),
        slot_mapping=torch.zeros(num_tokens or int(starts[-1]), dtype=torch.int64),
        **changes,
    )


@pytest.mark.parametrize(
    "query_lens, seq_lens, num_tokens",
    [
        ([1, 1, 1], [5, 1, 300], 3),
        ([1, 1, 7, 64], [130, 2, 7, 200], 73),
        ([1, 1, 0, 0], [9, 12, 0, 0], 4),  # requests and tokens padded to a graph of 4
        ([3, 3, 0], [64, 3, 0], 16),
        ([5], [5], 5),
    ],
)
def test_positions(query_lens, seq_lens, num_tokens):
    common = _common(query_lens, seq_lens)
    out = torch.full((num_tokens,), -7, dtype=torch.int32)
    token_positions(common.query_start_loc, common.seq_lens, torch.arange(num_tokens, dtype=torch.int32), out)
    expected = [s - q + i for q, s in zip(query_lens, seq_lens, strict=True) for i in range(q)]
    assert out[: len(expected)].tolist() == expected
    assert (out >= 0).all()  # padding rows: anything that can index


def _builder(config, attention_layer, centred: bool = False) -> TurboQuantMetadataBuilder:
    layer = attention_layer(config, prefix=LAYER)
    if centred:
        layer.impl.key_offset = torch.zeros(8, 2, 64)
    spec = FullAttentionSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.uint8, kv_quant_mode=get_kv_quant_mode("turboquant")
    )
    with set_current_vllm_config(config):
        return TurboQuantMetadataBuilder(spec, [LAYER], config, torch.device("cpu"))


def test_decodes_and_prefills_are_split(tiny_config, attention_layer):
    builder = _builder(tiny_config(), attention_layer)
    metadata = builder.build(0, _common([1, 1, 7, 30], [40, 1, 7, 90]))
    decodes, prefills = metadata.decodes, metadata.prefills
    assert (decodes.tokens, prefills.tokens) == (slice(0, 2), slice(2, 39))
    assert decodes.query_start_loc.tolist() == [0, 1, 2] and prefills.query_start_loc.tolist() == [0, 7, 37]
    assert decodes.seq_lens.tolist() == [40, 1] and prefills.seq_lens.tolist() == [7, 90]
    assert prefills.block_table[0, 0] == 8
    assert (decodes.max_query_len, prefills.max_query_len) == (1, 30)
    assert metadata.positions is None


@pytest.mark.parametrize("query_lens, missing", [([1, 1], "prefills"), ([4, 9], "decodes")])
def test_a_missing_kind_is_none(tiny_config, attention_layer, query_lens, missing):
    metadata = _builder(tiny_config(), attention_layer).build(0, _common(query_lens, [20, 20]))
    assert getattr(metadata, missing) is None


def test_decode_metadata_is_views_of_vllms_tensors(tiny_config, attention_layer):
    """A captured graph must see the next step's values: nothing may be copied."""
    common = _common([1, 1, 0], [40, 7, 0], num_tokens=3)
    decodes = _builder(tiny_config(), attention_layer).build(0, common).decodes
    for ours, theirs in (
        (decodes.seq_lens, common.seq_lens),
        (decodes.block_table, common.block_table_tensor),
        (decodes.query_start_loc, common.query_start_loc),
    ):
        assert ours.data_ptr() == theirs.data_ptr() and len(ours) == len(theirs)


def test_verified_drafts_are_decodes(tiny_config, attention_layer):
    drafts = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=2)
    builder = _builder(tiny_config(speculative_config=drafts), attention_layer)
    assert builder.reorder_batch_threshold == 4
    metadata = builder.build(0, _common([4, 2, 1, 5], [50, 60, 70, 80]))
    assert metadata.decodes.tokens == slice(0, 7) and metadata.decodes.max_query_len == 4
    assert metadata.prefills.tokens == slice(7, 12)


def test_positions_live_in_one_buffer(tiny_config, attention_layer):
    builder = _builder(tiny_config(), attention_layer, centred=True)
    first = builder.build(0, _common([1, 1], [40, 7])).positions
    address = first.data_ptr()
    assert first[:2].tolist() == [39, 6]
    second = builder.build(0, _common([1, 6], [41, 70])).positions
    assert second.data_ptr() == address and second[:7].tolist() == [40, 64, 65, 66, 67, 68, 69]


def test_non_causal_batches_are_refused(tiny_config, attention_layer):
    with pytest.raises(ValueError, match="got a non-causal batch, allowed causal; use --kv-cache-dtype auto"):
        _builder(tiny_config(), attention_layer).build(0, _common([4], [4], causal=False))


def test_cuda_graphs_cover_uniform_batches(tiny_config, attention_layer):
    builder = _builder(tiny_config(), attention_layer)
    support = builder.get_cudagraph_support(builder.vllm_config, builder.kv_cache_spec)
    assert support is AttentionCGSupport.UNIFORM_BATCH
