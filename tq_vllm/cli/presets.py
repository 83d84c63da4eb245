"""`tq-vllm presets`: what each `--kv-cache-dtype` of the turboquant family stores."""

import argparse
import json

from tq_vllm.cli.table import print_table
from tq_vllm.config import PRESETS, TRELLIS, TurboQuantConfig
from tq_vllm.format import TurboQuantPage

HEAD_DIMS = (64, 128)
PURPOSE = {
    (4, 4): "default",
    (8, 8): "near-lossless",
    (8, 4): "keys near-lossless",
    (5, 4): "one more bit for keys",
    (4, 3): "values cut first",
    (3, 3): "long contexts",
    (3, 2): "2.5 bits",
    (2, 2): "experiments",
    (TRELLIS + 3, TRELLIS + 3): "3 bits, trellis-coded",
    (TRELLIS + 2, TRELLIS + 2): "2 bits, trellis-coded",
}
PROD_PURPOSE = "the paper's QJL keys, for reproduction"


def preset_row(config: TurboQuantConfig) -> dict:
    """One preset: widths, bytes of one token and KV head (scales included), bits a coordinate, ratio to bf16."""
    slot_bytes = {head_dim: TurboQuantPage(config, head_dim).slot_bytes for head_dim in HEAD_DIMS}
    return {
        "name": config.name,
        "key_bits": config.key_bits,
        "key_label": config.key_label,
        "value_bits": config.value_bits,
        "bytes_per_token_and_head": {str(d): n for d, n in slot_bytes.items()},
        "bits_per_coordinate": {str(d): 8 * n / (2 * d) for d, n in slot_bytes.items()},
        "ratio_to_bf16": {str(d): 4 * d / n for d, n in slot_bytes.items()},
        "recent_tokens": config.recent_tokens,
        "purpose": _purpose(config),
    }


def _purpose(config: TurboQuantConfig) -> str:
    if config.key_sketch:
        return PROD_PURPOSE
    if config.recent_tokens:
        return f"the newest {config.recent_tokens} tokens of a sequence in 8 bits too"
    return PURPOSE[config.key_width, config.value_width]


def add_parser(commands) -> None:
    parser = commands.add_parser("presets", help="list the TurboQuant presets", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    rows = [preset_row(config) for config in PRESETS.values()]
    if arguments.json:
        print(json.dumps({"presets": rows}, indent=2))
        return 0
    columns = [
        "preset",
        "K/V bits",
        *(f"{what} d={d}" for d in HEAD_DIMS for what in ("bytes", "bits", "x bf16")),
        "for",
    ]
    print_table(
        "TurboQuant presets (--kv-cache-dtype), by head size d",
        columns,
        [[row["name"], f"{row['key_label']}/{row['value_bits']}", *_numbers(row), row["purpose"]] for row in rows],
        ["bytes: one token of one KV head, keys and values, scales included. bits: the same, a coordinate."],
    )
    return 0


def _numbers(row: dict) -> list[str]:
    cells = []
    for d in map(str, HEAD_DIMS):
        cells += [
            str(row["bytes_per_token_and_head"][d]),
            f"{row['bits_per_coordinate'][d]:.3f}",
            f"{row['ratio_to_bf16'][d]:.2f}",
        ]
    return cells
