"""What a checkpoint's config.json says about its KV cache: which layers keep keys and values, how many heads, how wide.

Keys that it leaves out take the defaults of the transformers class of its `model_type`, as in vLLM.
"""

from dataclasses import dataclass

ALTERNATIVE = "Use --kv-cache-dtype auto or fp8 for this model"

# Layer types of transformers configurations. vLLM gives chunked-local layers the pages of full attention by default.
FULL_ATTENTION = ("full_attention", "attention", "chunked_attention")
SLIDING_ATTENTION = ("sliding_attention",)
RECURRENT = ("linear_attention", "mamba", "mamba2", "conv", "short_conv", "recurrent")
NO_CACHE = ("mlp", "moe")
PARALLEL = ("hybrid",)  # attention and a recurrent state in one layer
LAYER_TYPES = FULL_ATTENTION + SLIDING_ATTENTION + RECURRENT + NO_CACHE + PARALLEL

ENCODERS = (
    "albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "nomic_bert",
    "roberta", "xlm-roberta",
)  # fmt: skip
IMAGE_PREFIX_MODELS = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
RECURRENT_MODELS = ("mamba", "mamba2", "falcon_mamba", "rwkv")


class UnsupportedModelError(ValueError):
    """A model that a TurboQuant cache cannot serve, or whose cache cannot be counted from its config.json."""


