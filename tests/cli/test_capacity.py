"""`tq-vllm capacity` on configurations of real checkpoints, against arithmetic done here by hand."""

import json
import subprocess
import sys

import pytest
from configs import DEEPSEEK_V3, GEMMA_3_4B, LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_30B_A3B, QWEN_3_NEXT, SMOLLM2_135M

from tq_vllm.cli.__main__ import main
from tq_vllm.cli.capacity import capacity_report, parse_memory
from tq_vllm.cli.config_file import read_config
from tq_vllm.cli.gpu_memory import GPUS, default_batched_tokens, gpu_memory, weight_bytes
from tq_vllm.cli.model_config import UnsupportedModelError, model_shape
from tq_vllm.config import PRESETS
from tq_vllm.format import TurboQuantPage, UnsupportedHeadDimError, recent_block_size

GIB = 2**30
# Bytes of a token of one KV head: codes of K and V, and two f16 scales (prod: three).
SLOT_BYTES_128 = {"k8v8": 260, "k8v4": 196, "k5v4": 148, "k4v4": 132, "k4v3": 116, "k3v3": 100, "k3v2": 84, "k2v2": 68}
SLOT_BYTES_128 |= {"t3": 100, "t2": 68, "prod": 134, "k4v4-r128": 132, "k3v3-r128": 100}
SLOT_BYTES_64 = {"k8v8": 132, "k8v4": 100, "k5v4": 76, "k4v4": 68, "k4v3": 60, "k3v3": 52, "k3v2": 44, "k2v2": 36}
SLOT_BYTES_64 |= {"t3": 52, "t2": 36, "prod": 70, "k4v4-r128": 68, "k3v3-r128": 52}


def rows(report: dict) -> dict[str, dict]:
    return {row["name"].removeprefix("turboquant:"): row for row in report["formats"]}


