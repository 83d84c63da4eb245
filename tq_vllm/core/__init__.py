"""The TurboQuant algorithm in plain PyTorch: any device, no vLLM, the reference that every kernel is compared with."""
