"""Rows and the gate on what engines said, without an engine."""

import json

import numpy as np
import pytest

from tq_vllm.cli.__main__ import main
from tq_vllm.quality.gate import RefusedError, check_attention
from tq_vllm.quality.metrics import Distributions
from tq_vllm.quality.process import EngineFailedError, Result, engine_arguments, load_result
from tq_vllm.quality.rows import COLUMNS, cells, make_row, needle_grid
from tq_vllm.quality.tasks import SIZES


def layer(impl="tq_vllm.plugin.impl.TurboQuantImpl", dtype="turboquant", known=True):
    return {"name": "0", "impl": impl, "kv_cache_dtype": dtype, "known": known}


CPU = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"


def test_gate_names_the_class_that_attends():
    assert check_attention("turboquant", [layer(), layer()]) == "TurboQuantImpl on 2 of 2 layers"
    mixed = [layer(CPU, "fp8"), layer(CPU, "auto")]
    assert check_attention("fp8", mixed) == "CPUAttentionBackendImpl on 1 of 2 layers"
    assert check_attention("auto", [layer(CPU, "bfloat16", known=False)]) == "CPUAttentionBackendImpl on 1 of 1 layers"


@pytest.mark.parametrize(
    "dtype, layers, reason",
    [
        ("turboquant", [layer(CPU, "auto")], "no layer has a turboquant cache: got auto"),
        ("turboquant", [layer(CPU)], "attends to the turboquant cache"),
        ("fp8", [layer(dtype="fp8")], "attends to the fp8 cache"),
        ("turboquant_4bit_nc", [layer(CPU, "turboquant_4bit_nc", known=False)], "does not know the format"),
    ],
)
def test_gate_refuses(dtype, layers, reason):
    with pytest.raises(RefusedError, match=reason):
        check_attention(dtype, layers)


def result(off: float, ranks: list[int], continuation: list[int]) -> Result:
    logprobs = np.log(np.array([[0.6 - off, 0.3, 0.1 + off]] * 4, np.float32))
    ids = np.array([[0, 1, 2]] * 4, np.int32)
    answers = [
        {"kind": "needle", "name": "100 @ 0", "ranks": [1, 1], "logprobs": [-0.1, -0.1]},
        {"kind": "needle", "name": "100 @ 1", "ranks": ranks, "logprobs": [-1.0, -3.0]},
        {"kind": "copy", "name": "0", "ranks": ranks, "logprobs": [-1.0, -3.0]},
    ]
    report = {"bytes_per_token": 6120.0, "dtype": "float32", "attention": "x", "kv_tokens": 9, "seconds": 1.0}
    report |= {"vocab_size": 3, "answers": answers, "continuations": [continuation]}
    return Result(Distributions(ids, logprobs, ids[:, 1], logprobs[:, 1]), report)


def test_row_of_a_run_against_its_reference():
    reference = result(0.0, [1, 1], [5, 6, 7, 8])
    row, _ = make_row("turboquant", lambda: result(0.1, [1, 4], [5, 6, 9, 8]), reference)
    assert row["status"] == "ok" and row["perplexity"] == pytest.approx(1 / 0.3)
    assert row["kl_mean"] == pytest.approx(0.6 * np.log(0.6 / 0.5) + 0.1 * np.log(0.1 / 0.2))
    assert row["divergence"] == [2] and row["copy_accuracy"] == 0.5 and row["copy_nats"] == 2
    assert needle_grid(row) == "100 +."
    shown = dict(zip(COLUMNS, cells(row), strict=True))
    assert shown["bytes/token"] == "6,120" and shown["needles"] == "1/2" and shown["greedy"] == "2"
    assert shown["look-up %"] == "-"
    assert cells(make_row("auto", lambda: reference, None)[0])[6] == "all"


@pytest.mark.parametrize("error, status", [(RefusedError, "refused"), (EngineFailedError, "failed")])
def test_row_without_figures_has_the_reason(error, status):
    def run():
        raise error("why")

    row, found = make_row("fp8", run, None)
    assert found is None and row == {"cache": "fp8", "status": status, "reason": "why"}
    assert cells(row) == ["fp8", *["-"] * (len(COLUMNS) - 1)]


def test_a_worker_s_refusal_is_read_from_its_result(tmp_path):
    np.savez(tmp_path / "r.npz", report=json.dumps({"refused": "why"}))
    with pytest.raises(RefusedError, match="why"):
        load_result(tmp_path / "r.npz")


def test_every_request_reads_a_chunk_a_step():
    arguments = engine_arguments("fp8", 16, SIZES["ci"], {"dtype": "float32"})
    assert arguments["long_prefill_token_threshold"] == 16
    assert arguments["max_num_batched_tokens"] == 16 * arguments["max_num_seqs"]
    assert arguments["kv_cache_dtype"] == "fp8" and arguments["dtype"] == "float32"


def test_bad_size_is_refused_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--size", "huge"])
    assert stop.value.code == 2
    assert "huge" in capsys.readouterr().err
