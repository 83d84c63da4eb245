"""Key means from one fixed pass: what keys without a bias have in common, taken at startup before any key is stored.

The model reads 64 token ids that a generator draws from its vocabulary. Every layer's keys are rotated back to position
0 and averaged. A mean is a property of the weights far more than of the text: with random ids it removes nearly as much
of the error as the mean of the very text that is served (docs/design.md). Where the tokenizer begins every prompt with
the same token, the pass does too, and the key of that token is the offset of the first segment of positions: it takes
much of the attention, and comes out of its codes as it was.

The pass runs when the engine builds its first metadata builder: on every rank, after the weights are loaded and the
memory was profiled, before CUDA graphs are captured. It skips the compiled model, and plain attention stands in for
every layer's implementation, so that no cache is read or written.

The result is a function of the checkpoint, its tokenizer, the model's dtype and, below 64, of --max-num-batched-tokens
and --max-model-len. Its last digits are those of the device's matrix products. Two machines that share a cache restore
keys with offsets that differ by such digits, which is far below a quantization step.
"""

import weakref
from contextlib import contextmanager

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.attention.backend import AttentionType

from tq_vllm.core.attention import attention_reference
from tq_vllm.core.splitmix import splitmix64
from tq_vllm.plugin.compat import logger

PASS_TOKENS = 64
_SEED = 0x6B65796D  # any fixed number

_waiting: list[weakref.ref] = []  # of TurboQuantImpl, as loaded: ranks make their passes in the same order


def why_impossible(root: nn.Module, pipeline_parallel: bool) -> str | None:
    """Why no pass can be made through the model `root`, or None if one can."""
    if pipeline_parallel:
        return "a pipeline stage sees no activations at startup"
    for module in root.modules():
        if isinstance(module, AttentionLayerBase) and (
            type(module) is not Attention or module.attn_type != AttentionType.DECODER
        ):
            return f"the model has layers that need a cache for a pass ({type(module).__name__})"
    return None


def wait_for_pass(impl) -> None:
    """Have the next `take_waiting` measure the layer of this TurboQuantImpl."""
    if all(other() is not impl for other in _waiting):
        _waiting.append(weakref.ref(impl))


def take_waiting(vllm_config, device: torch.device) -> None:
    """Make the pass through every model with waiting layers; hand each layer its mean."""
    by_root: dict[nn.Module, list] = {}
    for impl in filter(None, [waiting() for waiting in _waiting]):
        by_root.setdefault(impl.owner.root(), []).append(impl)
    _waiting.clear()
    num_tokens = min(
        PASS_TOKENS, vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len
    )
    first = _first_token_of(vllm_config.model_config) if by_root else None
    for root, impls in by_root.items():
        try:
            keys = keys_of_pass(root, num_tokens, first, vllm_config, device)
        except Exception as error:  # its forward takes something else, a draft head's for one: served as it is
            why = f"the pass for their mean failed with {type(error).__name__}: {error}"
            for impl in impls:
                impl.do_not_centre(why)
            logger.warning("TurboQuant KV cache: keys of %d layers not centred: %s.", len(impls), why)
            continue
        left = [impl.centre(keys[impl.owner.layer().layer_name], first is not None) for impl in impls]
        logger.info(
            "TurboQuant KV cache: keys of %d layers centred by their mean over a fixed pass of %d tokens, "
            "which leaves %.0f %% of their energy%s.",
            len(impls), num_tokens, 100 * sum(left) / len(left),
            "" if first is None else f"; those of a prompt's first positions by the key of token {first}",
        )  # fmt: skip


def _first_token_of(model_config) -> int | None:
    if model_config.skip_tokenizer_init:
        return None
    try:
        return first_token(cached_tokenizer_from_config(model_config))
    except Exception as error:  # tokenizers are of many kinds, and the engine does without one here
        logger.warning("TurboQuant KV cache: how prompts begin is not known: %s: %s.", type(error).__name__, error)
        return None


def first_token(tokenizer) -> int | None:
    """The id of the token that a tokenizer begins every text with, or None."""
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer.encode("a")[:1] == [begin] else None


def pass_token_ids(vocab_size: int, num_tokens: int, first: int | None = None) -> torch.Tensor:
    """The ids that the pass reads, int64 [num_tokens]: the same on every machine; `first`: begins every text."""
    ids = (splitmix64(_SEED, num_tokens) & (2**63 - 1)) % vocab_size
    if first is not None:
        ids[0] = first
    return ids


@torch.inference_mode()
def keys_of_pass(
    root: nn.Module, num_tokens: int, first: int | None, vllm_config, device: torch.device
) -> dict[str, torch.Tensor]:
    """Run the model over the pass's ids at positions 0, 1, ...; return each layer's keys as they would be stored.

    Args:
        first: the token that begins every prompt, or None.

    Returns:
        layer name -> [num_tokens, num_kv_heads, head_dim] of the model's dtype, after RoPE; this rank's heads.
    """
    ids = pass_token_ids(vllm_config.model_config.get_vocab_size(), num_tokens, first)
    with (
        _plain_attention(root) as keys,
        set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True),
    ):
        root(
            input_ids=ids.to(device, torch.int32),
            positions=torch.arange(num_tokens, device=device),
            intermediate_tensors=None,
            inputs_embeds=None,
        )
    return keys


@contextmanager
def _plain_attention(root: nn.Module):
    """Meanwhile every attention layer of the model attends to its raw keys; yields layer name -> keys."""
    layers = [module for module in root.modules() if type(module) is Attention]
    implementations = [layer.impl for layer in layers]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    keys: dict[str, torch.Tensor] = {}
    try:
        for layer in layers:
            layer.impl = _PlainAttention(layer.impl, seen, keys)
        yield keys
    finally:
        for layer, impl in zip(layers, implementations, strict=True):
            layer.impl = impl


class _PlainAttention:
    """Stands in for a layer's implementation: one sequence, causal, in float64, without a cache."""

    def __init__(self, impl, seen: dict, keys: dict):
        self.impl, self.seen, self.keys = impl, seen, keys

    def __getattr__(self, name: str):
        return getattr(self.impl, name)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales):
        """Attend [num_tokens, ...] query, key, value as vLLM hands them over; note the key; write `output`."""
        if layer.kv_sharing_target_layer_name is not None:
            key, value = self.seen[layer.kv_sharing_target_layer_name]
        self.seen[layer.layer_name] = key, value
        self.keys[layer.layer_name] = key.clone()
        out, _ = attention_reference(
            query,
            [key],
            [value],
            torch.tensor([0, query.shape[0]]),
            self.impl.scale,
            layer.sliding_window or 0,
            getattr(self.impl, "logits_soft_cap", None) or 0.0,
            getattr(self.impl, "sinks", None),
        )
        output.copy_(out)
        return output