def write(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_every_preset_is_a_row_beside_bf16_and_fp8():
    names = [row["name"] for row in capacity_report(LLAMA_3_1_8B, GIB)["formats"]]
    assert names == ["bf16", "fp8", *PRESETS]


@pytest.mark.parametrize(
    ("config", "num_layers", "num_kv_heads", "head_dim", "slot_bytes"),
    [
        (LLAMA_3_1_8B, 32, 8, 128, SLOT_BYTES_128),
        (QWEN_2_5_7B, 28, 4, 128, SLOT_BYTES_128),
        (QWEN_3_30B_A3B, 48, 4, 128, SLOT_BYTES_128),
        (SMOLLM2_135M, 30, 3, 64, SLOT_BYTES_64),
    ],
    ids=["llama", "qwen2", "qwen3-moe", "smollm2"],
)
def test_uniform_models(config, num_layers, num_kv_heads, head_dim, slot_bytes):
    memory, length, block = 16 * GIB, 4096, 64
    report = capacity_report(config, memory, block_size=block, max_model_len=length)
    assert report["exact"] and len(report["notes"]) == 1 and "newest tokens" in report["notes"][0]
    expected = {"bf16": 4 * head_dim, "fp8": 2 * head_dim, "turboquant": slot_bytes["k4v4"], **slot_bytes}
    assert rows(report).keys() == expected.keys()
    for name, slot in expected.items():
        row = rows(report)[name]
        num_blocks = memory // (num_layers * num_kv_heads * slot * block)
        assert row["bytes_per_token"] == num_layers * num_kv_heads * slot
        assert row["num_blocks"] == num_blocks
        sequence = length // block  # 4096 is a whole number of blocks
        if name.endswith("-r128"):
            page = TurboQuantPage(PRESETS[f"turboquant:{name}"], head_dim)
            sequence += -(-length // recent_block_size(page, block)) + 1  # all of it is in flight
        assert row["num_tokens"] == int(num_blocks / sequence * length)
        assert row["max_concurrency"] == pytest.approx(num_blocks / sequence)
        assert row["ratio_to_bf16"] == pytest.approx(4 * head_dim / slot)


def test_tokens_that_vllm_printed_for_llama_in_16_gib():
    report = rows(capacity_report(LLAMA_3_1_8B, 16 * GIB, block_size=16))
    assert [report[name]["num_tokens"] for name in ("bf16", "fp8", "k4v4")] == [131_072, 262_144, 508_400]


def test_block_sizes_are_those_of_the_device():
    sizes = {
        device: [
            rows(capacity_report(LLAMA_3_1_8B, GIB, device))[name]["block_size"] for name in ("bf16", "turboquant")
        ]
        for device in ("cuda", "cpu")
    }
    assert sizes == {"cuda": [16, 64], "cpu": [128, 128]}


def test_a_partly_filled_last_block_is_counted_as_vllm_counts_it():
    row = rows(capacity_report(SMOLLM2_135M, GIB, "cpu", max_model_len=1000))["turboquant"]
    num_blocks = GIB // (30 * 3 * 68 * 128)
    assert row["num_tokens"] == int(num_blocks / 8 * 1000)  # 1000 tokens take 8 blocks of 128


def test_gemma_windows_take_blocks_of_their_own_groups():
    # 5 full and 29 sliding layers: groups of 5 layers, one full and six sliding.
    report = capacity_report(GEMMA_3_4B, 8 * GIB, block_size=64, max_model_len=32768, max_num_batched_tokens=2048)
    assert (report["num_full_layers"], report["num_sliding_layers"], report["sliding_window"]) == (5, 29, 1024)
    assert (report["num_kv_heads"], report["head_dim"], report["exact"]) == (4, 256, True)
    assert "29 sliding-window layers hold at most the last 1024 tokens" in report["notes"][0]
    assert "--language-model-only" in report["notes"][1]
    row = rows(report)["k4v4"]
    slot = 256 // 2 * 2 + 4
    num_blocks = 8 * GIB // (5 * 4 * slot * 64)
    per_sequence = 32768 // 64 + 6 * (-(-(1023 + 2 * 2048) // 64) + 1)
    assert (row["num_blocks"], row["blocks_per_sequence"]) == (num_blocks, per_sequence)
    assert row["num_tokens"] == int(num_blocks / per_sequence * 32768)


def test_tensor_parallel_splits_heads_and_repeats_the_last():
    def heads(tp):
        return capacity_report(QWEN_2_5_7B, GIB, tensor_parallel_size=tp)["num_kv_heads_per_gpu"]

    assert [heads(tp) for tp in (1, 2, 4, 28)] == [4, 2, 1, 1]
    with pytest.raises(ValueError, match="--tensor-parallel-size 3 does not split 28 heads.*allowed 1, 2, 4, 28"):
        heads(3)


def test_key_offsets_are_counted():
    # ceil(1000 / 64) segments, bf16
    for config, heads_and_layers in ((LLAMA_3_1_8B, 4 * 32), (QWEN_2_5_7B, 2 * 28), (QWEN_3_30B_A3B, 2 * 48)):
        settings = {"max_model_len": 1000, "tensor_parallel_size": 2}
        for device in ("cpu", "cuda"):
            report = capacity_report(config, GIB, device=device, **settings)
            assert report["key_offset_bytes"] == 16 * 128 * 2 * heads_and_layers


def test_a_sequence_that_does_not_fit_says_how_long_one_may_be():
    row = rows(capacity_report(LLAMA_3_1_8B, GIB, block_size=64))["bf16"]
    assert not row["fits"]
    assert row["longest_sequence"] == (GIB // (32 * 8 * 512 * 64) - 1) * 64  # one block is vLLM's null block


def test_recurrent_layers_make_the_answer_approximate():
    report = capacity_report(QWEN_3_NEXT, GIB)
    assert (report["num_full_layers"], report["num_recurrent_layers"], report["exact"]) == (12, 36, False)
    assert report["notes"][0].startswith("Approximate, too high: 36 recurrent layers")


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 8192),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 32768),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}, 8192),
    ],
    ids=["plain", "linear", "yarn"],
)
def test_longest_sequence_of_the_model(change, length):
    assert model_shape({**SMOLLM2_135M, **change}).max_model_len == length


