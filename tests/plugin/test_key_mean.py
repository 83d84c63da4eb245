"""The fixed pass: key means of a whole tiny model, against transformers; determinism; what is refused, and how."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers import LlamaForCausalLM as HFLlama
from transformers import Qwen3ForCausalLM as HFQwen3
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from tests.plugin.rope import HEAD_DIM, NUM_KV_HEADS, ROPES, segment_means
from tq_vllm.plugin import key_mean, key_offset
from tq_vllm.plugin.metadata import TurboQuantMetadataBuilder

LAYERS, VOCAB = 2, 64
MODELS = {
    "llama": (LlamaForCausalLM, HFLlama, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, HFQwen3, Qwen3Config),  # keys are normalised after the projection
}


@pytest.fixture(autouse=True)
def float32_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    lines = []
    log = SimpleNamespace(**dict.fromkeys(("info", "warning"), lambda message, *args: lines.append(message % args)))
    monkeypatch.setattr(key_mean, "logger", log)
    return lines


@pytest.fixture
def make(tiny_config, single_rank):
    """A tiny model with random weights in vLLM and in transformers, its configuration and its layers."""

    def make(kind: str = "llama", **engine_args):
        served_class, reference_class, config_class = MODELS[kind]
        name = config_class.model_type
        config = tiny_config(
            dict(architectures=[served_class.__name__], model_type=name, head_dim=HEAD_DIM), **engine_args
        )
        reference_config = config_class(**config.model_config.hf_config.to_dict())
        torch.manual_seed(0)
        reference = reference_class(reference_config).float().eval()
        for parameter in reference.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        with set_current_vllm_config(config):
            served = served_class(vllm_config=config)
        served.load_weights(reference.named_parameters())
        layers = [module for module in served.modules() if type(module) is Attention]
        assert len(layers) == LAYERS
        return served, reference, config, layers

    return make


def _load(served: nn.Module, config) -> None:
    process_weights_after_loading(served, config.model_config, torch.device("cpu"))


def _build(config, layers: list[Attention]) -> TurboQuantMetadataBuilder:
    spec = FullAttentionSpec(
        block_size=64,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_DIM,
        dtype=torch.uint8,
        kv_quant_mode=get_kv_quant_mode(config.cache_config.cache_dtype),
    )
    with set_current_vllm_config(config):
        return TurboQuantMetadataBuilder(spec, [layer.layer_name for layer in layers], config, torch.device("cpu"))


@torch.inference_mode()
def _reference_keys(reference: nn.Module, num_tokens: int, first: int | None = None) -> list[torch.Tensor]:
    """What goes into RoPE in transformers: [num_tokens, num_kv_heads, head_dim] a layer."""
    ids = key_mean.pass_token_ids(VOCAB, num_tokens, first)
    keys, handles = [], []
    for layer in reference.model.layers:
        source = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)
        handles.append(source.register_forward_hook(lambda module, args, output: keys.append(output)))
    reference(ids[None])
    for handle in handles:
        handle.remove()
    return [k[0].view(num_tokens, NUM_KV_HEADS, HEAD_DIM).double() for k in keys]


def _reference_means(reference: nn.Module, num_tokens: int) -> list[torch.Tensor]:
    """Means over positions 1, 2, ...: [num_kv_heads, head_dim] a layer."""
    return [keys[1:].mean(0) for keys in _reference_keys(reference, num_tokens)]


@pytest.mark.parametrize("kind", MODELS)
def test_offsets_are_those_of_the_models_own_mean(make, lines, kind):
    served, reference, config, layers = make(kind)
    _load(served, config)
    assert all((layer.impl.key_offset == 0).all() for layer in layers)
    before = [(layer.impl, layer.impl.key_offset.data_ptr()) for layer in layers]
    builder = _build(config, layers)
    assert builder.positions is not None
    assert before == [(layer.impl, layer.impl.key_offset.data_ptr()) for layer in layers]
    for layer, mean in zip(layers, _reference_means(reference, 64), strict=True):
        assert mean.norm() > 0.5
        torch.testing.assert_close(layer.impl.key_mean.double(), mean, atol=1e-4, rtol=1e-3)
        expected = segment_means(ROPES["plain"], mean, 8)
        expected[0] = 0
        scale = 1 if layer.impl.key_scale is None else layer.impl.key_scale
        assert (layer.impl.key_offset - expected * scale).abs().max() < 1e-3
    (line,) = lines
    assert "keys of 2 layers centred by their mean over a fixed pass of 64 tokens" in line


@pytest.mark.parametrize("kind", MODELS)
def test_the_key_of_the_token_that_begins_every_prompt_is_the_first_offset(make, lines, monkeypatch, kind):
    monkeypatch.setattr(key_mean, "_first_token_of", lambda model_config: 3)
    served, reference, config, layers = make(kind)
    _load(served, config)
    _build(config, layers)
    for layer, keys in zip(layers, _reference_keys(reference, 64, first=3), strict=True):
        scale = 1 if layer.impl.key_scale is None else layer.impl.key_scale
        torch.testing.assert_close(layer.impl.key_offset[0].double(), keys[0] * scale, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(layer.impl.key_mean.double(), keys[1:].mean(0), atol=1e-4, rtol=1e-3)
    assert lines[0].endswith("those of a prompt's first positions by the key of token 3.")
    before = layers[0].impl.key_offset.clone()
    _load(served, config)
    assert torch.equal(layers[0].impl.key_offset, before)


@pytest.mark.parametrize("bos, ids, first", [(5, [5, 70], 5), (5, [70], None), (None, [70], None), (5, [], None)])
def test_only_a_tokenizer_knows_how_prompts_begin(bos, ids, first):
    assert key_mean.first_token(SimpleNamespace(bos_token_id=bos, encode=lambda text: ids)) == first


def test_a_tokenizer_that_fails_is_one_line(lines, monkeypatch):
    def fail(model_config):
        raise OSError("no tokenizer there")

    monkeypatch.setattr(key_mean, "cached_tokenizer_from_config", fail)
    assert key_mean._first_token_of(SimpleNamespace(skip_tokenizer_init=False)) is None
    assert key_mean._first_token_of(SimpleNamespace(skip_tokenizer_init=True)) is None
    assert lines == ["TurboQuant KV cache: how prompts begin is not known: OSError: no tokenizer there."]


def test_another_pass_gives_the_same_bits_and_other_tokens_others(make, monkeypatch):
    offsets = []
    for seed in (key_mean._SEED, key_mean._SEED, 1):
        monkeypatch.setattr(key_mean, "_SEED", seed)
        served, _, config, layers = make()
        _load(served, config)
        _build(config, layers)
        offsets.append(torch.stack([layer.impl.key_offset for layer in layers]))
    assert torch.equal(offsets[0], offsets[1]) and not torch.equal(offsets[0], offsets[2])


def test_the_tokens_are_pinned():
    assert key_mean.pass_token_ids(32000, 6).tolist() == [31876, 15769, 4665, 21557, 25599, 2317]
    assert key_mean.pass_token_ids(32000, 6, first=1).tolist() == [1, 15769, 4665, 21557, 25599, 2317]


def test_short_batches_shorten_the_pass(make, lines):
    served, reference, config, layers = make(max_num_batched_tokens=40, max_num_seqs=8)
    _load(served, config)
    _build(config, layers)
    torch.testing.assert_close(
        layers[1].impl.key_mean.double(), _reference_means(reference, 40)[1], atol=1e-4, rtol=1e-3
    )
    assert "a fixed pass of 40 tokens" in lines[0]


def test_the_pass_stores_nothing(make):
    """Not even when it is made inside a step of the engine whose metadata and slots are at hand."""
    served, _, config, layers = make()
    _load(served, config)
    for layer in layers:
        layer.kv_cache = torch.zeros(4, NUM_KV_HEADS, 64, layer.impl.page.slot_bytes, dtype=torch.uint8)
    slots = {layer.layer_name: torch.arange(64) for layer in layers}
    with set_forward_context({}, config, slot_mapping=slots):
        _build(config, layers)
    assert all((layer.impl.key_offset[1:] != 0).any() and (layer.kv_cache == 0).all() for layer in layers)


def test_a_reload_keeps_mean_and_address(make):
    served, _, config, layers = make()
    _load(served, config)
    _build(config, layers)
    impl = layers[0].impl
    address, before = impl.key_offset.data_ptr(), impl.key_offset.clone()
    impl.key_offset.fill_(7)  # what sleeping leaves of a tensor that lived with the weights
    _load(served, config)
    assert impl.key_offset.data_ptr() == address and torch.equal(impl.key_offset, before)


def test_offsets_are_buffers_that_no_checkpoint_has(make):
    served, _, config, layers = make()
    _load(served, config)
    buffers = dict(served.named_buffers())
    name = "model.layers.1.self_attn.attn.turboquant_key_offset"
    assert buffers[name] is layers[1].impl.key_offset and name not in served.state_dict()


@pytest.mark.parametrize("rope", ROPES)
def test_keys_are_rotated_back(make, tiny_config, rope):
    with set_current_vllm_config(tiny_config()):
        rotary_emb = get_rope(HEAD_DIM, 2048, rope_parameters=dict(ROPES[rope]), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    mean = 10 * torch.randn(NUM_KV_HEADS, HEAD_DIM, generator=generator)
    keys = mean + torch.randn(200, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    keys[0] = 1000.0  # the first key has no part in it
    rotated, _ = rotary_emb.forward_native(torch.arange(200), keys.flatten(1), None)
    found = key_offset.mean_before_rope(rotary_emb, rotated.view(keys.shape))
    torch.testing.assert_close(found, keys[1:].mean(0), atol=1e-3, rtol=1e-3)
    assert key_offset.energy_left(rotary_emb, torch.zeros_like(mean), rotated.view(keys.shape)) == 1.0
    assert key_offset.energy_left(rotary_emb, found, rotated.view(keys.shape)) < 0.8


def test_keys_that_are_not_finite_centre_nothing(make):
    served, _, config, layers = make()
    served.model.layers[1].self_attn.qkv_proj.weight.data[-2 * NUM_KV_HEADS * HEAD_DIM] = torch.nan
    _load(served, config)
    _build(config, layers)
    assert layers[1].impl.key_offset.isfinite().all()


def test_a_forward_of_another_kind_leaves_keys_as_they_are(make, lines, monkeypatch):
    """A draft head's forward wants hidden states: no offset, a line, and the same after a reload."""
    served, _, config, layers = make()
    monkeypatch.setattr(type(served), "forward", lambda self, input_ids, positions, hidden_states: None)
    _load(served, config)
    assert _build(config, layers).positions is None
    impls = [layer.impl for layer in layers]
    assert [impl.key_offset for impl in impls] == [None, None]
    (line,) = lines
    assert "keys of 2 layers not centred: the pass for their mean failed with TypeError" in line
    _load(served, config)
    assert [impl.key_offset for impl in impls] == [None, None]


def test_eight_bit_keys_are_left_as_they_are(make):
    served, _, config, layers = make(kv_cache_dtype="turboquant:k8v4")
    _load(served, config)
    assert key_offset.compute(layers[0].impl, torch.float32) == (None, "8-bit keys gain nothing by a mean")
    assert _build(config, layers).positions is None


def test_pipeline_stages_are_not_centred(make):
    served, _, _, layers = make()
    layers[0].impl.pipeline_parallel = True
    offset, why = key_offset.compute(layers[0].impl, torch.float32)
    assert offset is None and why == "a pipeline stage sees no activations at startup"


def test_models_with_other_caches_are_not_centred(make):
    class StateSpace(nn.Module, AttentionLayerBase):
        def get_attn_backend(self):
            raise NotImplementedError

        def get_kv_cache_spec(self, vllm_config):
            raise NotImplementedError

    served, _, _, layers = make()
    served.model.mixer = StateSpace()
    offset, why = key_offset.compute(layers[0].impl, torch.float32)
    assert offset is None and why == "the model has layers that need a cache for a pass (StateSpace)"
