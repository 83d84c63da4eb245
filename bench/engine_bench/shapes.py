"""Model shapes without weights: a directory that vLLM loads with --load-format dummy, tokenizer included.

vLLM's benchmarks make their prompts by decoding and re-encoding random tokens, so they want a tokenizer. The one
written here has one word a token: every prompt has exactly the length that was asked for.
"""

import json
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "use_cache": True,
    "transformers_version": "5.0.0",
}

SHAPES = {
    "llama-3.1-8b": LLAMA
    | {
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "vocab_size": 128256,
    },
    "llama-tiny": LLAMA
    | {
        "bos_token_id": 16382,
        "eos_token_id": 16383,
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16384,
    },
}


def write_shape(name: str, directory: Path) -> Path:
    """Write config.json and a tokenizer of a shape into `directory`/`name` and return that path.

    Raises:
        ValueError: a name that SHAPES does not have.
    """
    if name not in SHAPES:
        raise ValueError(f"--shape {name!r}: allowed {', '.join(SHAPES)}; for a real model use --model.")
    config = SHAPES[name]
    # vLLM refuses prompts of more characters than tokens times the longest word: the special words are longer than any
    # other and the space after it.
    words = [f"w{i}" for i in range(config["vocab_size"])]
    words[config["bos_token_id"]], words[config["eos_token_id"]] = "<|begin_of_text|>", "<|end_of_text|>"
    specials = {"bos_token": words[config["bos_token_id"]], "eos_token": words[config["eos_token_id"]]}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": words.index(word), "content": word, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for word in specials.values()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": words[0]},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": config["max_position_embeddings"], **specials}
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    for file, content in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
    ):
        (path / file).write_text(json.dumps(content))
    return path
