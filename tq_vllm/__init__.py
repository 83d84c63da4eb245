"""TurboQuant (arXiv 2504.19874) as a KV-cache format for vLLM."""

__version__ = "0.1.0"

TESTED_VLLM = ("0.32", "0.33")
MIN_CUDA_CAPABILITY = (8, 0)  # int8 tensor cores with the shapes that the kernels use
