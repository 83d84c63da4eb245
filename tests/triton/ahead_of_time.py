"""Compiles the launches of a call for a GPU that isn't there."""

import sys

import pytest
import torch

NAMES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int8: "*i8",
    torch.uint8: "*u8",
}  # fmt: skip


class Recorder:
    """Stands for a kernel: `kernel[grid](*args)` appends (kernel, args, options) to `launches` and runs nothing."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(monkeypatch: pytest.MonkeyPatch, modules, call) -> list:
    """Run `call()` with every kernel in `modules` replaced by a Recorder and return the launches."""
    launches: list = []
    for module in modules:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    call()
    return launches


def compile_launch(kernel, args: tuple, options: dict, capability: int):
    """Compile a recorded launch to a cubin, with the specialisation on divisibility by 16 that a real one gets."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    chosen = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)


CASES = {
    "K4V4 decode": {"fresh": False, "query_lens": (1, 1), "head_dim": 128, "group": 4, "block_size": 64},
    "K4V4 prefill": {"query_lens": (40, 40), "head_dim": 128, "group": 4, "block_size": 64},
    "K4V4 long prefill": {"seq_lens": (200, 200), "query_lens": (200, 10), "head_dim": 128, "group": 4},
    "K3V3 decode": {"preset": "turboquant:k3v3", "fresh": False, "query_lens": (1, 1), "head_dim": 64},
    "K5V4 verify, everything": {
        "preset": "turboquant:k5v4", "fresh": False, "query_lens": (4, 4), "head_dim": 256, "group": 8,
        "with_sinks": True, "with_offset": True, "sliding_window": 40, "logits_soft_cap": 5.0,
    },
    "K8V4 prefill, everything": {
        "preset": "turboquant:k8v4", "query_lens": (40, 40), "head_dim": 256, "with_sinks": True, "with_offset": True,
        "sliding_window": 40, "logits_soft_cap": 5.0,
    },
    "K3V3 long prefill": {"preset": "turboquant:k3v3", "query_lens": (40, 40), "head_dim": 128, "group": 16},
    "K2V2 prefill, codes only": {"preset": "turboquant:k2v2", "fresh": False, "query_lens": (40, 40), "head_dim": 96},
    "T3 decode": {"preset": "turboquant:t3", "fresh": False, "query_lens": (1, 1), "head_dim": 128, "group": 4},
    "prod decode": {
        "preset": "turboquant:prod", "fresh": False, "query_lens": (1, 1), "head_dim": 128, "group": 4,
        "block_size": 64,
    },
    "prod prefill": {"preset": "turboquant:prod", "query_lens": (40, 40), "head_dim": 128, "group": 16},
    "K8V8 f32 prefill": {"preset": "turboquant:k8v8", "query_lens": (40, 40), "head_dim": 128, "dtype": torch.float32},
}  # fmt: skip
FLASH_CASES = {  # a buffer of 64 tokens: several passes
    "K4V4": {"head_dim": 128, "block_size": 64, "with_sinks": True},
    "K5V4 d256 offset": {"preset": "turboquant:k5v4", "head_dim": 256, "with_offset": True},
    "T3": {"preset": "turboquant:t3", "head_dim": 128},
    "prod d256 offset": {"preset": "turboquant:prod", "head_dim": 256, "with_offset": True},
    "K8V8 f16": {"preset": "turboquant:k8v8", "head_dim": 64, "dtype": torch.float16},
}
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may use


def main(capability: int) -> None:
    """Compile every kernel of every case and print one line a kernel; exit 1 where one doesn't fit."""
    from tests.ops import batches
    from tq_vllm.ops import flash_ops, flash_workspace, triton_ops
    from tq_vllm.triton_kernels import decode, dequantize, merge, merge_passes, prefill, rotation

    prefill.shared_memory = lambda device: SHARED_MEMORY[capability]
    flash_workspace.WORKSPACE_BYTES = 0
    flash_ops.provide(lambda query, *_: (query, torch.zeros(query.shape[1], len(query))))
    cases = [(triton_ops, (decode, merge, prefill, rotation), *case) for case in CASES.items()]
    cases += [(flash_ops, (dequantize, merge_passes), *case) for case in FLASH_CASES.items()]
    for ops, modules, name, fields in cases:
        batch = batches.Batch(**{"dtype": torch.bfloat16, "seq_lens": (150, 45), "query_lens": (40, 3)} | fields)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "attention", ops.attention)
            launches = record(patch, modules, batch.attend)
        for kernel, args, options in launches:
            compiled = compile_launch(kernel, args, options, capability)
            shared = compiled.metadata.shared
            size = len(compiled.asm["cubin"])
            print(f"sm_{capability} {name}: {kernel.__name__}, {size} bytes, {shared} shared", flush=True)
            if shared > SHARED_MEMORY[capability]:
                sys.exit(f"{kernel.__name__} of {name} takes {shared} bytes, a block has {SHARED_MEMORY[capability]}.")


if __name__ == "__main__":
    main(int(sys.argv[1]))
