"""The rivals that stand for vLLM's turboquant_*: they keep what vLLM's kernels keep, run by Triton's interpreter."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "quality"))

from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids  # noqa: E402
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig  # noqa: E402
from vllm_turboquant import round_trip, vllm_turboquant  # noqa: E402

from tq_vllm.core.hadamard import hadamard_matrix  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


@pytest.fixture
def kernels(monkeypatch):
    """The modules of vLLM's store and decode, on Triton itself: vLLM for a CPU gives them a placeholder."""
    import triton
    import triton.language
    import vllm

    utils = types.SimpleNamespace(triton=triton, tl=triton.language)
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", utils)
    folder, modules = Path(vllm.__file__).parent / "v1" / "attention" / "ops", []
    for name in ("triton_turboquant_decode", "triton_turboquant_store"):
        if name.endswith("decode"):  # the other kernel of the decode's last stage, which is not used here
            other = types.SimpleNamespace(_fwd_kernel_stage2=None)
            monkeypatch.setitem(sys.modules, "vllm.v1.attention.ops.triton_decode_attention", other)
        spec = importlib.util.spec_from_file_location(f"vllm.v1.attention.ops.{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules


@pytest.mark.parametrize("name", TQ_PRESETS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_round_trip_is_that_of_the_kernels(name, head_dim, kernels):
    decode, store = kernels
    config = TurboQuantConfig.from_cache_dtype(name, head_dim)
    tokens, heads, block_size = 20, 2, 16
    random = torch.Generator().manual_seed(0)
    key, value = 3 * torch.randn(2, tokens, heads, head_dim, generator=random)
    rotation = hadamard_matrix(head_dim).float() / head_dim**0.5
    levels = get_centroids(head_dim, config.centroid_bits)
    midpoints = (levels.sort().values[1:] + levels.sort().values[:-1]) / 2
    cache = torch.zeros(3, block_size, heads, config.slot_size_aligned, dtype=torch.uint8)
    table, slots = torch.tensor([[2, 0]], dtype=torch.int32), torch.arange(tokens, dtype=torch.int32)
    slots = table[0, slots // block_size] * block_size + slots % block_size
    store.triton_turboquant_store(
        key, value, cache, slots, rotation, midpoints, config.key_mse_bits, config.key_packed_size,
        config.effective_value_quant_bits, config.key_fp8,
    )  # fmt: skip
    found = torch.zeros(2, 1, heads, tokens, head_dim, dtype=torch.float16)
    decode._tq_full_dequant_kv[(tokens, heads)](
        cache, table, levels, found[0], found[1], *found[0].stride()[:3], *found[1].stride()[:3], *cache.stride()[:3],
        table.stride(0), HEAD_DIM=head_dim, BLOCK_SIZE=block_size, NUM_KV_HEADS=heads,
        MSE_BYTES=-(-head_dim * config.key_mse_bits // 8), KPS=config.key_packed_size,
        VQB=config.effective_value_quant_bits, VAL_DATA_BYTES=-(-head_dim * config.effective_value_quant_bits // 8),
        MSE_BITS=config.key_mse_bits, KEY_FP8=int(config.key_fp8), BLOCK_D=head_dim,
        NORM_CORRECTION=int(config.norm_correction),
    )  # fmt: skip
    expected_keys, expected_values = round_trip(config)(key, value)
    if not config.key_fp8:  # the interpreter's e4m3 loses the carry where a mantissa rounds up to the next power of two
        torch.testing.assert_close(found[0, 0].transpose(0, 1).float() @ rotation, expected_keys, rtol=0, atol=0.01)
    torch.testing.assert_close(found[1, 0].transpose(0, 1).float(), expected_values, rtol=0, atol=0.01)
    assert (expected_keys - key).abs().max() > 0.1  # coarser than what is allowed here


def test_first_and_last_layers_stay_raw():
    x = torch.randn(1, 2, 5, 64)
    for rival in vllm_turboquant(num_layers=6):
        raw = [torch.equal(rival.layer(64, layer).round_trip(x, x)[0], x) for layer in range(6)]
        assert raw == [True, True, False, False, True, True]
    bytes_of = {rival.name: rival.token_bytes(64, 0) for rival in vllm_turboquant(num_layers=6)}
    assert bytes_of["vLLM turboquant_4bit_nc"] == (4 * 256 + 2 * (34 + 36)) / 6
