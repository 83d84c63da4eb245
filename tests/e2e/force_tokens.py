"""Teacher forcing: whatever the model prefers, the tokens of a request's `extra_args["forced"]` are its output.

vLLM loads these classes by name, so that workers in other processes find them too.
"""

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor


class FirstRunner(AdapterLogitsProcessor):
    """For vLLM's first model runner."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        forced = (params.extra_args or {}).get("forced")
        if forced is None:
            return None

        def force(output_ids, logits):
            masked = torch.full_like(logits, float("-inf"))
            masked[forced[len(output_ids)]] = 0
            return masked

        return force


class SecondRunner(LogitsProcessor):
    """For vLLM's second model runner."""

    def __init__(self, vllm_config, req_states):
        self.forced = {}

    def add_request(self, req_idx, sampling_params):
        extra = sampling_params.extra_args or {}
        self.forced[req_idx] = extra.get("forced"), extra.get("prompt_len")
        return extra.get("forced") is not None

    def apply(self, logits, ctx):
        rows = zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)
        for row, (slot, position) in enumerate(rows):
            forced, prompt_len = self.forced.get(slot, (None, None))
            if forced and 0 <= (index := position + 1 - prompt_len) < len(forced):
                logits[row] = float("-inf")
                logits[row, forced[index]] = 0
        return logits
