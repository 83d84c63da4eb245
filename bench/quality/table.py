"""Cache formats of vLLM and rival methods in one table, at their real bytes per token.

tq-vllm eval --size small --logs bench-results/quality
python bench/quality/table.py bench-results/quality

The first command runs vLLM once a format and leaves its results in the directory. This one reads them, has the rivals
read the same tokens in transformers (float32, the same steps), and compares all with vLLM's uncompressed run. Rows of
rivals stay in rivals-N-windows.json: delete it to have them measured again.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from layers import BF16_BYTES
from plots import family_of, plot
from rivals import EVICTIONS, RIVALS, Eviction, Rival, presets
from simulate import Reader, first_windows, second_halves
from transformers import AutoTokenizer
from vllm_turboquant import vllm_turboquant

sys.path.append(str(Path(__file__).parents[1]))  # of levers
from levers import Model

from tq_vllm.cli.eval import CHUNK
from tq_vllm.cli.table import print_table
from tq_vllm.plugin.key_mean import first_token
from tq_vllm.quality.gate import RefusedError
from tq_vllm.quality.metrics import Distributions, compare_text
from tq_vllm.quality.process import load_result
from tq_vllm.quality.tasks import Size, build_tasks

COLUMNS = ["cache", "bytes/token", "perplexity", "KL", "KL p99", "top-1 %", "KL late", "top-1 late %"]
NOTE = (
    "late: the second half of each window only. Evicting methods read the first half raw and then keep a part of it; "
    "their bytes are those of that half, later tokens stay 16-bit."
)


def row_of(name: str, bytes_per_token: float, text: Distributions, reference: Distributions, windows: int, vocab: int):
    """Figures of a run over all text."""
    late = compare_text(second_halves(reference, windows), second_halves(text, windows), vocab)
    row = {"cache": name, "family": family_of(name), "bytes_per_token": bytes_per_token}
    return row | compare_text(reference, text, vocab) | {f"{key}_late": value for key, value in late.items()}


def served_rows(directory: Path, reference: Distributions, windows: int, of: int) -> list[dict]:
    """Rows of vLLM's runs, as the evaluation left them, over the first windows `of` all."""
    rows = []
    for path in sorted(directory.glob("*.npz")):
        job = json.loads(path.with_suffix(".json").read_text())["engine"]
        try:
            result = load_result(path)
        except RefusedError as refusal:
            print(f"{job['kv_cache_dtype']} refused: {refusal}")
            continue
        report = result.report
        name, chunk = job["kv_cache_dtype"], job["long_prefill_token_threshold"]
        name += f" ({report['dtype']})" if name == "auto" else ""
        name += "" if chunk == CHUNK else f", steps of {chunk}"
        text = first_windows(result.text, of, windows)
        rows.append(row_of(name, report["bytes_per_token"], text, reference, windows, report["vocab_size"]))
    return rows


@torch.inference_mode()
def preset_rivals(model: Model, tokenizer, num_tokens: int) -> list[Rival]:
    """Presets with the key offsets and key scales that the plugin would give this model."""
    _, keys = model.queries_and_keys(model.pass_ids(tokenizer))
    offsets, bases = model.offsets(keys, first_token(tokenizer), num_tokens), model.scales_by_norms()
    return presets(offsets, None if bases is None else bases[:, 0].diagonal(dim1=-2, dim2=-1))


def rival_rows(
    reader: Reader, rivals: list[Rival | Eviction], reference: Distributions, windows: int, vocab: int, path: Path
) -> list[dict]:
    """Rows of all rivals, simulated, but for those that `path` has from an earlier run; written there one by one."""
    rows = {row["cache"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    slots, context = reader.num_layers * reader.num_kv_heads, reader.ids.shape[1]
    late = second_halves(reference, windows)
    for rival in rivals:
        if rival.name in rows:
            continue
        if isinstance(rival, Eviction):
            found = compare_text(late, reader.read_after_prompt(rival), vocab)
            row = {"cache": rival.name, "family": family_of(rival.name)}
            row["bytes_per_token"] = slots * 2 * BF16_BYTES * reader.head_dim * rival.kept
            row |= {f"{key}_late": value for key, value in found.items()}
        else:
            size = slots * rival.token_bytes(reader.head_dim, context)
            row = row_of(rival.name, size, reader.read(rival), reference, windows, vocab)
        rows[rival.name] = row
        path.write_text(json.dumps(list(rows.values()), indent=2) + "\n")
        print(f"{rival.name}: KL late {row['kl_mean_late']:.5f}", flush=True)
    return list(rows.values())


def cells(row: dict) -> list[str]:
    forms = (("perplexity", "{:.3f}"), ("kl_mean", "{:.5f}"), ("kl_p99", "{:.4f}"), ("top1", "{:.1%}"),
             ("kl_mean_late", "{:.5f}"), ("top1_late", "{:.1%}"))  # fmt: skip
    figures = [form.format(row[key]).rstrip("%") if key in row else "-" for key, form in forms]
    return [row["cache"], f"{row['bytes_per_token']:,.0f}", *figures]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=Path, help="of `tq-vllm eval --logs`; the table's JSON and plots go there too"
    )
    parser.add_argument("--windows", type=int, help="of the text, only so many (default: all)")
    arguments = parser.parse_args(argv)
    directory = arguments.directory
    path = directory / f"auto-steps-of-{CHUNK}.npz"
    if not path.exists():
        parser.error(f"{path} is not there: run `tq-vllm eval --logs {directory}` first.")
    job, result = json.loads(path.with_suffix(".json").read_text()), load_result(path)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    all_windows = build_tasks(tokenizer, Size(**job["size"]).text_only()).windows
    windows = all_windows[: arguments.windows]
    reference = first_windows(result.text, len(all_windows), len(windows))
    model = Model(job["model"])
    rivals = [*preset_rivals(model, tokenizer, len(windows[0])), *RIVALS]
    rivals += [*vllm_turboquant(model.config.num_hidden_layers), *EVICTIONS]
    reader = Reader(model.network, windows, job["engine"]["long_prefill_token_threshold"], job["top"])
    rows = served_rows(directory, reference, len(windows), len(all_windows))
    vocab, path = result.report["vocab_size"], directory / f"rivals-{len(windows)}-windows.json"
    rows += rival_rows(reader, rivals, reference, len(windows), vocab, path)
    rows.sort(key=lambda row: -row["bytes_per_token"])
    (directory / "table.json").write_text(json.dumps({"model": job["model"], "rows": rows}, indent=2) + "\n")
    print_table(f"{Path(job['model']).name}, {len(windows)} windows of {len(windows[0])} tokens", COLUMNS,
                [cells(row) for row in rows], [NOTE])  # fmt: skip
    print(f"JSON: {directory / 'table.json'}. {plot({Path(job['model']).name: rows}, directory / 'table.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
