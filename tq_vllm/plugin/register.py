"""The entry point of `vllm.general_plugins`: makes every preset a `--kv-cache-dtype` and gives it its backend."""

import vllm

from tq_vllm import TESTED_VLLM
from tq_vllm.plugin import compat


def register() -> None:
    """Teach this process's vLLM the presets.

    vLLM calls this in every process (API server before it parses arguments, engine core, workers, model inspection),
    in some of them several times: every step looks before it acts, and none initialises CUDA. A vLLM that lacks what
    the plugin hooks into is left alone, with one line in its log.
    """
    if missing := compat.missing_interface():
        compat.logger.error(
            "TurboQuant KV cache is not available: got vLLM %s, which has no %s, allowed %s; use one of those.",
            vllm.__version__,
            missing,
            " and ".join(TESTED_VLLM),
        )
        return
    compat.add_quant_modes()
    compat.add_cache_dtypes()
    compat.add_backend()
