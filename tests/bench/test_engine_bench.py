"""The engine benchmarks without an engine: arguments, parsing of vLLM's outputs, the gate, ratios, failing rivals."""

import argparse
import json
import sys

import latency
import pytest
import serve
import throughput
from engine_bench import options, process, rows
from engine_bench.gate import GateRefusedError, check_answer, check_attention, check_logprobs
from engine_bench.process import EngineProcess, RowFailedError, kv_tokens
from engine_bench.shapes import SHAPES, write_shape
from engine_bench.workloads import WORKLOADS

from tq_vllm.cli.engine_log import log_error

REPORT = {"dtype": "bfloat16", "max_model_len": 8704, "max_num_batched_tokens": 8192}
THROUGHPUT_LOG = """\
(EngineCore pid=1) INFO 11-24 04:56:33 [kv_cache_utils.py:2328] GPU KV cache size: 131,072 tokens, Maximum concurrency
Throughput: 2.50 requests/s, 1000.00 total tokens/s, 200.00 output tokens/s
Total num prompt tokens:  3200
Total num output tokens:  800
"""


@pytest.fixture
def make_setup(tmp_path, monkeypatch):
    """Setup of a command line, on a device of choice."""

    def make(*words, device="cuda"):
        parser = argparse.ArgumentParser()
        options.add_options(parser)
        monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
        return options.Setup(parser.parse_args(["--shape", "llama-tiny", "--out", str(tmp_path / "out"), *words]))

    return make


def value(flags: list[str], name: str) -> str:
    """The value that argparse would take: the last one."""
    return flags[len(flags) - 1 - flags[::-1].index(name) + 1]


def layer(impl="TurboQuantImpl", module="tq_vllm.plugin.impl", dtype="turboquant", name="0"):
    return {"name": name, "module": module, "impl": impl, "kv_cache_dtype": dtype}


STOCK = {"impl": "FlashAttentionImpl", "module": "vllm.v1.attention.backends.flash_attn"}


def test_dtypes_by_device(make_setup):
    expected = ["auto", "fp8", "int4_per_token_head", "turboquant_4bit_nc", "turboquant"]
    assert make_setup().dtypes == expected
    assert make_setup(device="cpu").dtypes == ["auto", "fp8", "turboquant"]
    assert make_setup("--dtypes", "auto,turboquant:k3v3").dtypes == ["auto", "turboquant:k3v3"]


def test_every_dtype_gets_the_same_memory_requests_and_seed(make_setup, tmp_path):
    setup = make_setup("--workload", "main", "--seed", "7")
    commands = [throughput.bench_command(setup, "throughput", d, [], tmp_path / "r.json") for d in setup.dtypes]
    assert {value(c, "--kv-cache-memory-bytes") for c in commands} == {str(16 << 30)}
    assert {value(c, "--seed") for c in commands} == {"7"}
    for command, dtype in zip(commands, setup.dtypes, strict=True):
        assert value(command, "--kv-cache-dtype") == dtype
        assert "dummy" in command and "--no-enable-prefix-caching" in command
        command[command.index(dtype)] = "-"
    assert all(command == commands[0] for command in commands)


def test_flags_after_the_dashes_come_last_and_unchanged(make_setup, tmp_path):
    setup = make_setup("--workload", "main")
    command = throughput.bench_command(setup, "throughput", "auto", ["--num-prompts", "3"], tmp_path / "r.json")
    assert value(command, "--num-prompts") == "3" and command.count("--num-prompts") == 2
    assert options.split_flags(["--seed", "1", "--", "-x", "--", "-y"]) == (["--seed", "1"], ["-x"], ["-y"])


@pytest.mark.parametrize("flag", ["--kv-cache-dtype=fp8", "--model", "--async_engine", "--seed"])
def test_flags_that_the_gate_cannot_allow_are_refused(flag):
    with pytest.raises(ValueError, match="after --"):
        options.check_vllm_flags(["--enforce-eager", flag])


def test_capture_sizes_are_for_the_slow_rivals_only_and_said(make_setup):
    setup = make_setup("--capture-sizes", "1,2,4")
    for dtype in setup.dtypes:
        slow = dtype in ("int4_per_token_head", "turboquant_4bit_nc")
        flags = setup.engine_flags(dtype)
        assert ("--cudagraph-capture-sizes" in flags) == slow == ("1,2,4" in setup.capture_note(dtype))
        if slow:
            start = flags.index("--cudagraph-capture-sizes")
            assert flags[start + 1 : start + 4] == ["1", "2", "4"]
    assert not make_setup().capture_note("turboquant_4bit_nc")


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_fit_and_become_commands(name, make_setup, tmp_path):
    workload, setup = WORKLOADS[name], make_setup("--workload", name)
    sequence = workload.prefix_len + workload.input_len + workload.output_len
    assert sequence <= workload.max_model_len <= SHAPES["llama-3.1-8b"]["max_position_embeddings"]
    bf16_bytes = 32 * 8 * 128 * 2 * 2
    assert (workload.batch or 1) * sequence * bf16_bytes < workload.kv_cache_memory_bytes
    client = serve.client_command(setup, 1, workload.batch, [], tmp_path / "r.json")
    assert value(client, "--random-input-len") == str(workload.input_len)
    assert ("--max-concurrency" in client) == (workload.batch is not None)
    caching = "--enable-prefix-caching" in serve.server_command(setup, "auto", 1, [])
    assert caching == bool(workload.prefix_len)
    if workload.prefix_len:
        with pytest.raises(ValueError, match="bench/serve.py"):
            workload.offline_flags()
    else:
        length = "--random-input-len" if workload.batch is None else "--input-len"
        assert value(workload.offline_flags(), length) == str(workload.input_len)


