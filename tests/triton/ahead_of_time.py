"""Compiles the launches of a call for a GPU that isn't there."""

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

    num_warps = options.get("num_warps", 4)
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
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
