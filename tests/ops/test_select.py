"""Dispatch: one function names the kernel and says why; nothing falls back silently."""

import ctypes
import logging
import types

import pytest
import torch

from tests.ops.batches import Batch
from tq_vllm.ops import cuda_ops, cuda_store, torch_ops
from tq_vllm.ops import select as select_module
from tq_vllm.ops.select import Call, NoKernelError, select


def call(op="attention", device_type="cpu", capability=None, **fields):
    return Call(op, device_type, capability, "turboquant", 64, torch.float32, 16, **fields)


@pytest.fixture
def kernels(monkeypatch):
    """Two stand-ins for compiled kernels on CUDA: the first refuses long queries, the second has no store."""
    modules = {
        "tq_vllm.ops.first_ops": types.SimpleNamespace(
            supports=lambda c: "more than 4 query tokens" if c.max_query_len > 4 else None,
            attention=lambda *a: None, store_kv=lambda *a: None,
        ),
        "tq_vllm.ops.second_ops": types.SimpleNamespace(
            supports=lambda c: "it has no store_kv" if c.op == "store_kv" else None, attention=lambda *a: None
        ),
    }  # fmt: skip
    monkeypatch.setitem(select_module.KERNELS, "cuda", ("first", "second"))
    monkeypatch.setattr(select_module.importlib, "import_module", modules.__getitem__)
    select.cache_clear()
    yield modules
    select.cache_clear()


def test_cpu_runs_torch():
    choice = select(call())
    assert choice.name == "torch" and choice.function is torch_ops.attention and choice.reason
    assert select(call("store_kv")).function is torch_ops.store_kv


def test_the_first_that_serves_the_call_is_taken_and_the_reason_names_the_others(kernels):
    assert select(call(device_type="cuda")).name == "first"
    choice = select(call(device_type="cuda", max_query_len=5))
    assert choice.name == "second" and choice.reason == "first: more than 4 query tokens"
    assert choice.function is kernels["tq_vllm.ops.second_ops"].attention


def test_no_kernel_is_one_sentence_with_every_reason(kernels):
    with pytest.raises(NoKernelError, match="store_kv .*head size 64: first: more than 4 .*; second: it has no store"):
        select(call("store_kv", device_type="cuda", max_query_len=5))
    with pytest.raises(NoKernelError, match="got device type 'tpu', allowed cpu, cuda"):
        select(call(device_type="tpu"))


@pytest.mark.parametrize("head_dim, served", [(64, True), (96, False), (128, True), (192, False), (256, True)])
def test_trellis_codes_are_written_on_a_gpu_where_a_lane_holds_a_block(monkeypatch, head_dim, served):
    size = ctypes.sizeof(cuda_store.StoreParams)
    monkeypatch.setattr(cuda_ops, "why_missing", lambda: None)
    monkeypatch.setattr(cuda_ops, "library", lambda: types.SimpleNamespace(tq_store_params_bytes=lambda: size))
    write = Call("store_kv", "cuda", (9, 0), "turboquant:t3", head_dim, torch.bfloat16, 64)
    refusal = cuda_ops.supports(write)
    assert (refusal is None) == served
    assert served or refusal == f"got head size {head_dim} with trellis codes, allowed 64, 128, 256"


@pytest.mark.parametrize(
    "fields, served",
    [
        ({}, True),
        ({"group": 64}, True),
        ({"preset": "turboquant:k5v4", "head_dim": 256}, True),
        ({"max_query_len": 2}, False),
        ({"preset": "turboquant:t3"}, False),
        ({"preset": "turboquant:prod"}, False),
        ({"head_dim": 96}, False),
        ({"recent": True}, False),
        ({"device_type": "cpu", "capability": None}, False),
    ],
)
def test_one_launch_writes_and_attends_where_a_request_has_one_token(monkeypatch, fields, served):
    size = ctypes.sizeof(cuda_store.StoreParams)
    monkeypatch.setattr(cuda_ops, "why_missing", lambda: None)
    monkeypatch.setattr(cuda_ops, "library", lambda: types.SimpleNamespace(tq_store_params_bytes=lambda: size))
    monkeypatch.setitem(select_module.KERNELS, "cuda", ("cuda",))
    select_module.select_joint.cache_clear()
    step = Call("store_and_attend", "cuda", (9, 0), "turboquant", 128, torch.bfloat16, 64, group=4)._replace(**fields)
    found = select_module.select_joint(step)
    select_module.select_joint.cache_clear()
    assert found is (cuda_ops.store_and_attend if served else None)


def test_a_choice_is_logged_once(kernels, caplog):
    select_module._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=select_module.logger.name):
        for max_query_len in (1, 2, 3, 5, 6, 1):
            select(call(device_type="cuda", max_query_len=max_query_len))
    assert len(caplog.records) == 2


def test_the_operations_go_through_select(monkeypatch):
    seen = []
    original = select_module.select
    monkeypatch.setattr(select_module, "select", lambda c: seen.append(c) or original(c))
    Batch(seq_lens=(40,), query_lens=(3,), group=3, with_offset=True, sliding_window=5).fill().attend()
    assert [c.op for c in seen] == ["store_kv", "attention"]
    assert seen[1] == Call(
        "attention", "cpu", None, "turboquant", 64, torch.float32, 16, group=3, max_query_len=3, fresh=True,
        key_offset=True, sliding_window=True,
    )  # fmt: skip
