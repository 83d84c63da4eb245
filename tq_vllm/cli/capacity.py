"""`tq-vllm capacity MODEL`: bytes per token, tokens and sequences of every format, from config.json alone."""

import argparse
import json
import re
from dataclasses import asdict

from tq_vllm.cli.config_file import read_config
from tq_vllm.cli.gpu_memory import (
    GPU_MEMORY_UTILIZATION,
    GPUS,
    default_batched_tokens,
    gpu_memory,
    kv_cache_memory,
    weight_bytes,
)
from tq_vllm.cli.kv_blocks import BATCHES_IN_FLIGHT, DEFAULT_BLOCK_SIZE, plan_blocks
from tq_vllm.cli.model_config import ModelShape, model_shape
from tq_vllm.cli.table import print_table
from tq_vllm.config import PRESETS
from tq_vllm.format import SEGMENT_TOKENS, TILE_TOKENS, TurboQuantPage, head_dims_of, recent_block_size

DEFAULT_MEMORY = "16GiB"
BYTES_OF_UNIT = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of "16GiB", "40GB" or a plain number of bytes.

    Raises:
        ValueError: anything else, or nothing above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = match and BYTES_OF_UNIT.get(match[2].upper())
    if not unit or not (size := int(float(match[1]) * unit)):
        raise ValueError(f"--memory {text!r}: allowed a positive number with KiB, MiB, GiB, TiB, MB or GB, as 16GiB.")
    return size


def capacity_report(
    config: dict,
    memory_bytes: int,
    device: str = "cuda",
    block_size: int | None = None,
    max_model_len: int | None = None,
    tensor_parallel_size: int = 1,
    max_num_batched_tokens: int = 8192,
) -> dict:
    """What vLLM will report for every format in `memory_bytes` of KV-cache memory on each GPU.

    Args:
        config: the parsed config.json.
        device: "cuda" or "cpu": decides the block size where `block_size` is None, and the batches in flight.
        max_model_len: as of --max-model-len; None for the model's own.

    Returns:
        A dict that JSON can hold: the model's shape, `exact` and `notes`, and `formats`, one dict for each of bf16, fp8
        and the presets: `bytes_per_token` (one GPU, all layers), `num_blocks`, `num_tokens`, `max_concurrency` as vLLM
        prints them, and `ratio_to_bf16`.

    Raises:
        ValueError: a model, head size or setting that TurboQuant or vLLM refuses.
    """
    shape = model_shape(config)
    if max_model_len is not None and max_model_len < 1:
        raise ValueError(f"--max-model-len {max_model_len}: allowed a positive number of tokens.")
    if block_size is not None and (block_size < 1 or block_size % TILE_TOKENS):
        raise ValueError(f"--block-size {block_size}: allowed multiples of {TILE_TOKENS}.")
    max_model_len = max_model_len or shape.max_model_len
    num_kv_heads = shape.kv_heads_per_rank(tensor_parallel_size)
    num_layers = shape.num_full_layers + shape.num_sliding_layers
    in_flight = BATCHES_IN_FLIGHT[device] * max_num_batched_tokens

    # At a head size without trellis presets the others are listed; at one without any, the first says so.
    stored = {n: p for n, p in PRESETS.items() if not p.trellis or shape.head_dim in head_dims_of(p)}
    slot_bytes = {"bf16": 4 * shape.head_dim, "fp8": 2 * shape.head_dim}
    slot_bytes |= {name: TurboQuantPage(preset, shape.head_dim).slot_bytes for name, preset in stored.items()}
    formats = []
    for name, slot in slot_bytes.items():
        preset = stored.get(name)
        size = block_size or DEFAULT_BLOCK_SIZE[device]["turboquant" if preset else "stock"]
        recent = (0, 0)
        if preset and preset.recent_tokens:
            recent = preset.recent_tokens, recent_block_size(TurboQuantPage(preset, shape.head_dim), size)
            if not recent[1]:  # refused, in blocks of that size
                continue
        blocks = plan_blocks(shape, num_kv_heads * slot, size, memory_bytes, max_model_len, in_flight, *recent)
        formats.append(
            {
                "name": name,
                "bytes_per_token_and_head": slot,
                "bytes_per_token": num_layers * num_kv_heads * slot,
                "ratio_to_bf16": slot_bytes["bf16"] / slot,
                **asdict(blocks),
            }
        )
    segments = -(-max_model_len // SEGMENT_TOKENS) if shape.centred_by else 0
    return {
        **asdict(shape),
        "tensor_parallel_size": tensor_parallel_size,
        "num_kv_heads_per_gpu": num_kv_heads,
        "max_model_len_used": max_model_len,
        "device": device,
        "memory_bytes": memory_bytes,
        "key_offset_bytes": segments * num_kv_heads * shape.head_dim * 2 * num_layers,
        "exact": shape.num_recurrent_layers == 0,
        "notes": _notes(shape, in_flight),
        "formats": formats,
    }


def _notes(shape: ModelShape, max_in_flight_tokens: int) -> list[str]:
    notes = []
    if shape.num_sliding_layers:
        notes.append(
            f"{shape.num_sliding_layers} sliding-window layers hold at most the last {shape.sliding_window} tokens of "
            f"a sequence and {max_in_flight_tokens} in flight; bytes per token count every layer, tokens and sequences "
            "follow vLLM's block tables."
        )
    if shape.image_prefix:
        notes.append(
            "Tokens of an image attend both ways in this model, which a TurboQuant cache refuses: serve text "
            "only, with --language-model-only."
        )
    if shape.num_shared_layers:
        notes.append(f"{shape.num_shared_layers} layers read another layer's cache and take no memory.")
    if shape.num_recurrent_layers:
        notes.append(
            f"Approximate, too high: {shape.num_recurrent_layers} recurrent layers keep a fixed state for every "
            "sequence in the same pool, and vLLM enlarges the blocks to fit it; only attention layers are counted here."
        )
    if any(preset.recent_tokens for preset in PRESETS.values()):
        notes.append(
            "Presets with -r keep the newest tokens in 8 bits too. Bytes per token leave that out; tokens and "
            f"sequences count it as vLLM does, with {max_in_flight_tokens:,} tokens in flight in each sequence."
        )
    return notes


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "capacity",
        help="tokens and sequences that fit, per preset",
        description="Tokens and concurrent sequences that fit in a KV cache, per preset, beside bf16 and fp8. Reads "
        "only the model's config.json, downloads nothing, and needs no GPU.",
    )
    parser.add_argument("model", help="directory with a config.json, such a file, or a model of the Hugging Face cache")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--memory", help=f"KV-cache memory of one GPU, as 16GiB or 40GB (default {DEFAULT_MEMORY})")
    where.add_argument("--gpu", help=f"estimate that memory for a GPU: {', '.join(GPUS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: what this machine has; cuda with --gpu")
    parser.add_argument("--block-size", type=int, help="tokens a block (default: vLLM's for the device and format)")
    parser.add_argument("--max-model-len", type=int, help="longest sequence (default: the model's)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the heads (default 1)")
    parser.add_argument("--max-num-batched-tokens", type=int, help="matters for sliding-window models only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    config, path = read_config(arguments.model)
    device = "cuda" if arguments.gpu else arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "device": device,
        "block_size": arguments.block_size,
        "max_model_len": arguments.max_model_len,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
    }
    if settings["max_num_batched_tokens"] is None:
        settings["max_num_batched_tokens"] = default_batched_tokens(device, arguments.gpu)
    if arguments.gpu:
        report = _estimated_report(config, arguments.gpu, settings)
    else:
        report = capacity_report(config, parse_memory(arguments.memory or DEFAULT_MEMORY), **settings)
    report = {"model": arguments.model, "config": str(path), **report}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def _estimated_report(config: dict, gpu: str, settings: dict) -> dict:
    """The report for a GPU whose memory has to hold the weights and the key offsets too: an estimate."""
    offsets = capacity_report(config, 1, **settings)["key_offset_bytes"]  # first: unsupported models end here
    weights = weight_bytes(config) // settings["tensor_parallel_size"]
    report = capacity_report(config, kv_cache_memory(gpu, weights, offsets), **settings)
    taken = f"{_size(weights)} of bf16 weights" + (f" - {_size(offsets)} of key offsets" if offsets else "")
    note = (
        f"Estimate: {gpu_memory(gpu) / 1e9:.0f} GB x {GPU_MEMORY_UTILIZATION} - {taken}; vLLM also subtracts "
        "activations and CUDA graphs, and prints at startup what it really has."
    )
    return {**report, "gpu": gpu, "weight_bytes": weights, "exact": False, "notes": [note, *report["notes"]]}


