"""TurboQuant (arXiv 2504.19874) as a KV-cache format for vLLM."""

__version__ = "0.1.0"