@dataclass(frozen=True)
class ModelShape:
    """The part of a model that decides the size of its KV cache; counts are for the whole model, before any split.

    Attributes:
        num_full_layers, num_sliding_layers: layers with a KV cache of their own; `sliding_window` in tokens.
        num_shared_layers: layers that read another layer's cache. num_recurrent_layers: layers with a fixed state.
        max_model_len: longest sequence, as vLLM derives it. centred_by: "bias", "mean" or "": what offset keys get.
        image_prefix: tokens of an image attend both ways.
    """

    model_type: str
    num_full_layers: int
    num_sliding_layers: int
    sliding_window: int
    num_shared_layers: int
    num_recurrent_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    centred_by: str
    image_prefix: bool = False

    def kv_heads_per_rank(self, tensor_parallel_size: int) -> int:
        """KV heads that one GPU holds; vLLM repeats heads where there are fewer than GPUs.

        Raises:
            ValueError: a size that vLLM refuses for this number of heads.
        """
        tp = tensor_parallel_size
        divides = tp > 0 and (self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0)
        if not divides or self.num_heads % tp:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            sizes = [n for n in divisors if n % self.num_kv_heads == 0 or self.num_kv_heads % n == 0]
            raise ValueError(
                f"--tensor-parallel-size {tp} does not split {self.num_heads} heads and {self.num_kv_heads} KV heads "
                f"evenly, allowed {', '.join(map(str, sizes))}."
            )
        return max(1, self.num_kv_heads // tp)


def transformers_config(config: dict):
    """The transformers configuration object of a config.json.

    Raises:
        UnsupportedModelError: transformers refuses its values.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()  # advice about keys, which is not the reader's to follow
    model_type = config["model_type"]
    try:
        if model_type in CONFIG_MAPPING:
            return CONFIG_MAPPING[model_type].from_dict(config)
        plain = PretrainedConfig()
        for key, value in config.items():
            setattr(plain, key, value)
        return plain
    except (TypeError, ValueError, AttributeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"transformers refuses this {model_type} config.json: {reason}.") from None


def model_shape(config: dict) -> ModelShape:
    """Read the shape of the KV cache from a config.json.

    Raises:
        UnsupportedModelError: MLA, encoders, ALiBi, no attention, or layers of unlike shape; one sentence says which.
    """
    whole = transformers_config(config)
    text = whole.get_text_config(decoder=True)
    if isinstance(text, dict):  # a model_type that transformers does not know
        text = transformers_config({"model_type": whole.model_type, **text})
    _refuse(whole, text)

    layers = _layer_types(text)
    num_shared = getattr(text, "num_kv_shared_layers", None) or 0
    layers, shared = layers[: len(layers) - num_shared], layers[len(layers) - num_shared :]
    window = getattr(text, "sliding_window", None) or 0
    num_sliding = sum(kind in SLIDING_ATTENTION for kind in layers) if window else 0
    num_attention = sum(kind in FULL_ATTENTION + SLIDING_ATTENTION + PARALLEL for kind in layers)
    if not num_attention:
        raise UnsupportedModelError(f"This {text.model_type} model has no attention layer and so no KV cache to count.")

    num_heads = _whole_number(text, "num_attention_heads", "n_head", "n_heads")
    head_dim = next((d for key in HEAD_DIM_KEYS if (d := getattr(text, key, None))), None)
    return ModelShape(
        model_type=text.model_type,
        num_full_layers=num_attention - num_sliding,
        num_sliding_layers=num_sliding,
        sliding_window=window if num_sliding else 0,
        num_shared_layers=len(shared),
        num_recurrent_layers=sum(kind in RECURRENT + PARALLEL for kind in layers),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(text, num_heads),
        head_dim=head_dim or _whole_number(text, "hidden_size", "n_embd", "d_model") // num_heads,
        max_model_len=_max_model_len(text),
        centred_by=_centred_by(text, layers),
        image_prefix=whole.model_type in IMAGE_PREFIX_MODELS,
    )


# In the order in which vLLM looks: vllm/transformers_utils/model_arch_config_convertor.py.
HEAD_DIM_KEYS = ("attention_head_dim", "head_dim", "hidden_size_per_head")
KV_HEAD_KEYS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")


def _num_kv_heads(text, num_heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    attention = getattr(text, "attn_config", None)  # DBRX
    return getattr(attention, "kv_n_heads", None) or _whole_number(text, *KV_HEAD_KEYS, default=num_heads)


def _whole_number(text, *keys: str, default: int | None = None) -> int:
    value = next((v for key in keys if (v := getattr(text, key, None)) is not None), default)
    if isinstance(value, int) and value > 0:
        return value
    raise UnsupportedModelError(
        f"{keys[0]} of this {text.model_type} config.json: got {value!r}, allowed one whole number for all layers; "
        f"{ALTERNATIVE}."
    )


def _refuse(whole, text) -> None:
    kind = getattr(text, "model_type", "") or whole.model_type
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"MLA models keep one latent vector a token and no keys and values: got {kind} with kv_lora_rank "
            f"{text.kv_lora_rank}, allowed multi-head, grouped-query and multi-query attention. {ALTERNATIVE}."
        )
    encoder_only = whole.model_type in ENCODERS and not getattr(whole, "is_decoder", False)
    if encoder_only or getattr(whole, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"Encoder models have no causal KV cache that grows by the token: got {whole.model_type}, allowed "
            f"decoder-only models. {ALTERNATIVE}."
        )
    attention = getattr(text, "attn_config", None)
    alibi = attention.get("alibi") if isinstance(attention, dict) else getattr(attention, "alibi", False)
    if alibi or getattr(text, "alibi", False) or kind == "bloom":
        raise UnsupportedModelError(
            f"ALiBi position biases are not supported by a TurboQuant cache: got {kind}, allowed models with rotary "
            f"or learned positions. {ALTERNATIVE}."
        )
    unlike = ("is_heterogeneous", "block_configs", "global_head_dim")
    if reason := next((name for name in unlike if getattr(text, name, None)), None):
        raise UnsupportedModelError(
            f"Layers of unlike shape are not counted here: got {kind} with {reason}, allowed one shape for all layers; "
            "start the server instead, vLLM prints the tokens that fit."
        )


def _layer_types(text) -> list[str]:
    """The type of every layer; without a list of types, all are alike."""
    if text.model_type in RECURRENT_MODELS:
        return []
    num_layers = _whole_number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    layers = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if text.model_type == "falcon_h1":
        layers = ["hybrid"] * num_layers
    if layers is None:
        return ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"] * num_layers
    unknown = sorted(set(layers) - set(LAYER_TYPES))
    if unknown:
        raise UnsupportedModelError(
            f"Layer types of this {text.model_type} model: got {', '.join(unknown)}, allowed {', '.join(LAYER_TYPES)}. "
            f"{ALTERNATIVE}."
        )
    return list(layers)


def _max_model_len(text) -> int:
    """The longest sequence that vLLM derives (vllm/config/model.py, _get_and_verify_max_len)."""
    keys = (
        "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
        "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
    )  # fmt: skip
    length = min((v for key in keys if (v := getattr(text, key, None)) is not None), default=2048)
    length = getattr(text, "model_max_length", None) or length
    ropes = [rope for rope in _rope_parameters(text) if rope.get("rope_type") is not None]
    if any(rope["rope_type"] == "longrope" for rope in ropes):
        return int(getattr(text, "original_max_position_embeddings", None) or length)
    already_scaled = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
    if "gemma3" not in text.model_type:
        factors = [rope.get("factor") or 1.0 for rope in ropes if rope["rope_type"] not in already_scaled]
        length *= factors[-1] if factors else 1.0
    return int(length)


def _rope_parameters(text) -> list[dict]:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [r for r in rope.values() if isinstance(r, dict)] if "rope_type" not in rope else [rope]


def _centred_by(text, layers: list[str]) -> str:
    """What offset the plugin gives keys, under RoPE by the position alone: by a bias that no norm follows, or a mean.

    A mean needs a pass through the model without a cache, so it needs plain attention in every layer.
    """
    ropes = _rope_parameters(text)
    if not ropes or any("mrope_section" in rope for rope in ropes):
        return ""
    flags = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias")
    biased = text.model_type in ("phi", "qwen2", "qwen2_moe") or any(getattr(text, flag, False) for flag in flags)
    if biased and not text.model_type.startswith("qwen3"):
        return "bias"
    plain = all(kind in ("full_attention", "attention", *SLIDING_ATTENTION) for kind in layers)
    return "mean" if plain else ""
