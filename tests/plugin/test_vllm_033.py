"""vLLM 0.33's own sources: registration and backend selection, in a process that has 0.33 and believes in a Hopper GPU.

Runs where VLLM_033 names a directory with the unpacked wheel `vllm==0.33.0`. Nothing of it touches a GPU: libcuda is a
stub, compiled extensions are empty modules, and the platform is vLLM's CUDA platform with a made-up capability.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, types
from unittest.mock import MagicMock
for name in ("_C_stable_libtorch", "_vllm_fa2_C", "_vllm_fa3_C"):
    sys.modules["vllm." + name] = types.ModuleType("vllm." + name)
for name in ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"):
    sys.modules[name] = MagicMock()
import torch, vllm
import vllm.platforms
from vllm.platforms import cuda
from vllm.platforms.interface import DeviceCapability

class Hopper(cuda.NonNvmlCudaPlatform):
    get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    has_device_capability = classmethod(lambda cls, capability, device_id=0: True)
    is_device_capability_family = classmethod(lambda cls, capability, device_id=0: capability == 90)
    get_device_name = classmethod(lambda cls, device_id=0: "Hopper")

vllm.platforms.current_platform = Hopper()
import vllm.v1.attention.selector as selector
from vllm.config import CacheConfig, VllmConfig, cache, set_current_vllm_config
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode, is_quantized_kv_cache

config = VllmConfig()
others = list(cache.KV_CACHE_DTYPES)

def pick(dtype, **kwargs):
    selector._cached_get_attn_backend.cache_clear()
    try:
        with set_current_vllm_config(config):
            return str(selector.get_attn_backend(128, torch.bfloat16, dtype, **kwargs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def error_of(dtype):
    try:
        CacheConfig(cache_dtype=dtype)
    except ValueError as error:
        return str(error)

before = {dtype: pick(dtype) for dtype in others}
from tq_vllm.plugin.register import register
register()
patched = vllm.platforms.current_platform.get_attn_backend_cls.__func__, cache.is_known_kv_cache_dtype
register()
from tq_vllm.config import PRESETS
from tq_vllm.plugin.backend import TurboQuantBackend

def slot_bytes(name):
    mode = get_kv_quant_mode(name)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.uint8, kv_quant_mode=mode)
    return TurboQuantBackend.customize_spec(spec).state_content_bytes

print("RESULT", json.dumps(dict(
    version=vllm.__version__,
    twice=patched == (vllm.platforms.current_platform.get_attn_backend_cls.__func__, cache.is_known_kv_cache_dtype),
    registered=[cache.KV_CACHE_DTYPES.count(CacheConfig(cache_dtype=name).cache_dtype) == 1 for name in PRESETS],
    quantized=[is_quantized_kv_cache(name) and not get_kv_quant_mode(name).is_octave for name in PRESETS],
    before=before,
    after={dtype: pick(dtype) for dtype in others},
    ours=sorted({pick(name) for name in PRESETS}),
    sinks=pick("turboquant", has_sink=True, has_sliding_window=True),
    mla=pick("turboquant", use_mla=True),
    unknown_preset=error_of("turboquant:k9v9"),
    unknown_dtype=error_of("fp7"),
    slot_bytes={name: slot_bytes(name) for name in PRESETS},
)))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    tree = os.environ.get("VLLM_033")
    if not tree:
        pytest.skip("VLLM_033 does not name a directory with the unpacked wheel vllm==0.33.0")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to make the stub of libcuda with")
    stub = tmp_path_factory.mktemp("stub")
    (stub / "stub.c").write_text("int cuInit(unsigned flags) { return 100; }")
    library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
    subprocess.run(["cc", *library, "stub.c"], cwd=stub, check=True)
    import tq_vllm

    ours = os.path.dirname(os.path.dirname(tq_vllm.__file__))
    env = {**os.environ, "LD_LIBRARY_PATH": str(stub), "PYTHONPATH": f"{tree}:{ours}", "VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def test_presets_are_registered_once(result):
    assert result["version"].startswith("0.33") and result["twice"]
    assert all(result["registered"]) and all(result["quantized"])


def test_every_other_dtype_is_as_before(result):
    assert result["after"] == result["before"]
    assert "FlashAttentionBackend" in result["after"]["auto"]
    assert "vllm.v1.attention.backends.turboquant_attn" in result["after"]["turboquant_4bit_nc"]


def test_presets_get_the_backend_with_no_flag(result):
    (ours,) = result["ours"]
    assert ours == "<class 'tq_vllm.plugin.backend.TurboQuantBackend'>" == result["sinks"]
    assert "got multi-head latent attention (MLA)" in result["mla"]


def test_pages_are_those_of_the_format(result):
    from tq_vllm.config import get_config
    from tq_vllm.format import TurboQuantPage

    assert result["slot_bytes"] == {n: TurboQuantPage(get_config(n), 128).slot_bytes for n in result["slot_bytes"]}


def test_errors(result):
    assert "Unknown TurboQuant preset: got 'turboquant:k9v9', allowed turboquant, " in result["unknown_preset"]
    assert "Invalid kv_cache_dtype: 'fp7'" in result["unknown_dtype"]
