"""The entry point of `vllm.general_plugins`: makes every preset a `--kv-cache-dtype` and gives it its backend."""

from tq_vllm.plugin import compat


def register() -> None:
    """Teach this process's vLLM the presets.

    vLLM calls this in every process (API server before it parses arguments, engine core, workers, model inspection),
    in some of them several times: every step looks before it acts, and none initialises CUDA.
    """
    compat.add_quant_modes()
    compat.add_cache_dtypes()
    compat.add_backend()
