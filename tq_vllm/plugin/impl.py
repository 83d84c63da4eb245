"""One attention layer: store this step's keys and values, attend to the cache."""

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

import tq_vllm.ops  # noqa: F401  defines torch.ops.tq_vllm
from tq_vllm.config import RECENT_PRESET
from tq_vllm.ops import flash_ops
from tq_vllm.plugin import key_offset as key_offsets
from tq_vllm.plugin import key_scale as key_scales
from tq_vllm.plugin.checks import PREFERRED_BLOCK_SIZE, check_layer, check_layer_class, check_recent_tokens
from tq_vllm.plugin.flash import provide_flash_attention
from tq_vllm.plugin.metadata import RequestSlice, TurboQuantMetadata
from tq_vllm.plugin.recent import RecentTokens
from tq_vllm.plugin.startup import report_layer


class TurboQuantImpl(AttentionImpl[TurboQuantMetadata]):
    """Calls the operations of tq_vllm.ops on the slices of a batch.

    Attributes:
        key_offset: [num_segments, num_kv_heads, head_dim] of the model's dtype, or None (see key_offset.py); of keys
            times key_scale.
        key_mean, first_key: fp32 [num_kv_heads, head_dim] on the host, where the offset comes from the fixed pass: the
            mean before RoPE and, if all prompts begin alike, the key at position 0.
        recent: the newest tokens' own cache (see recent.py), or None; a drafter's layers have none.
        key_scale: fp32 [head_dim], or None: keys are stored times it, queries divided by it (see key_scale.py).

    Raises:
        UnsupportedByTurboQuantError: on construction, for attention features that the cache does not have.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks  # [num_heads], filled when the weights are loaded
        self.page = check_layer(
            alibi_slopes=alibi_slopes, head_dim=head_size, kv_cache_dtype=kv_cache_dtype, extra=extra
        )
        config = get_current_vllm_config()
        check_recent_tokens(self.page.config, config)
        self.layers = config.compilation_config.static_forward_context  # vLLM's list of layers with a cache, by name
        # A layer that is made after another model's weights were loaded is a drafter's. vLLM wants all of these in one
        # cache, and a drafter that reads its newest tokens at fewer bits drafts no wrong text.
        self.in_drafter = any(isinstance(layer, RecentTokens) for layer in self.layers.values())
        self.recent: RecentTokens | None = None
        self.max_model_len = config.model_config.max_model_len
        self.max_num_reqs = config.scheduler_config.max_num_seqs
        cache_config = config.cache_config  # its block size is final only if the user gave one
        self.block_size = cache_config.block_size if cache_config.user_specified_block_size else PREFERRED_BLOCK_SIZE
        self.key_offset: torch.Tensor | None = None
        self.key_mean: torch.Tensor | None = None
        self.first_key: torch.Tensor | None = None
        self.key_scale: torch.Tensor | None = None
        self.not_centred: str | None = None
        self.owner: key_offsets.Owner | None = None
        self.pipeline_parallel = config.parallel_config.pipeline_parallel_size > 1
        provide_flash_attention()
        if kv_sharing_target_layer_name is None:
            key_offsets.watch_for_owners()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Compute key scale and offset from the loaded weights and report the layer; a reload keeps their addresses."""
        name, layer = next((n, layer) for n, layer in self.layers.items() if getattr(layer, "impl", None) is self)
        check_layer_class(layer, self.page.config)
        parent = None if self.owner is None else self.owner.parent()
        scale = key_scales.compute(parent, self.head_size)
        offset, why = key_offsets.compute(self, act_dtype)
        keeps_newest = self.page.config.recent_tokens and self.kv_sharing_target_layer_name is None
        if keeps_newest and self.recent is None and not self.in_drafter:
            self.recent = RecentTokens(name, self)
            self.layers[self.recent.name] = self.recent
        self._keep("key_scale", scale)
        self._keep("key_offset", None if offset is None else self._scaled_key(offset))
        report_layer(self, act_dtype, why)

    def _keep(self, name: str, value: torch.Tensor | None) -> None:
        """Set an attribute that captured CUDA graphs read."""
        kept = getattr(self, name)
        if kept is not None and value is not None:
            kept.copy_(value)
        else:
            setattr(self, name, value)
            if value is not None:  # vLLM keeps a model's buffers when sleeping (level 2) throws its weights away
                self.owner.layer().register_buffer(f"turboquant_{name}", value, persistent=False)

    def centre(self, keys: torch.Tensor, prompts_begin_alike: bool) -> float:
        """Set the key offset by the keys of the fixed pass; return the part of their energy that a mean leaves.

        Args:
            keys: [num_tokens, num_kv_heads, head_dim] as the model makes them, of positions 0, 1, ...
            prompts_begin_alike: the pass begins with the token that begins every prompt.
        """
        rotary_emb = self.owner.parent().rotary_emb
        self.key_mean = key_offsets.mean_before_rope(rotary_emb, keys).cpu()
        self.first_key = keys[0].float().cpu() if prompts_begin_alike else None
        offset = key_offsets.from_mean(rotary_emb, self.key_mean, self.key_offset.shape[0], self.first_key)
        self.key_offset.copy_(self._scaled_key(offset))
        return key_offsets.energy_left(rotary_emb, self.key_mean, keys)

    def _scaled_key(self, key: torch.Tensor) -> torch.Tensor:
        """Keys [..., head_dim] as they are stored: rounded once, to their own dtype."""
        return key if self.key_scale is None else torch.mul(key, self.key_scale, out=torch.empty_like(key))

    def do_not_centre(self, why: str) -> None:
        """Keep the layer's keys uncentred from now on, through reloads too."""
        self.key_offset, self.not_centred = None, why

    def _store(
        self,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], scaled
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,  # int64 [num_slots <= num_tokens]
        positions: torch.Tensor | None,  # int32 [num_tokens]
    ) -> None:
        """Write this step's tokens."""
        torch.ops.tq_vllm.store_kv(key, value, kv_cache, slots, positions, self.key_offset, self.kv_cache_dtype)
        if self.recent is not None:
            torch.ops.tq_vllm.store_kv(
                key, value, self.recent.kv_cache, self._recent_slots(), positions, self.key_offset, RECENT_PRESET
            )

    def _recent_slots(self) -> torch.Tensor:
        return get_forward_context().slot_mapping[self.recent.name]

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor | None,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,  # uint8 [num_blocks, num_kv_heads, block_size, slot_bytes]
        attn_metadata: TurboQuantMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store and attend: decodes read all tokens from codes, prefills their own raw and earlier ones from codes."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "Fused output quantization with a TurboQuant KV cache: got on, allowed off; "
                "use --compilation-config with fuse_attn_quant off instead."
            )
        stored_by = self
        if self.kv_sharing_target_layer_name is not None:
            # This layer reads another layer's cache: the raw key and value it is handed are not what that one stored.
            key = value = None
            stored_by = get_forward_context().no_compile_layers[self.kv_sharing_target_layer_name].impl
        if stored_by.key_scale is not None:
            query = torch.div(query, stored_by.key_scale, out=torch.empty_like(query))
            key = None if key is None else self._scaled_key(key)
        if attn_metadata is None:  # the memory profile: there is no cache yet
            flash_ops.warm_up(
                query, self.num_kv_heads, self.block_size, self.max_num_reqs, self.key_offset, self.sinks,
                self.sliding_window or 0, self.kv_cache_dtype,
            )  # fmt: skip
            return output.fill_(0)
        decodes, prefills = attn_metadata.decodes, attn_metadata.prefills
        slots = None if key is None else get_forward_context().slot_mapping.get(layer.layer_name)
        if slots is not None:  # not a dummy run
            positions = None if self.key_offset is None else attn_metadata.positions[: key.shape[0]]
            if prefills is None and decodes is not None:
                self._store_and_attend(decodes, query, key, value, kv_cache, slots, positions, output)
                return output
            self._store(key, value, kv_cache, slots, positions)
        recent = None if stored_by.recent is None else _metadata_of(stored_by.recent.name)
        if decodes is not None:
            newest = recent and recent.decodes
            self._attend(decodes, newest, query, None, None, kv_cache, stored_by, output)
        if prefills is not None:
            newest = recent and recent.prefills
            self._attend(prefills, newest, query, key, value, kv_cache, stored_by, output)
        return output

    def _store_and_attend(
        self,
        decodes: RequestSlice,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """The same in one operation, of a batch of decodes."""
        rows, recent = decodes.tokens, ()
        if self.recent is not None:
            newest = _metadata_of(self.recent.name).decodes
            recent = self.recent.kv_cache, self._recent_slots(), newest.block_table, decodes.older_lens
        torch.ops.tq_vllm.store_and_attend(
            query[rows],
            key,
            value,
            kv_cache,
            slots,
            positions,
            decodes.block_table,
            decodes.seq_lens,
            decodes.query_start_loc,
            self.key_offset,
            self.sinks,
            output[rows],
            None,
            self.scale,
            decodes.max_query_len,
            decodes.max_seq_len,
            decodes.total_seq_len,
            self.sliding_window or 0,
            self.logits_soft_cap,
            self.kv_cache_dtype,
            *recent,
        )

    def _attend(
        self,
        requests: RequestSlice,
        newest: RequestSlice | None,  # the same requests, with the blocks of their newest tokens
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        stored_by: "TurboQuantImpl",
        output: torch.Tensor,
    ) -> None:
        rows = requests.tokens
        recent = () if newest is None else (stored_by.recent.kv_cache, newest.block_table, requests.older_lens)
        torch.ops.tq_vllm.attention(
            query[rows],
            None if key is None else key[rows],
            None if value is None else value[rows],
            kv_cache,
            requests.block_table,
            requests.seq_lens,
            requests.query_start_loc,
            stored_by.key_offset,
            self.sinks,
            output[rows],
            None,
            self.scale,
            requests.max_query_len,
            requests.max_seq_len,
            requests.total_seq_len,
            self.sliding_window or 0,
            self.logits_soft_cap,
            self.kv_cache_dtype,
            *recent,
        )


def _metadata_of(layer_name: str) -> TurboQuantMetadata | None:
    """The metadata of `layer_name` in this forward pass."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # one dict per micro-batch: the base model's is the first
        metadata = metadata[0]
    return metadata.get(layer_name) if isinstance(metadata, dict) else metadata
