"""Everything that reaches into vLLM, and how it does so in 0.32 and 0.33, by what a release has and not by its number.

Each patch says why it is there and when it can go.
"""

import argparse
import functools
import sys
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator
from pydantic.dataclasses import rebuild_dataclass
from vllm.config import CacheConfig, SpeculativeConfig, VllmConfig
from vllm.config import cache as cache_module
from vllm.logger import init_logger
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1 import kv_cache_interface
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVQuantMode

from tq_vllm.config import PRESETS, UnknownPresetError, get_config
from tq_vllm.plugin.dtype import STORAGE_DTYPE, add_quant_mode

# A child of vLLM's logger, so that its handlers and VLLM_LOGGING_LEVEL apply.
logger = init_logger("vllm.tq_vllm")

BACKEND_NAME = "TQ_VLLM"
BACKEND_PATH = "tq_vllm.plugin.backend.TurboQuantBackend"
_MARK = "_tq_vllm_original"


def has_cache_dtype_registry() -> bool:
    """Whether vLLM takes new cache dtypes by itself: `register_kv_cache_dtype`, since 0.33."""
    return hasattr(cache_module, "register_kv_cache_dtype")


def missing_interface() -> str | None:
    """Name the first thing that the plugin needs and this vLLM does not have."""
    needed = (
        (kv_cache_interface.AttentionSpec, "state_content_bytes"),
        (AttentionBackend, "customize_spec"),
        (AttentionSelectorConfig, "kv_cache_dtype"),
        (cache_module, "is_known_kv_cache_dtype" if has_cache_dtype_registry() else "CacheDType"),
    )
    return next((f"{owner.__name__}.{name}" for owner, name in needed if not hasattr(owner, name)), None)


def add_quant_modes() -> None:
    for name in PRESETS:
        add_quant_mode(name)


def add_cache_dtypes() -> None:
    """Make every preset name a valid `--kv-cache-dtype`, and an unknown one an error that lists the presets."""
    if has_cache_dtype_registry():
        for name in PRESETS:
            if name not in cache_module.KV_CACHE_DTYPES:
                cache_module.register_kv_cache_dtype(name)(_handler_class(name))
        _explain_unknown_presets()
    elif not set(PRESETS) <= set(get_args(cache_module.CacheDType)):
        _extend_cache_dtype_literal()
        _name_quant_modes()


def _handler_class(name: str) -> type:
    """vLLM 0.33's KVCacheDTypeHandler of one preset.

    Its quant mode is the preset's own and not KVQuantMode.CUSTOM, which is an alias of OCTAVE_K3V4 in 0.33 and would
    not tell the presets apart.
    """

    class Handler:
        def torch_dtype(self):
            return STORAGE_DTYPE

        def quant_mode(self):
            return KVQuantMode[name]

    Handler.name = name
    return Handler


def _refuse_unknown_preset(name):
    """Raise UnknownPresetError for a `turboquant:` name that is no preset; pass everything else through."""
    if isinstance(name, str) and name.startswith("turboquant:"):
        get_config(name)
    return name


def _explain_unknown_presets() -> None:
    """Why: vLLM answers `turboquant:k9v9` with its whole list of dtypes; ours names the presets and the default.

    Remove when KVCacheDTypeHandler can claim a prefix.
    """
    original = cache_module.is_known_kv_cache_dtype
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def is_known_kv_cache_dtype(name: str) -> bool:
        return original(_refuse_unknown_preset(name))

    setattr(is_known_kv_cache_dtype, _MARK, original)
    _replace_function(original, is_known_kv_cache_dtype)


def _extend_cache_dtype_literal() -> None:
    """Why: 0.32 takes cache dtypes from a Literal, which pydantic, the argument parser and the selector have read.

    Remove when 0.32 is no longer supported (vLLM 0.33 has register_kv_cache_dtype).
    """
    from vllm.engine import arg_utils
    from vllm.v1.attention import selector

    literal = Literal[get_args(cache_module.CacheDType) + tuple(PRESETS)]
    checked = Annotated[literal, BeforeValidator(_refuse_unknown_preset)]
    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(PRESETS, STORAGE_DTYPE))
    cache_module.CacheDType = selector.CacheDType = arg_utils.CacheDType = literal
    _retype(CacheConfig, "cache_dtype", checked)
    _retype(SpeculativeConfig, "kv_cache_dtype", checked | None)
    rebuild_dataclass(VllmConfig, force=True)
    arg_utils._compute_kwargs.cache_clear()
    # The parser asks `type` before it answers with its whole list of choices.
    arg_utils._compute_kwargs(CacheConfig)["cache_dtype"]["type"] = _cache_dtype_argument


def _cache_dtype_argument(name: str) -> str:
    """`type` of --kv-cache-dtype: an unknown preset is our sentence, as an argument parser takes it."""
    try:
        return _refuse_unknown_preset(name)
    except UnknownPresetError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _retype(config_class: type, field: str, annotation: object) -> None:
    """Give a field of a pydantic dataclass another type."""
    config_class.__annotations__[field] = annotation
    config_class.__dataclass_fields__[field].type = annotation
    config_class.__pydantic_fields__[field].annotation = annotation
    rebuild_dataclass(config_class, force=True)


def _name_quant_modes() -> None:
    """Why: 0.32 maps a dtype it does not know to KVQuantMode.NONE, so that specs would call our pages unquantized.

    `vllm.utils.torch_utils.is_quantized_kv_cache` stays as it is: it answers False for vLLM's own turboquant dtypes
    too, and the stock CPU backend asks it about the run's dtype on behalf of layers that are skipped.
    Remove when 0.32 is no longer supported (vLLM 0.33 asks the registered handler).
    """
    original = kv_cache_interface.get_kv_quant_mode

    @functools.wraps(original)
    def get_kv_quant_mode(kv_cache_dtype: str) -> KVQuantMode:
        if kv_cache_dtype in PRESETS:
            return KVQuantMode[kv_cache_dtype]
        return original(kv_cache_dtype)

    _replace_function(original, get_kv_quant_mode)


def _replace_function(original, replacement) -> None:
    """Put `replacement` wherever a loaded module has `original`: vLLM imports these functions by name."""
    name = original.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


def add_backend() -> None:
    """Register the backend and have layers whose cache dtype is a preset use it, whatever else the model has.

    Why: vLLM's registry maps an enum member to a class and lets no backend claim a cache dtype. Overriding a member
    (TURBOQUANT, CPU_ATTN) would put one class in the place of another for every dtype, while layers and the builders
    that vLLM derives from `get_builder_cls()` never say which dtype they ask for. The platform's selection knows it:
    presets are answered here, every other call goes to the untouched original.
    Remove when vLLM selects registered backends by `supports_kv_cache_dtype` on all platforms.
    """
    from vllm.platforms import current_platform

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)

    platform_class = type(current_platform)
    original = platform_class.get_attn_backend_cls
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        from tq_vllm.plugin.checks import check_selection, check_stock_layer

        if attn_selector_config.kv_cache_dtype in PRESETS:
            check_selection(selected_backend, attn_selector_config)
            return BACKEND_PATH
        check_stock_layer(attn_selector_config)
        return original(selected_backend, attn_selector_config=attn_selector_config, num_heads=num_heads)

    setattr(get_attn_backend_cls, _MARK, original)
    platform_class.get_attn_backend_cls = classmethod(get_attn_backend_cls)
