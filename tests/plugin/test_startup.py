"""The line of a server about its cache, and what happens where no kernel serves it."""

import pytest
import torch

from tq_vllm.config import PRESETS
from tq_vllm.ops import select
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
    assert "attention by torch (" in line and "store by torch (" in line
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
