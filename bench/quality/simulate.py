"""Read text with a rival's cache, in transformers, and keep what `tq-vllm eval` keeps of vLLM's runs."""

import math

import numpy as np
import torch
from layers import EvictedLayer
from rivals import Eviction, Rival
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache

from tq_vllm.quality.metrics import Distributions


class Reader:
    """A model in float32 that reads windows of equal length, all at once, `chunk` tokens a step."""

    def __init__(self, network, windows: list[list[int]], chunk: int, top: int):
        self.network, self.ids, self.chunk, self.top = network, torch.tensor(windows), chunk, top
        self.attentions: list[torch.Tensor] | None = None  # of the layers so far, where they are wanted
        self.cache: Cache | None = None  # that is being read
        AttentionInterface.register("rivals", self._attend)
        network.set_attn_implementation("rivals")
        config = network.config
        self.num_layers, self.num_kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @torch.inference_mode()
    def read(self, rival: Rival) -> Distributions:
        """Every prediction of the windows, window after window."""
        cache = Cache(layers=[rival.layer(self.head_dim, layer) for layer in range(self.num_layers)])
        return _concatenate([self._read(cache, 0)])

    @torch.inference_mode()
    def read_after_prompt(self, eviction: Eviction) -> Distributions:
        """Predictions of each window's second half; the first half is a prompt that is read raw and then cut down."""
        prompt = self.ids.shape[1] // 2
        budgets = eviction.budgets(prompt, self.num_layers)
        all_ids, parts = self.ids, []
        for ids in all_ids.split(1):  # the attention of a whole prompt is large
            cache, self.attentions = DynamicCache(), []
            self.cache = cache
            self.network(ids[:, :prompt], past_key_values=cache)
            found, self.attentions = self.attentions, None
            layers = []
            for layer, attention, budget in zip(cache.layers, found, budgets, strict=True):
                kept = eviction.choose(attention, self.num_kv_heads, budget)
                layers.append(EvictedLayer(layer.keys, layer.values, kept))
            self.ids = ids
            parts.append(self._read(Cache(layers=layers), prompt))
        self.ids = all_ids
        return _concatenate(parts)

    def _attend(self, module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        """Causal attention on what a layer's cache returns: PyramidKV's layers keep different numbers of tokens."""
        groups, num_queries = query.shape[1] // key.shape[1], query.shape[2]
        at = getattr(self.cache.layers[module.layer_idx], "positions", None)
        at = torch.arange(key.shape[2])[None, None] if at is None else at.repeat_interleave(groups, 1)
        ahead = at[:, :, None] - at[:, :, -num_queries:, None]  # [..., num_queries, num_keys]
        hidden = ahead > 0
        if sliding_window:
            hidden |= ahead <= -sliding_window
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -math.inf).softmax(-1)
        if self.attentions is not None:
            self.attentions.append(weights)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def _read(self, cache: Cache, start: int) -> list[torch.Tensor]:
        """ids, logprobs [batch, n, top] and target_logprob [batch, n] of the tokens after `start` + 1."""
        self.cache, found = cache, []
        for at in range(start, self.ids.shape[1] - 1, self.chunk):
            step = self.ids[:, at : at + self.chunk]
            positions = torch.arange(at, at + step.shape[1])[None]
            logits = self.network(step, past_key_values=cache, position_ids=positions, use_cache=True).logits
            target = self.ids[:, at + 1 : at + 1 + step.shape[1]]
            logprobs = logits[:, : target.shape[1]].log_softmax(-1)
            best = logprobs.topk(self.top, -1)
            target_logprob = logprobs.gather(2, target[..., None])[..., 0]
            found.append((best.indices.int(), best.values, target.int(), target_logprob))
        return [torch.cat(part, 1) for part in zip(*found, strict=True)]


def _concatenate(parts: list[list[torch.Tensor]]) -> Distributions:
    arrays = [torch.cat(part).flatten(0, 1).numpy() for part in zip(*parts, strict=True)]
    return Distributions(*arrays)


def first_windows(text: Distributions, windows: int, count: int) -> Distributions:
    """The predictions of the first `count` of `windows` windows."""
    return _select(text, np.arange(len(text.target)) < len(text.target) // windows * count)


def second_halves(text: Distributions, windows: int) -> Distributions:
    """The predictions that `Reader.read_after_prompt` makes, out of all."""
    length = len(text.target) // windows
    return _select(text, np.arange(len(text.target)) % length >= (length + 1) // 2)


def _select(text: Distributions, which: np.ndarray) -> Distributions:
    return Distributions(*(array[which] for array in (text.ids, text.logprobs, text.target, text.target_logprob)))
