"""What a TurboQuant cache cannot serve, as a user meets it: real vLLM stops at startup with one sentence."""

import json
import os
import subprocess
import sys

import pytest

from tq_vllm.config import PRESETS

pytestmark = pytest.mark.engine

SMALL = dict(
    vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512, hidden_act="silu",
)  # fmt: skip
LLAMA = SMALL | dict(architectures=["LlamaForCausalLM"], model_type="llama")
DEEPSEEK = SMALL | dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", kv_lora_rank=64, q_lora_rank=None,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=2, n_shared_experts=1,
    num_experts_per_tok=1, first_k_dense_replace=2, moe_intermediate_size=64,
)  # fmt: skip
BERT = SMALL | dict(architectures=["BertModel"], model_type="bert", hidden_act="gelu")
BLOOM = dict(
    architectures=["BloomForCausalLM"], model_type="bloom", vocab_size=64, hidden_size=256, n_layer=2, n_head=4
)  # fmt: skip

# what is wrong -> (config.json, engine arguments, the sentence)
CASES = {
    "unknown preset": (
        LLAMA,
        {"kv_cache_dtype": "turboquant:k9v9"},
        f"Unknown TurboQuant preset: got 'turboquant:k9v9', allowed {', '.join(PRESETS)}. "
        "Use --kv-cache-dtype turboquant if in doubt.",
    ),
    "head size": (
        LLAMA | {"head_dim": 72},
        {},
        "Head size with a TurboQuant KV cache: got 72, allowed (64, 80, 96, 112, 128, 192, 256); "
        "use --kv-cache-dtype auto instead.",
    ),
    "MLA": (
        DEEPSEEK,
        {},
        "Attention with a TurboQuant KV cache: got multi-head latent attention (MLA), allowed multi-head, grouped or "
        "multi-query attention; use --kv-cache-dtype auto instead.",
    ),
    "encoder": (
        BERT,
        {"runner": "pooling"},
        "Attention with a TurboQuant KV cache: got encoder_only attention, allowed decoder attention; "
        "use --kv-cache-dtype auto instead.",
    ),
    "ALiBi": (
        BLOOM,
        {},
        "Position encoding with a TurboQuant KV cache: got ALiBi, allowed rotary or none; "
        "use --kv-cache-dtype auto instead.",
    ),
    "block size": (
        LLAMA,
        {"block_size": 40},
        "--block-size with a TurboQuant KV cache: got 40, allowed multiples of 16; use 64 instead.",
    ),
    "another backend": (
        LLAMA,
        {"attention_backend": "CPU_ATTN"},
        "Attention backend with a TurboQuant KV cache: got CPU_ATTN, allowed TQ_VLLM or none; "
        "use no --attention-backend instead.",
    ),
}

SCRIPT = """
import json, sys
from vllm import LLM

COMMON = dict(
    kv_cache_dtype="turboquant", max_model_len=256, dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
    load_format="dummy", kv_cache_memory_bytes=16 << 20,
)
said = {}
for name, (model, arguments) in json.loads(sys.argv[1]).items():
    try:
        LLM(model, **{**COMMON, **arguments})
        said[name] = "it started"
    except ValueError as error:
        said[name] = str(error)
print("SAID", json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What each case ends in; all in one process, so that vLLM is imported once."""
    jobs = {}
    for name, (config, arguments, _) in CASES.items():
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(config))
        jobs[name] = str(folder), arguments
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(jobs)], capture_output=True, text=True, env=env)
    line = next((line for line in done.stdout.splitlines() if line.startswith("SAID")), None)
    assert line, done.stderr[-3000:]
    return json.loads(line.removeprefix("SAID"))


@pytest.mark.parametrize("case", CASES)
def test_startup_ends_in_the_sentence(said, case):
    sentence = CASES[case][2]
    # pydantic wraps what it validates; everything else is the sentence alone
    assert sentence in said[case] if case == "unknown preset" else said[case] == sentence
