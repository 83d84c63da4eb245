"""No figure of a cache format without the attention class that knows it."""

from tq_vllm.config import PRESETS

OUR_IMPL = "tq_vllm.plugin.impl.TurboQuantImpl"


class RefusedError(RuntimeError):
    """The engine does not do what the row would claim: its figures mean nothing."""


def check_attention(dtype: str, layers: list[dict]) -> str:
    """Check that layers have the cache that was asked for, and a class that can read it.

    Args:
        dtype: as given to --kv-cache-dtype.
        layers: a dict a layer: name, impl (qualified class name), kv_cache_dtype, known (whether the layer's backend
            says that it reads that dtype).

    Returns:
        What the row says, as "TurboQuantImpl on 30 of 30 layers".

    Raises:
        RefusedError: no layer has that cache, another class than the plugin's attends to a preset, or the class does
            not know the format. On a CPU vLLM takes its own turboquant_* and generates garbage: that is refused here.
    """
    mine = [layer for layer in layers if dtype == "auto" or layer["kv_cache_dtype"] == dtype]
    if not mine:
        got = ", ".join(sorted({layer["kv_cache_dtype"] for layer in layers})) or "no attention layers"
        raise RefusedError(f"no layer has a {dtype} cache: got {got}.")
    for layer in mine:
        if (layer["impl"] == OUR_IMPL) != (dtype in PRESETS):
            raise RefusedError(f"{layer['impl']} attends to the {dtype} cache of {layer['name']}.")
        if dtype != "auto" and not layer["known"]:
            raise RefusedError(f"{layer['impl']} takes a {dtype} cache but does not know the format: it reads garbage.")
    names = sorted({layer["impl"].rsplit(".", 1)[-1] for layer in mine})
    return f"{', '.join(names)} on {len(mine)} of {len(layers)} layers"
