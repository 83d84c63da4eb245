"""The named workloads, and the flags of vLLM's benchmark commands that each one stands for."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Workload:
    """Requests of equal length.

    Attributes:
        what: one line for --help and the table.
        input_len, output_len: tokens a request, the shared prefix not counted.
        num_prompts: requests of `vllm bench throughput` and `serve`.
        batch: requests at a time; None: all at once, the engine's scheduler decides.
        prefix_len: tokens that all requests share and the prefix cache holds; 0: the prefix cache is off.
        kv_cache_memory_bytes: memory of the KV cache, the same for every cache dtype.
        max_model_len: of the engine.
        max_num_batched_tokens: tokens of one step; None: vLLM's default.
    """

    what: str
    input_len: int
    output_len: int
    num_prompts: int
    batch: int | None
    kv_cache_memory_bytes: int
    max_model_len: int
    prefix_len: int = 0
    max_num_batched_tokens: int | None = None

    @property
    def offline_command(self) -> str:
        """The command of `vllm bench` that measures it without a server.

        Raises:
            ValueError: prefix hits, whose time to first token only a server shows.
        """
        if self.prefix_len:
            raise ValueError(f"workload {self.what!r} is measured by bench/serve.py: vLLM's offline benchmarks have no "
                             "time to first token of a cached prefix.")  # fmt: skip
        return "throughput" if self.batch is None else "latency"

    def engine_flags(self) -> list[str]:
        """Flags of the engine, for `vllm serve` and the offline commands alike."""
        flags = ["--max-model-len", str(self.max_model_len)]
        flags += ["--enable-prefix-caching" if self.prefix_len else "--no-enable-prefix-caching"]
        if self.max_num_batched_tokens:
            flags += ["--max-num-batched-tokens", str(self.max_num_batched_tokens)]
        return flags

    def offline_flags(self) -> list[str]:
        """Flags of `vllm bench throughput` or `latency`, without those of the engine."""
        if self.offline_command == "throughput":
            lengths = ["--random-input-len", str(self.input_len), "--random-output-len", str(self.output_len)]
            return ["--dataset-name", "random", *lengths, "--num-prompts", str(self.num_prompts)]
        lengths = ["--input-len", str(self.input_len), "--output-len", str(self.output_len)]
        return [*lengths, "--batch-size", str(self.batch), "--num-iters-warmup", "1", "--num-iters", "3"]

    def client_flags(self) -> list[str]:
        """Flags of `vllm bench serve`, without the number of requests at a time."""
        flags = ["--dataset-name", "random", "--random-input-len", str(self.input_len)]
        flags += ["--random-output-len", str(self.output_len), "--num-prompts", str(self.num_prompts)]
        return flags + (["--random-prefix-len", str(self.prefix_len), "--num-warmups", "1"] if self.prefix_len else [])


WORKLOADS = {
    "main": Workload("48 requests of 8192 in, 256 out", 8192, 256, 48, None, 16 * GIB, 8704),
    "b1-1k": Workload("batch 1, 1k of context", 1024, 256, 8, 1, 16 * GIB, 2048),
    "b8-1k": Workload("batch 8, 1k of context", 1024, 256, 32, 8, 16 * GIB, 2048),
    "b1-128k": Workload("batch 1, 128k of context", 130_048, 512, 2, 1, 20 * GIB, 131_072),
    "8x32k": Workload("batch 8, 32k of context", 32_768, 256, 16, 8, 36 * GIB, 33_280),
    "prefill-32k": Workload(
        "one prompt of 32k, chunks of 8192", 32_768, 1, 4, 1, 16 * GIB, 33_280, max_num_batched_tokens=8192
    ),
    "prefix-hit": Workload("a cached prefix of 32k and 512 new", 512, 16, 16, 1, 16 * GIB, 33_792, prefix_len=32_768),
}


def get_workload(name: str) -> Workload:
    """Raises: ValueError for a name that is not there."""
    if name not in WORKLOADS:
        raise ValueError(f"--workload {name!r}: allowed {', '.join(WORKLOADS)}.")
    return WORKLOADS[name]
