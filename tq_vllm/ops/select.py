"""Which kernel serves a call, and why.

A kernel is a module of this package with a function for each operation it has (`store_kv`, `attention`; arguments as
in schema.py) and `supports(call) -> str | None`: None, or why it can't serve the call and what to do about it. Modules
are asked in order of preference and imported then; importing one needs neither a GPU nor an optional package. Where
none has a `store_and_attend` that serves a call, the other two operations do.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tq_vllm.config import RECENT_PRESET
from tq_vllm.ops.flash_workspace import is_long, line_tokens

logger = logging.getLogger(__name__)

KERNELS: dict[str, tuple[str, ...]] = {  # device type -> modules tq_vllm.ops.<name>_ops, best first
    "cpu": ("torch",),
    "cuda": ("cuda", "flash", "triton", "recent"),
}


class NoKernelError(RuntimeError):
    """No kernel serves the call; the message has the reason of each."""


class Call(NamedTuple):  # which is made, hashed and compared in every layer of a step
    """What a choice may depend on.

    Attributes:
        op: "store_kv", "attention" or "store_and_attend".
        device_type: "cpu", "cuda", ...
        capability: (major, minor) of a CUDA device, else None.
        group: query heads per KV head (attention).
        max_query_len: upper bound of the query tokens of a request (attention).
        fresh: this step's keys and values come as raw tensors (attention).
        recent: the newest tokens are read from a cache of their own (attention).
        long: requests of more tokens than flash_ops takes in one pass (attention).
    """

    op: str
    device_type: str
    capability: tuple[int, int] | None
    preset: str
    head_dim: int
    dtype: torch.dtype
    block_size: int
    group: int = 1
    max_query_len: int = 1
    fresh: bool = False
    key_offset: bool = False
    sinks: bool = False
    sliding_window: bool = False
    logits_soft_cap: bool = False
    long: bool = False
    recent: bool = False


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a call: its name, why it was chosen, and the function."""

    name: str
    reason: str
    function: Callable


@functools.lru_cache(maxsize=4096)
def select(call: Call) -> Choice:
    """Return the first kernel in order of preference that serves `call`.

    Raises:
        NoKernelError: none does.
    """
    refusals = []
    for name in KERNELS.get(call.device_type, ()):
        module = importlib.import_module(f"tq_vllm.ops.{name}_ops")
        refusal = module.supports(call)
        if refusal is None:
            reason = "; ".join(refusals) or f"the first choice on {call.device_type}"
            _log_once(call.op, name, reason)
            return Choice(name, reason, getattr(module, call.op))
        refusals.append(f"{name}: {refusal}")
    if not refusals:
        refusals = [f"got device type {call.device_type!r}, allowed {', '.join(KERNELS)}"]
    raise NoKernelError(f"No kernel for {call.op} of {call.preset}, head size {call.head_dim}: {'; '.join(refusals)}.")


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("TurboQuant %s: %s kernel (%s)", op, name, reason)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def store_kv(key, value, kv_cache, slot_mapping, positions, key_offset, preset: str) -> None:
    """Serve tq_vllm::store_kv with the kernel that `select` names."""
    call = Call(
        "store_kv", key.device.type, _capability(key.device), preset, key.shape[-1], key.dtype, kv_cache.shape[2],
        key_offset=key_offset is not None,
    )  # fmt: skip
    select(call).function(key, value, kv_cache, slot_mapping, positions, key_offset, preset)


def attention(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str, recent_cache=None, recent_table=None, older_lens=None,
) -> None:  # fmt: skip
    """Serve tq_vllm::attention with the kernel that `select` names."""
    call = Call(
        "attention", query.device.type, _capability(query.device), preset, query.shape[-1], query.dtype,
        kv_cache.shape[2], query.shape[1] // kv_cache.shape[1], max_query_len, key is not None, key_offset is not None,
        sinks is not None, sliding_window > 0, logits_soft_cap > 0,
        is_long(kv_cache.shape[1], query.shape[-1],
                line_tokens(len(seq_lens), len(query), total_seq_len, sliding_window)), recent_cache is not None,
    )  # fmt: skip
    recent = (recent_cache, recent_table, older_lens) if call.recent else ()
    select(call).function(
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
        softmax_scale, max_query_len, max_seq_len, total_seq_len, sliding_window, logits_soft_cap, preset, *recent,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def select_joint(call: Call) -> Callable | None:
    """Return the function that serves a call of store_and_attend, or None: the other operations do."""
    for name in KERNELS.get(call.device_type, ()):
        module = importlib.import_module(f"tq_vllm.ops.{name}_ops")
        if hasattr(module, call.op) and module.supports(call) is None:
            _log_once(call.op, name, "one launch writes the newest tokens and attends")
            return getattr(module, call.op)
    return None


def store_and_attend(
    query, key, value, kv_cache, slot_mapping, positions, block_table, seq_lens, query_start_loc, key_offset, sinks,
    out, lse, softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str, recent_cache=None, recent_slots=None, recent_table=None, older_lens=None,
) -> None:  # fmt: skip
    """Serve tq_vllm::store_and_attend by a kernel that does both in one launch, or by the other two operations."""
    call = Call(
        "store_and_attend", query.device.type, _capability(query.device), preset, query.shape[-1], query.dtype,
        kv_cache.shape[2], query.shape[1] // kv_cache.shape[1], max_query_len, False, key_offset is not None,
        sinks is not None, sliding_window > 0, logits_soft_cap > 0, recent=recent_cache is not None,
    )  # fmt: skip
    if (joint := select_joint(call)) is not None:
        recent = (recent_cache, recent_slots, recent_table, older_lens) if call.recent else ()
        joint(
            query, key, value, kv_cache, slot_mapping, positions, block_table, seq_lens, query_start_loc, key_offset,
            sinks, out, lse, softmax_scale, max_query_len, max_seq_len, total_seq_len, sliding_window,
            logits_soft_cap, preset, *recent,
        )  # fmt: skip
        return
    store_kv(key, value, kv_cache, slot_mapping, positions, key_offset, preset)
    if call.recent:
        store_kv(key, value, recent_cache, recent_slots, positions, key_offset, RECENT_PRESET)
    attention(
        query, None, None, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
        softmax_scale, max_query_len, max_seq_len, total_seq_len, sliding_window, logits_soft_cap, preset,
        recent_cache, recent_table, older_lens,
    )  # fmt: skip
