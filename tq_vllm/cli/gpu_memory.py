"""How much memory a GPU leaves to the KV cache: an estimate from its size and the model's parameters."""

import re

from tq_vllm.cli.model_config import UnsupportedModelError, transformers_config

# In the maker's GB (10**9 bytes). The driver shows a little more; vLLM also takes activations and CUDA graphs.
GPUS = {
    "B200": 180, "H200": 141, "GH200": 96, "H100": 80, "A100": 80, "A100-40GB": 40, "L40S": 48, "L40": 48, "A40": 48,
    "A6000": 48, "A10": 24, "A10G": 24, "L4": 24, "RTX3090": 24, "RTX4090": 24, "RTX5090": 32,
}  # fmt: skip
GPU_MEMORY_UTILIZATION = 0.92  # vLLM's default


def gpu_memory(gpu: str) -> int:
    """Bytes of a GPU model by name.

    Raises:
        ValueError: not in GPUS.
    """
    wanted = re.sub(r"[^A-Z0-9]", "", gpu.upper().replace("NVIDIA", ""))
    for name, gigabytes in GPUS.items():
        if wanted in (name.replace("-", ""), name.replace("RTX", "")):
            return gigabytes * 10**9
    raise ValueError(f"--gpu {gpu!r}: allowed {', '.join(GPUS)}; for any other give the KV-cache memory with --memory.")


def default_batched_tokens(device: str, gpu: str | None) -> int:
    """--max-num-batched-tokens of `vllm serve` by default (EngineArgs.get_batch_defaults); an H100's without a name."""
    if device == "cpu":
        return 2048
    size = gpu_memory(gpu or "H100")
    if size >= 160 * 2**30:
        return 16384
    return 8192 if size >= 70 * 2**30 and "A100" not in (gpu or "").upper() else 2048


def weight_bytes(config: dict) -> int:
    """Bytes of the model's parameters in bf16, counted on the class that transformers builds for this config.json.

    Raises:
        UnsupportedModelError: the checkpoint is quantized, or transformers does not know the architecture.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    if config.get("quantization_config") or config.get("compression_config"):
        raise UnsupportedModelError(
            "The weights of a quantized checkpoint cannot be sized from its config.json: give --memory, not --gpu."
        )
    loaded = transformers_config(config)
    factories = [factory for factory in (AutoModelForCausalLM, AutoModel) if type(loaded) in factory._model_mapping]
    if not factories:
        raise UnsupportedModelError(
            f"transformers has no model class for model_type {loaded.model_type!r}, so its weights cannot be sized: "
            "give --memory, not --gpu."
        )
    with torch.device("meta"):
        model = factories[0].from_config(loaded)
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def kv_cache_memory(gpu: str, weights: int, key_offsets: int) -> int:
    """Bytes that remain for the KV cache of one GPU; activations and CUDA graphs, which vLLM measures, not subtracted.

    Raises:
        ValueError: nothing remains.
    """
    total = gpu_memory(gpu)
    memory = int(total * GPU_MEMORY_UTILIZATION) - weights - key_offsets
    if memory <= 0:
        raise ValueError(
            f"{weights / 1e9:.0f} GB of bf16 weights leave nothing of {GPU_MEMORY_UTILIZATION} x {total / 1e9:.0f} GB: "
            "choose a larger --gpu or a larger --tensor-parallel-size."
        )
    return memory
