"""Per-step metadata: which requests decode, which prefill, and where every token stands in its sequence."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from tq_vllm.plugin import key_mean
from tq_vllm.plugin.dtype import config_of


@dataclass
class RequestSlice:
    """Consecutive requests of the batch that one call of tq_vllm::attention serves."""

    tokens: slice  # rows of query, key, value and out
    block_table: torch.Tensor  # int32 [num_reqs, max_blocks]
    seq_lens: torch.Tensor  # int32 [num_reqs]
    query_start_loc: torch.Tensor  # int32 [num_reqs + 1], starts at 0
    max_query_len: int
    max_seq_len: int  # upper bounds: of a sequence,
    total_seq_len: int  # and of the sum of them
    older_lens: torch.Tensor | None  # int32 [num_reqs]: tokens but for the newest; None without recent_tokens


@dataclass
class TurboQuantMetadata(AttentionMetadata):
    """Decodes come first in the batch; either slice may be missing."""

    decodes: RequestSlice | None
    prefills: RequestSlice | None
    positions: torch.Tensor | None  # int32 [at least the tokens of the batch]; None where no layer has a key offset


def token_positions(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, token_index: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the absolute position of every token of a batch, on the device, without a host sync.

    Rows past query_start_loc[-1] are padding and get some position that is not negative. Requests without tokens
    (padding of CUDA graphs) own no row.

    Args:
        query_start_loc: int32 [num_reqs + 1].
        seq_lens: int32 [num_reqs].
        token_index: int32 [num_tokens], 0, 1, 2, ...
        out: int32 [num_tokens].
    """
    request = torch.searchsorted(query_start_loc[1:], token_index, right=True)  # [num_tokens]
    request.clamp_(max=seq_lens.shape[0] - 1)
    torch.add(token_index, (seq_lens - query_start_loc[1:])[request], out=out)
    out.clamp_(min=0)


def _max_num_tokens(vllm_config) -> int:
    """Tokens that a batch can have, padding to a captured CUDA graph and the slots of parallel drafting included."""
    scheduler = vllm_config.scheduler_config
    num_drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(scheduler.max_num_batched_tokens + scheduler.max_num_seqs * num_drafts, largest_graph)


def _host_seq_lens(common: CommonAttentionMetadata) -> torch.Tensor:
    """Upper bounds of seq_lens in host memory, exact for prefills; where vLLM gives none, the largest for all."""
    bounds = common.seq_lens_cpu_upper_bound
    return torch.full((common.num_reqs,), common.max_seq_len) if bounds is None else bounds


class TurboQuantMetadataBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    """Slices the batch; requests of up to `reorder_batch_threshold` query tokens (1, or 1 + drafts) are decodes."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.positions = None
        config = config_of(kv_cache_spec)
        self.recent_tokens = config.recent_tokens if config else 0
        # Captured CUDA graphs read these buffers: they must not move.
        num_tokens = _max_num_tokens(vllm_config)
        self.older_lens = None
        if self.recent_tokens:
            self.older_lens = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        key_mean.take_waiting(vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        if any(layer.impl.key_offset is not None for layer in layers):
            self.token_index = torch.arange(num_tokens, dtype=torch.int32, device=device)
            self.positions = torch.zeros(num_tokens, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TurboQuantMetadata:
        """Build the metadata of a step from host integers and views of vLLM's device tensors."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(
                "Attention mask with a TurboQuant KV cache: got a non-causal batch, allowed causal; "
                "use --kv-cache-dtype auto instead."
            )
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        older_lens = None
        if self.recent_tokens:
            older_lens = self.older_lens[: common.num_reqs]
            torch.sub(common.seq_lens[: common.num_reqs], self.recent_tokens, out=older_lens).clamp_(min=0)
        decodes = prefills = None
        if num_decodes:
            decodes = RequestSlice(
                tokens=slice(0, num_decode_tokens),
                block_table=common.block_table_tensor[:num_decodes],
                seq_lens=common.seq_lens[:num_decodes],
                query_start_loc=common.query_start_loc[: num_decodes + 1],
                max_query_len=min(common.max_query_len, self.reorder_batch_threshold),
                max_seq_len=common.max_seq_len,
                total_seq_len=num_decodes * common.max_seq_len,
                older_lens=None if older_lens is None else older_lens[:num_decodes],
            )
        if num_prefills:
            lengths = _host_seq_lens(common)[num_decodes : common.num_reqs]
            query_start_loc = common.query_start_loc[num_decodes : common.num_reqs + 1]
            prefills = RequestSlice(
                tokens=slice(num_decode_tokens, common.num_actual_tokens),
                block_table=common.block_table_tensor[num_decodes : common.num_reqs],
                seq_lens=common.seq_lens[num_decodes : common.num_reqs],
                query_start_loc=query_start_loc - num_decode_tokens if num_decode_tokens else query_start_loc,
                max_query_len=common.max_query_len,
                max_seq_len=int(lengths.max()),
                total_seq_len=int(lengths.sum()),
                older_lens=None if older_lens is None else older_lens[num_decodes:],
            )
        if self.positions is not None:
            self._write_positions(common)
        return TurboQuantMetadata(decodes, prefills, self.positions)

    def _write_positions(self, common: CommonAttentionMetadata) -> None:
        num_tokens = common.num_actual_tokens
        token_positions(
            common.query_start_loc[: common.num_reqs + 1],
            common.seq_lens[: common.num_reqs],
            self.token_index[:num_tokens],
            self.positions[:num_tokens],
        )