def test_shape_has_a_tokenizer_of_one_word_a_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = write_shape("llama-tiny", tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = [7, 16000, 3, 3, 9999]
    assert tokenizer.encode(tokenizer.decode(ids)).ids == ids
    assert tokenizer.get_vocab_size() == json.loads((path / "config.json").read_text())["vocab_size"]
    with pytest.raises(ValueError, match="llama-3.1-8b"):
        write_shape("gpt", tmp_path)


def test_gate_accepts_each_dtype_with_its_own_class():
    assert check_attention("turboquant", [layer(), layer()]) == "TurboQuantImpl on 2 of 2 layers"
    assert "FlashAttentionImpl" in check_attention("auto", [layer(**STOCK, dtype="auto")])
    mixed = [layer(**STOCK, dtype="turboquant_4bit_nc"), layer(**STOCK, dtype="auto")]
    assert "1 of 2 layers" in check_attention("turboquant_4bit_nc", mixed)


@pytest.mark.parametrize(
    "dtype, layers",
    [
        ("turboquant", [layer(**STOCK)]),
        ("turboquant", [layer(), layer(**STOCK)]),
        ("turboquant", [layer(**STOCK, dtype="auto")]),
        ("turboquant", [layer(dtype="turboquant:k3v3")]),
        ("turboquant", []),
        ("fp8", [layer(dtype="fp8")]),
        ("fp8", [layer(**STOCK, dtype="auto")]),
        ("auto", [layer()]),
        ("turboquant_4bit_nc", [layer(dtype="turboquant_4bit_nc")]),
    ],
)
def test_gate_refuses_another_class_or_cache(dtype, layers):
    with pytest.raises(GateRefusedError):
        check_attention(dtype, layers)


def test_gate_refuses_wrong_answers():
    assert check_answer(" The capital is Paris. ") == "The capital is Paris."
    with pytest.raises(GateRefusedError, match="Paris"):
        check_answer("The the the")
    assert "2 finite" in check_logprobs([-1.0, 0.0])
    for wrong in ([], [float("nan")], [-1.0, float("-inf")], [None], [0.5]):
        with pytest.raises(GateRefusedError):
            check_logprobs(wrong)


def test_throughput_figures():
    result = {"elapsed_time": 4.0, "num_requests": 10, "tokens_per_second": 1000.0}
    figures = rows.throughput_figures(THROUGHPUT_LOG, result, {"prefill_seconds": 1.5})
    assert figures["output_tokens_per_s"] == 200 and figures["decode_tokens_per_s"] == 790 / 2.5
    assert "decode_tokens_per_s" not in rows.throughput_figures(THROUGHPUT_LOG, result, {})
    assert kv_tokens(THROUGHPUT_LOG) == 131072
    with pytest.raises(ValueError, match="not known"):
        rows.throughput_figures("Killed", result, {})


def test_latency_figures():
    report = {"output_lens": [11, 11], "prefill_seconds": 1.0}
    figures = rows.latency_figures({"latencies": [9.0, 2.0, 1.9]}, report)
    assert figures["tpot_ms"] == pytest.approx(100) and figures["ttft_ms"] == 1000
    assert figures["output_tokens_per_s"] == 11
    prefill = rows.latency_figures({"latencies": [0.5]}, {"output_lens": [1]})
    assert prefill["ttft_ms"] == 500 and "tpot_ms" not in prefill


def test_serve_figures():
    result = {"failed": 0, "completed": 4, "num_prompts": 4, "max_concurrency": 2, "output_throughput": 10.0}
    result |= {"total_token_throughput": 50.0}
    result |= {f"p{p}_{m}_ms": float(p) for p in (50, 90, 99) for m in ("ttft", "tpot")}
    figures = rows.serve_figures(result)
    assert figures["ttft_p99_ms"] == 99 and figures["tpot_p50_ms"] == 50 and figures["concurrency"] == 2
    with pytest.raises(ValueError, match="1 of 4"):
        rows.serve_figures(result | {"failed": 1})


def test_prediction_is_that_of_capacity(tmp_path):
    model = str(write_shape("llama-3.1-8b", tmp_path))
    predicted = {d: rows.predicted_tokens(model, d, 16 << 30, "cuda", REPORT) for d in ("auto", "fp8", "turboquant")}
    assert predicted["auto"] == 131072 and predicted["fp8"] == 262144
    assert predicted["turboquant"] == pytest.approx(131072 * 512 / 132, abs=128)
    assert rows.predicted_tokens(model, "turboquant_4bit_nc", 16 << 30, "cuda", REPORT) is None
    assert rows.predicted_tokens(model, "auto", 16 << 30, "cuda", REPORT | {"dtype": "float32"}) is None


def test_ratios_are_of_the_same_concurrency():
    made = [
        {"dtype": dtype, "concurrency": n, "status": "ok", "note": "", "f": n * rate}
        for dtype, rate in (("auto", 10.0), ("fp8", 20.0), ("turboquant", 30.0))
        for n in (1, 4)
    ]
    made.append({"dtype": "rival", "status": "failed", "reason": "no such dtype", "note": "batches of 1 only"})
    rows.add_ratios(made, ["f"])
    assert all(r["ratios"]["f"] == {"auto": 3.0, "fp8": 1.5} for r in made if r["dtype"] == "turboquant")
    header, cells, notes = rows.table(made, [rows.Column("F", "f", ".1f", compared=True)])
    assert header[:4] == ["cache", "F", "x auto", "x fp8"] and cells[-1][1:4] == ["-", "-", "-"]
    assert notes == ["rival failed: no such dtype", "rival: batches of 1 only."]


FAKE_VLLM = """
import json, sys
settings = json.load(open(sys.argv[1]))
words = sys.argv[2:]
dtype = words[words.index("--kv-cache-dtype") + 1]
if dtype == "fp8":
    sys.exit("ValueError: fp8 is not for this machine")
report = {"refused": "TorchSDPA attends"} if dtype == "turboquant" else REPORT
json.dump(report, open(settings["report"], "w"))
if "refused" in report:
    sys.exit("engine_bench.gate.GateRefusedError: TorchSDPA attends")
json.dump({"elapsed_time": 4.0, "num_requests": 10, "tokens_per_second": 1000.0},
          open(words[words.index("--output-json") + 1], "w"))
print(LOG)
"""


def test_refused_and_failed_dtypes_are_rows_with_a_reason(tmp_path, monkeypatch, capsys):
    package = tmp_path / "engine_bench"
    package.mkdir()
    report = REPORT | {"attention": "CPUImpl on 2 of 2 layers", "prefill_seconds": 1.0}
    (package / "__init__.py").write_text("")
    (package / "offline.py").write_text(f"REPORT = {report!r}\nLOG = {THROUGHPUT_LOG!r}\n{FAKE_VLLM}")
    monkeypatch.setattr(process, "BENCH_DIRECTORY", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "out"
    assert throughput.main(["--shape", "llama-tiny", "--out", str(out), "--workload", "main"]) == 1
    made = {row["dtype"]: row for row in json.loads((out / "throughput-main.json").read_text())["rows"]}
    assert made["auto"]["status"] == "ok" and made["auto"]["kv_tokens"] == 131072
    assert made["fp8"]["status"] == "failed" and "not for this machine" in made["fp8"]["reason"]
    assert made["turboquant"]["status"] == "refused" and "TorchSDPA attends" in made["turboquant"]["reason"]
    assert "output_tokens_per_s" not in made["turboquant"]
    assert made["turboquant"]["command"].startswith("vllm bench throughput --model ")
    assert "refused: TorchSDPA attends" in capsys.readouterr().out


def test_a_process_past_its_time_is_ended(tmp_path):
    sleep = [sys.executable, "-c", "import time; print('capturing', flush=True); time.sleep(60)"]
    with EngineProcess("sleeper", sleep, tmp_path / "log", 0.5, {}) as hung, pytest.raises(RowFailedError, match="0 s"):
        hung.wait()
    assert hung.process.poll() is not None


def test_the_cause_is_found_in_a_log():
    log = "ValueError: block too small\nRuntimeError: Engine core initialization failed. See root cause above."
    assert log_error(log, 1) == "block too small"
    log = f"[rank0]: {log}\n[rank0]:[W1] Warning: destroy_process_group() was not called"
    assert log_error(log, 1) == "block too small"
    assert log_error("nothing", 137) == "it left with exit code 137"


def test_latency_table_of_an_engine_that_ran_out_of_time():
    """What it measured stands beside the others; what it did not has no row and no ratio."""
    both = [
        {"workload": "b1-1k", "ttft_ms": 30.0, "tpot_ms": 6.0, "decode_tokens_per_s": 166.7},
        {"workload": "prefill-32k", "ttft_ms": 500.0},
    ]
    ours = [{"workload": "b1-1k", "ttft_ms": 33.0, "tpot_ms": 4.5, "decode_tokens_per_s": 222.2}]
    header, cells = latency.table({"auto": {"rows": both}, "turboquant": {"rows": ours}})
    assert header == ["workload", "cache", "TTFT ms", "x auto", "x fp8", "TPOT ms", "x auto", "x fp8", "decode tok/s"]
    assert cells == [
        ["b1-1k", "auto", "30.0", "1.00", "-", "6.00", "1.00", "-", "167"],
        ["b1-1k", "turboquant", "33.0", "1.10", "-", "4.50", "0.75", "-", "222"],
        ["prefill-32k", "auto", "500.0", "1.00", "-", "-", "-", "-", "-"],
    ]
