"""The line of a server about its cache, and what happens where no kernel serves it."""

import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from tq_vllm.config import PRESETS
from tq_vllm.ops import cuda_library, select
from tq_vllm.plugin import startup


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(startup.logger, "info_once", lambda message, *args: lines.append(message % args))
    return lines


def test_the_line(tiny_config, attention_layer, lines):
    layer = attention_layer(tiny_config(kv_cache_dtype="turboquant:k5v4"))
    layer.process_weights_after_loading(torch.float32)
    (line,) = lines
    # K5V4 at head size 64: 40 + 32 bytes of codes, two f16 scales; bf16 would take 256
    assert "turboquant:k5v4: K5V4, 152 bytes per token and layer (2 KV heads of 64), 3.37 times smaller" in line
    assert all(f"{step} by torch (" in line for step in ("decode", "prefill", "store"))
    assert line.endswith("keys not centred: the layer is not a plain decoder attention layer of a module.")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_line(tiny_config, attention_layer, lines, preset):
    attention_layer(tiny_config(kv_cache_dtype=preset)).process_weights_after_loading(torch.float32)
    assert f"cache {preset}: K" in lines[0]


def test_without_a_kernel_loading_ends_with_the_reasons(tiny_config, attention_layer, monkeypatch, lines):
    layer = attention_layer(tiny_config())
    monkeypatch.setattr(select, "KERNELS", {})
    select.select.cache_clear()
    with pytest.raises(select.NoKernelError, match="No kernel for attention of turboquant"):
        layer.process_weights_after_loading(torch.float32)
    assert not lines


def test_without_the_compiled_library_a_gpu_is_told_how_to_get_it(tiny_config, attention_layer, monkeypatch, lines):
    layer = attention_layer(tiny_config())
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_: DeviceCapability(9, 0))
    monkeypatch.setattr(cuda_library, "PATH", cuda_library.PATH.with_name("nowhere.so"))
    for cache in (cuda_library.why_missing, select.select):
        cache.cache_clear()
    with pytest.raises(select.NoKernelError) as caught:
        layer.process_weights_after_loading(torch.bfloat16)
    for cache in (cuda_library.why_missing, select.select):
        cache.cache_clear()
    sentence = str(caught.value)
    assert sentence.startswith(
        "No kernel for store_kv of turboquant, head size 64: cuda: nowhere.so was not built: "
        "run `make build` (it needs nvcc) or install a wheel that has it; "
    )
    assert sentence.endswith(". Or use --kv-cache-dtype auto.") and "\n" not in sentence
    assert not lines
