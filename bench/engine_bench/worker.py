"""What an engine's worker says of itself, through vLLM's own --worker-extension-cls."""


class AttentionReport:
    """Mixed into vLLM's worker: more methods that `collective_rpc` can call."""

    def start_profile_of_kernels(self) -> None:
        """Record every kernel of this GPU from now on."""
        from torch.profiler import ProfilerActivity, profile

        self.kernel_profile = profile(activities=[ProfilerActivity.CUDA])
        self.kernel_profile.start()

    def stop_profile_of_kernels(self) -> list[tuple[str, float, float]]:
        """Name, start and duration of what was recorded, microseconds."""
        self.kernel_profile.stop()
        events = self.kernel_profile.profiler.kineto_results.events()
        on_gpu = [event for event in events if event.device_type().name == "CUDA"]
        return [(event.name(), event.start_ns() / 1e3, event.duration_ns() / 1e3) for event in on_gpu]

    def attention_report(self) -> dict:
        """Layers with their attention class and cache dtype, the engine's settings and its device."""
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention
        from vllm.platforms import current_platform

        config = self.vllm_config
        layers = get_layers_from_vllm_config(config, Attention)
        return {
            "layers": [
                {
                    "name": name,
                    "module": type(layer.impl).__module__,
                    "impl": type(layer.impl).__name__,
                    "kv_cache_dtype": str(layer.kv_cache_dtype),
                }
                for name, layer in layers.items()
            ],
            "device": current_platform.get_device_name(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "cudagraph_capture_sizes": list(config.compilation_config.cudagraph_capture_sizes or []),
        }
