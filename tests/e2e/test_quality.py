"""The quality harness on real vLLM: figures of the default model by preset, and proof that it sees a broken cache."""

from pathlib import Path

import pytest

from tq_vllm.cli.eval import CHUNK
from tq_vllm.quality.gate import RefusedError
from tq_vllm.quality.process import WORKER, engine_arguments, run_engine
from tq_vllm.quality.rows import cells, figures
from tq_vllm.quality.tasks import SIZES, longest_sequence
from tq_vllm.quality.text import DOCUMENTED_SHA256, text_sha256

pytestmark = pytest.mark.engine

SIZE = SIZES["ci"]
TOP = 1000
# Largest mean KL to the uncompressed cache, nats: measured by this test (-s prints it) and a fifth.
BOUNDS = {
    "turboquant:k8v8": 0.0001,
    "turboquant:k4v4-r128": 0.0021,
    "turboquant": 0.0121,
}
BYTES_PER_TOKEN = {"auto": 46_080, "turboquant:k8v8": 11_880, "turboquant": 6_120}  # README


@pytest.fixture(scope="module")
def measure(model, tmp_path_factory):
    """A function that runs one engine over `size` and returns its result."""
    options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 192 << 20}
    options["max_model_len"] = longest_sequence(SIZE)

    def run(dtype: str, size=SIZE, worker=WORKER):
        arguments = engine_arguments(dtype, CHUNK, size, options)
        return run_engine(model, arguments, size, TOP, tmp_path_factory.mktemp("quality"), worker)

    return run


@pytest.fixture(scope="module")
def reference(measure):
    return measure("auto")


@pytest.fixture(scope="module")
def rows(measure, reference):
    """Figures by preset; tasks beside text for the default preset only."""
    sizes = dict.fromkeys(BOUNDS, SIZE.text_only()) | {"turboquant": SIZE}
    found = {dtype: figures(measure(dtype, size), reference) for dtype, size in sizes.items()}
    for dtype, row in {"auto": figures(reference, reference), **found}.items():
        print(*cells({"cache": dtype, "status": "ok"} | row))
    return found


@pytest.mark.skipif(text_sha256() != DOCUMENTED_SHA256, reason="the bounds are for the text of CPython 3.11.7")
@pytest.mark.parametrize("dtype", BOUNDS)
def test_kl_of_a_preset_is_within_its_bound(rows, dtype):
    assert 0 < rows[dtype]["kl_mean"] <= BOUNDS[dtype]


def test_more_bits_are_closer_to_the_uncompressed_cache(rows):
    kl = [rows[dtype]["kl_mean"] for dtype in BOUNDS]
    assert kl == sorted(kl)
    top1 = [rows[dtype]["top1"] for dtype in BOUNDS]
    assert top1 == sorted(top1, reverse=True)


def test_bytes_are_those_that_the_engine_allocates(rows, reference):
    found = {dtype: row["bytes_per_token"] for dtype, row in rows.items()} | {
        "auto": reference.report["bytes_per_token"]
    }
    assert {dtype: found[dtype] for dtype in BYTES_PER_TOKEN} == BYTES_PER_TOKEN


def test_default_preset_finds_what_the_uncompressed_cache_finds(rows, reference):
    plain, ours = figures(reference, reference), rows["turboquant"]
    assert all(plain["needles"].values()) and ours["needles"] == plain["needles"]
    assert ours["lookup_accuracy"] == plain["lookup_accuracy"] == 1
    assert ours["copy_accuracy"] > plain["copy_accuracy"] - 0.1


def test_a_wrong_block_makes_kl_jump(measure, reference, rows):
    worker = (str(Path(__file__).parent / "faulty_worker.py"),)
    broken = figures(measure("turboquant", SIZE.text_only(), worker), reference)
    print("wrong block:", *cells({"cache": "turboquant", "status": "ok"} | broken))
    assert broken["kl_mean"] > 3 * BOUNDS["turboquant"]
    assert broken["kl_mean"] > 3 * rows["turboquant"]["kl_mean"]


def test_a_format_that_the_attention_class_does_not_know_is_refused(measure):
    """vLLM's own turboquant_* start on a CPU without an error and generate garbage."""
    with pytest.raises(RefusedError, match="CPUAttentionBackendImpl takes a turboquant_4bit_nc cache"):
        measure("turboquant_4bit_nc", SIZE.text_only())