def test_model_type_that_transformers_does_not_know_is_read_as_it_stands():
    known, unknown = model_shape(LLAMA_3_1_8B), model_shape({**LLAMA_3_1_8B, "model_type": "new"})
    assert {**vars(unknown), "model_type": "llama"} == vars(known)
    inside = {"model_type": "new_vision", "text_config": {**LLAMA_3_1_8B, "model_type": "new"}}
    assert model_shape(inside) == unknown


def test_gemma_length_is_not_scaled_again():
    assert model_shape(GEMMA_3_4B).max_model_len == 131072


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (DEEPSEEK_V3, "MLA models keep one latent vector a token.*kv_lora_rank 512.*--kv-cache-dtype auto"),
        ({"model_type": "bert"}, "Encoder models.*got bert, allowed decoder-only"),
        ({"model_type": "t5"}, "Encoder models.*got t5"),
        ({"model_type": "bloom"}, "ALiBi.*got bloom"),
        ({"model_type": "mamba"}, "no attention layer"),
        ({**SMOLLM2_135M, "layer_types": ["indexed_attention"] * 30}, "got indexed_attention, allowed full_attention"),
        ({"model_type": "gemma4"}, "unlike shape.*got gemma4"),
        ({**SMOLLM2_135M, "num_hidden_layers": "thirty"}, "transformers refuses this llama config.json"),
        (
            {"model_type": "new", "num_hidden_layers": 2, "num_attention_heads": [4, 8]},
            r"num_attention_heads.*\[4, 8\]",
        ),
    ],
    ids=["mla", "encoder", "encoder-decoder", "alibi", "recurrent", "layer-type", "unlike", "type", "per-layer"],
)
def test_models_that_cannot_be_counted(config, sentence):
    with pytest.raises(UnsupportedModelError, match=sentence):
        capacity_report(config, GIB)


def test_head_size_that_the_format_cannot_hold():
    with pytest.raises(UnsupportedHeadDimError, match="got 72, allowed"):
        capacity_report({**SMOLLM2_135M, "head_dim": 72}, GIB)


def test_memory_sizes():
    sizes = {"16GiB": 16 * GIB, "40GB": 40 * 10**9, "1.5 gib": 3 * 2**29, "12345": 12345, "512MiB": 2**29}
    assert {text: parse_memory(text) for text in sizes} == sizes
    for text in ("0", "-1GiB", "16 apples", "", "GiB", "0.1"):
        with pytest.raises(ValueError, match="--memory .* allowed a positive number"):
            parse_memory(text)


def test_gpu_names():
    assert gpu_memory("h100") == gpu_memory("NVIDIA H100") == 80 * 10**9
    assert gpu_memory("4090") == gpu_memory("RTX 4090") == 24 * 10**9
    assert gpu_memory("a100 40gb") == 40 * 10**9
    assert all(gpu_memory(name) == size * 10**9 for name, size in GPUS.items())
    with pytest.raises(ValueError, match="--gpu 'Voodoo2': allowed B200, H200"):
        gpu_memory("Voodoo2")


def test_batched_tokens_are_those_of_vllm_serve():
    defaults = [default_batched_tokens("cuda", gpu) for gpu in ("B200", "H200", "H100", None, "A100", "L4")]
    assert defaults == [16384, 8192, 8192, 8192, 2048, 2048]
    assert default_batched_tokens("cpu", None) == 2048


