"""The only package that imports vllm: a TurboQuant cache on stock vLLM."""
