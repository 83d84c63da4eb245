"""What the plugin's tests share: a registered plugin, vLLM configurations of tiny models, single layers; no engine."""

import json
from collections.abc import Callable

import pytest

TINY_MODEL = dict(
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=64,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="session", autouse=True)
def registered():
    from tq_vllm.plugin.register import register

    register()


@pytest.fixture
def tiny_config(tmp_path) -> Callable:
    """Make the VllmConfig of a tiny Qwen2 (head size 64) with changes to its config.json and to EngineArgs."""
    from vllm.engine.arg_utils import EngineArgs

    def make(model: dict | None = None, **engine_args):
        (tmp_path / "config.json").write_text(json.dumps({**TINY_MODEL, **(model or {})}))
        args = dict(
            kv_cache_dtype="turboquant",
            max_model_len=512,
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
        )
        return EngineArgs(model=str(tmp_path), **{**args, **engine_args}).create_engine_config()

    return make


@pytest.fixture
def attention_layer() -> Callable:
    """Build a vLLM Attention layer of `config`, as a model does."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    def make(config, num_heads=4, head_size=64, num_kv_heads=2, prefix="model.layers.0.self_attn.attn", **kwargs):
        with set_current_vllm_config(config):
            return Attention(
                num_heads,
                head_size,
                head_size**-0.5,
                num_kv_heads=num_kv_heads,
                cache_config=config.cache_config,
                prefix=prefix,
                **kwargs,
            )

    return make


@pytest.fixture(scope="module")
def single_rank(tmp_path_factory):
    """vLLM's process groups with this process alone in them: parallel linear layers ask for their rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    store = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
