"""register(): every preset becomes a cache dtype; nothing else of vLLM changes; calling it again changes nothing."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import vllm.v1.kv_cache_interface as interface
from pydantic import ValidationError
from vllm.config import CacheConfig, SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tq_vllm.config import PRESETS
from tq_vllm.plugin import compat
from tq_vllm.plugin.backend import TurboQuantBackend
from tq_vllm.plugin.register import register

SNAPSHOT = """
import json, sys, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
import vllm.v1.attention.selector as selector
import vllm.v1.kv_cache_interface as interface

def layer(dtype, **kwargs):
    selector._cached_get_attn_backend.cache_clear()
    try:
        backend = selector.get_attn_backend(64, torch.bfloat16, dtype, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    spec = interface.FullAttentionSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=STR_DTYPE_TO_TORCH_DTYPE.get(dtype, torch.bfloat16),
        kv_quant_mode=interface.get_kv_quant_mode(dtype),
    )
    parts = backend, backend.get_impl_cls(), backend.get_builder_cls(), backend.customize_spec(spec)
    return [str(part) for part in parts]

def snapshot():
    with set_current_vllm_config(VllmConfig()):
        return {
            dtype: [layer(dtype), layer(dtype, attn_type="encoder_only"), layer(dtype, use_mla=True)]
            for dtype in sys.argv[1].split(",")
        }

without = snapshot()
from tq_vllm.plugin.register import register
register()
print("SNAPSHOTS", json.dumps([without, snapshot()]))
"""


def _vllm_dtypes() -> list[str]:
    return sorted(set(STR_DTYPE_TO_TORCH_DTYPE) - set(PRESETS) - {"float32", "half", "float", "int8"}) + ["auto"]


def test_other_cache_dtypes_are_as_without_the_plugin():
    """Backend, implementation, builder and spec of every cache dtype of vLLM, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT, ",".join(_vllm_dtypes())],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"},
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("SNAPSHOTS"))
    without, with_plugin = json.loads(line.removeprefix("SNAPSHOTS"))
    assert list(without) == _vllm_dtypes()
    assert "cpu_attn.CPUAttentionBackend" in without["auto"][0][0] and "cpu_attn" in without["fp8"][0][0]
    assert with_plugin == without


def test_register_twice_changes_nothing():
    def state():
        return (
            current_platform.get_attn_backend_cls.__func__,
            interface.get_kv_quant_mode,
            list(interface.KVQuantMode.__members__),
            list(AttentionBackendEnum.__members__),
            CacheConfig.__dataclass_fields__["cache_dtype"].type,
            dict(STR_DTYPE_TO_TORCH_DTYPE),
        )

    before = state()
    register()
    assert state() == before


def test_register_does_not_initialise_cuda():
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_cache_dtype(name):
    assert CacheConfig(cache_dtype=name).cache_dtype == name
    assert STR_DTYPE_TO_TORCH_DTYPE[name] is torch.uint8
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--kv-cache-dtype", name]).kv_cache_dtype == name


@pytest.mark.parametrize("name", PRESETS)
def test_quant_mode_is_quantized_and_not_one_of_vllms(name):
    mode = interface.get_kv_quant_mode(name)
    assert interface.is_quantized_kv_cache(name)
    assert not (mode.is_turboquant or mode.is_nvfp4 or mode.is_per_token_head or mode.is_ultraquant)
    assert mode.name == name and mode is interface.KVQuantMode(mode.value)
    assert pickle.loads(pickle.dumps(mode)) is mode
    assert sum(interface.get_kv_quant_mode(other) == mode for other in [*PRESETS, *_vllm_dtypes()]) == 1


def test_modules_that_imported_the_function_by_name_see_the_presets():
    from vllm.model_executor.layers.attention import attention

    assert attention.get_kv_quant_mode("turboquant") is interface.KVQuantMode["turboquant"]


def test_unknown_preset_is_one_sentence_that_lists_the_presets():
    with pytest.raises(ValidationError) as caught:
        CacheConfig(cache_dtype="turboquant:k9v9")
    message = str(caught.value)
    assert "got 'turboquant:k9v9'" in message and all(name in message for name in PRESETS)
    assert "turboquant_4bit_nc" not in message


def test_unknown_preset_on_the_command_line_is_the_sentence_too(capsys):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-cache-dtype", "turboquant:k9v9"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        "error: argument --kv-cache-dtype: Unknown TurboQuant preset: got 'turboquant:k9v9', allowed "
        f"{', '.join(PRESETS)}. Use --kv-cache-dtype turboquant if in doubt."
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-cache-dtype", "fp7"])
    assert "invalid choice: 'fp7' (choose from" in capsys.readouterr().err


def test_unknown_dtype_stays_vllms_own_error():
    with pytest.raises(ValidationError) as caught:
        CacheConfig(cache_dtype="fp7")
    assert "turboquant_4bit_nc" in str(caught.value)


def test_draft_models_take_presets_too():
    draft = dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)
    assert SpeculativeConfig(**draft, kv_cache_dtype="turboquant:k3v3").kv_cache_dtype == "turboquant:k3v3"
    with pytest.raises(ValidationError, match="Unknown TurboQuant preset"):
        SpeculativeConfig(**draft, kv_cache_dtype="turboquant:k9v9")


def test_backend_is_registered_under_its_own_name():
    assert AttentionBackendEnum["TQ_VLLM"].get_class() is TurboQuantBackend
    assert AttentionBackendEnum["TURBOQUANT"].get_path().startswith("vllm.")
    assert AttentionBackendEnum["CPU_ATTN"].get_path().startswith("vllm.")


def test_a_vllm_without_the_interface_is_left_alone(monkeypatch):
    told = []
    monkeypatch.setattr(compat.logger, "error", lambda message, *args: told.append(message % args))
    monkeypatch.setattr(compat, "add_cache_dtypes", lambda: pytest.fail("registered all the same"))
    monkeypatch.delattr(AttentionBackend, "customize_spec")
    register()
    (sentence,) = told
    assert "which has no AttentionBackend.customize_spec, allowed 0.32 and 0.33; use one of those." in sentence
