"""How a preset travels through vLLM: as a cache dtype name, and as a KVQuantMode of the same name."""

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from tq_vllm.config import PRESETS, TurboQuantConfig

STORAGE_DTYPE = torch.uint8

# Far from vLLM's own modes (below 20), so that a release which adds some does not collide with ours.
_FIRST_MODE = 7000


def add_quant_mode(name: str) -> None:
    """Add the member `KVQuantMode[name]`, as vLLM names the modes of its own packed formats after their dtypes.

    A cache spec carries the mode of its layer and nothing else of the dtype string, so this is how the page size is
    found. The value depends on the order of PRESETS alone: specs are pickled between processes by value.
    """
    if name in KVQuantMode.__members__:
        return
    value = _FIRST_MODE + list(PRESETS).index(name)
    member = int.__new__(KVQuantMode, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = KVQuantMode
    member._sort_order_ = len(KVQuantMode.__members__)
    KVQuantMode._member_map_[name] = member
    KVQuantMode._value2member_map_[value] = member
    KVQuantMode._member_names_.append(name)


def config_of(spec: AttentionSpec) -> TurboQuantConfig | None:
    """The preset that the layers of `spec` are stored in; None for every other cache dtype."""
    return PRESETS.get(spec.kv_quant_mode.name)
