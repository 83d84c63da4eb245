"""`tq-vllm eval` before any engine starts."""

import json

from tq_vllm.cli import eval as eval_command
from tq_vllm.cli.__main__ import main

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 256, "max_position_embeddings": 4096,
}  # fmt: skip


def test_needles_that_no_sequence_can_hold_are_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["eval", str(tmp_path), "--needles", "1024", "4096"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "tq-vllm eval: --needles: got [4096], allowed up to 4000 tokens for this model, whose longest sequence has "
        "4096.\n"
    )


def test_a_model_that_only_vllm_can_read_has_no_known_length(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    assert eval_command._max_model_len(str(tmp_path)) is None