def _print(report: dict) -> None:
    layers = f"{report['num_full_layers'] + report['num_sliding_layers']} attention layers"
    if report["num_sliding_layers"]:
        layers += f" ({report['num_sliding_layers']} with a window of {report['sliding_window']})"
    heads = f"{report['num_kv_heads_per_gpu']} KV heads of {report['head_dim']}"
    if report["tensor_parallel_size"] > 1:
        heads += f", one of {report['tensor_parallel_size']} GPUs"
    memory = f"{_size(report['memory_bytes'])} of KV cache ({report['device']})"
    rows = [
        [row["name"], f"{row['bytes_per_token']:,}", f"{row['ratio_to_bf16']:.2f}", f"{row['num_tokens']:,}"]
        + [f"{row['max_concurrency']:.2f}", row["block_size"], f"{row['num_blocks']:,}"]
        for row in report["formats"]
    ]
    notes = list(report["notes"])
    if report["key_offset_bytes"]:
        where = "subtracted above" if "gpu" in report else "beside the KV-cache memory"
        notes.append(f"Key offsets: {_size(report['key_offset_bytes'])}, {where}.")
    if too_small := [f"{row['name']} {row['longest_sequence']:,}" for row in report["formats"] if not row["fits"]]:
        notes.append(
            f"A sequence of {report['max_model_len_used']:,} tokens does not fit, and vLLM will not start, with these; "
            f"the longest --max-model-len that does: {', '.join(too_small)}."
        )
    if report["exact"]:
        notes.append(f"vLLM reports these tokens with --kv-cache-memory-bytes {report['memory_bytes']}.")
    sequences = f"sequences of {report['max_model_len_used']:,}"
    columns = ["format", "bytes/token", "x bf16", "tokens", sequences, "block", "blocks"]
    print_table(f"{report['model']}: {layers}, {heads}; {memory}", columns, rows, notes)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"