def test_weights_are_the_parameters_in_bf16():
    hidden, kv, inner, layers, vocab = 4096, 1024, 14336, 32, 128256
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    assert weight_bytes(LLAMA_3_1_8B) == 2 * (layers * layer + 2 * vocab * hidden + hidden)
    assert weight_bytes(SMOLLM2_135M) == 2 * 134_515_008  # tied embeddings count once
    assert weight_bytes(QWEN_3_30B_A3B) == 2 * 30_532_122_624
    with pytest.raises(UnsupportedModelError, match="give --memory"):
        weight_bytes({**LLAMA_3_1_8B, "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(UnsupportedModelError, match="no model class for model_type 'new'.*give --memory"):
        weight_bytes({**LLAMA_3_1_8B, "model_type": "new"})


def test_estimate_for_a_gpu(tmp_path, capsys):
    assert main(["capacity", write(tmp_path, QWEN_2_5_7B), "--gpu", "H100", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["exact"] and report["notes"][0].startswith("Estimate: 80 GB x 0.92 - 14.19 GiB of bf16 weights")
    offsets = 32768 // 64 * 4 * 128 * 2 * 28
    assert report["memory_bytes"] == int(80e9 * 0.92) - weight_bytes(QWEN_2_5_7B) - offsets
    assert report["device"] == "cuda" and rows(report)["turboquant"]["block_size"] == 64


def test_weights_that_fill_the_gpu(tmp_path, capsys):
    assert main(["capacity", write(tmp_path, QWEN_3_30B_A3B), "--gpu", "L4"]) == 2
    assert "61 GB of bf16 weights leave nothing of 0.92 x 24 GB" in capsys.readouterr().err


def test_json_is_the_report(tmp_path, capsys):
    arguments = ["capacity", write(tmp_path, LLAMA_3_1_8B), "--memory", "16GiB", "--device", "cuda", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("model") == str(tmp_path) and report.pop("config") == str(tmp_path / "config.json")
    assert report == capacity_report(LLAMA_3_1_8B, 16 * GIB)


def test_plain_table(tmp_path, capsys):
    assert main(["capacity", write(tmp_path, LLAMA_3_1_8B), "--block-size", "16", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("32 attention layers, 8 KV heads of 128; 16.00 GiB of KV cache (cuda)")
    assert " ".join(lines[1].split()) == "format bytes/token x bf16 tokens sequences of 131,072 block blocks"
    assert "turboquant:k4v4 33,792 3.88 508,400 3.88 16 31,775" in [" ".join(line.split()) for line in lines]
    assert lines[-1] == f"vLLM reports these tokens with --kv-cache-memory-bytes {16 * GIB}."


def test_plain_text_says_what_vllm_will_refuse(tmp_path, capsys):
    assert main(["capacity", write(tmp_path, LLAMA_3_1_8B), "--memory", "12GiB", "--device", "cuda"]) == 0
    note = capsys.readouterr().out.splitlines()[-2]
    longest = (12 * GIB // (32 * 8 * 512 * 16) - 1) * 16
    assert note.endswith(f"that does: bf16 {longest:,}.")  # fp8 and all presets hold 131,072 tokens


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nobody/nothing"], "No model 'nobody/nothing'"),
        (["{model}", "--block-size", "24"], "--block-size 24: allowed multiples of 16."),
        (["{model}", "--max-model-len", "0"], "--max-model-len 0: allowed a positive number"),
        (["{model}", "--memory", "lots"], "--memory 'lots': allowed"),
        (["{model}", "--gpu", "H100", "--memory", "1GiB"], "not allowed with argument"),
        (["{model}", "--block-size", "many"], "invalid int value: 'many'"),
        ([], "the following arguments are required: model"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = write(tmp_path, SMOLLM2_135M)
    try:
        status = main(["capacity", *(argument.format(model=model) for argument in arguments)])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert sentence in captured.err and captured.err.count("\n") == 1


def test_files_that_are_no_config(tmp_path, capsys):
    for name, text, sentence in (
        ("broken.json", "{", "is not a readable config.json"),
        ("list.json", "[1]", "it has no model_type"),
    ):
        (tmp_path / name).write_text(text)
        assert main(["capacity", str(tmp_path / name)]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["capacity", str(tmp_path / "empty")]) == 2
    assert "is not a readable config.json" in capsys.readouterr().err


def test_model_of_the_hugging_face_cache(tmp_path, monkeypatch):
    repo = tmp_path / "models--meta--llama"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read_config("meta/llama")[0] == LLAMA_3_1_8B


def test_runs_as_a_module_without_vllm_in_the_process(tmp_path):
    program = (
        "import sys; from tq_vllm.cli.__main__ import main; "
        f"status = main(['capacity', {write(tmp_path, SMOLLM2_135M)!r}]); sys.exit(status or 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
