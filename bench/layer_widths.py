"""Key widths by layer at equal bytes: 5 bits where keys matter most, 3 where least, 4 elsewhere; without vLLM.

    python bench/layer_widths.py [MODEL]    # default: the embedded model; bench/quality/second_model.py has another

Text, steps and the cache are those of bench/levers.py. What a layer's keys matter is guessed
  by the logits     |q|^2 |k|^2 of the fixed pass of startup: the noise that a code puts into attention's logits
  by the pass       KL of the fixed pass with this layer's keys at 4 bits and all else raw
  by the text       the same of the text itself: a bound, no cache knows its text beforehand
"""

import dataclasses
import sys

import torch
from levers import STEP, Layer, Setting
from transformers.cache_utils import DynamicLayer

from tq_vllm.cli.demo_model import demo_model
from tq_vllm.config import get_config
from tq_vllm.core.cache import offset_at

PASS_STEP = 8
PRESET = get_config("turboquant")


def layers_of(setting: Setting, key_bits: list[int | None]) -> list[DynamicLayer]:
    """A cache with these key widths, values at 4 bits; None: keys and values of the layer stay raw."""
    return [
        Layer(dataclasses.replace(PRESET, key_bits=bits), offset, basis) if bits else DynamicLayer()
        for bits, offset, basis in zip(key_bits, setting.offset, setting.basis, strict=True)
    ]


def noise_of_logits(setting: Setting) -> torch.Tensor:
    """[num_layers]: mean over KV heads of |q|^2 |k|^2 as they are quantized, by the fixed pass."""
    positions = torch.arange(len(setting.pass_ids))
    found = []
    for q, k, o, b in zip(setting.pass_queries, setting.pass_keys, setting.offset, setting.basis, strict=True):
        k = k - offset_at(o, positions)
        q = q.unflatten(1, (k.shape[1], -1))
        if b is not None:
            k, q = torch.einsum("hij,thj->thi", b, k), torch.einsum("hij,thgi->thgj", torch.linalg.inv(b), q)
        found.append((q.square().sum(-1).mean((0, 2)) * k.square().sum(-1).mean(0)).mean())
    return torch.stack(found)


def kl_of_layers(setting: Setting, ids: torch.Tensor, step: int) -> torch.Tensor:
    """[num_layers]: mean KL with this layer alone at 4 bits."""
    count = len(setting.offset)
    widths = [[4 if layer == i else None for layer in range(count)] for i in range(count)]
    return torch.stack([setting.kl(layers_of(setting, w), ids, step).mean() for w in widths])


def widths_by(sensitivity: torch.Tensor, moved: int) -> list[int]:
    """5 bits for the `moved` most sensitive layers, 3 for as many of the least."""
    widths, order = [4] * len(sensitivity), sensitivity.argsort(descending=True).tolist()
    for high, low in zip(order[:moved], order[::-1][:moved], strict=True):
        widths[high], widths[low] = 5, 3
    return widths


@torch.inference_mode()
def main() -> None:
    """Print a row a choice: key widths, mean KL and its 99th percentile, nats."""
    setting = Setting(sys.argv[1] if len(sys.argv) > 1 else str(demo_model()))
    count = len(setting.offset)
    by = {
        "by the logits": noise_of_logits(setting),
        "by the pass": kl_of_layers(setting, setting.pass_ids, PASS_STEP),
        "by the text": kl_of_layers(setting, setting.text, STEP),
    }
    for name, sensitivity in by.items():
        print(f"{name}: " + " ".join(f"{x:.2g}" for x in (sensitivity / sensitivity.mean()).tolist()), flush=True)
    rows = {"4 bits everywhere": [4] * count, "5 bits everywhere": [5] * count}
    for name, sensitivity in by.items():
        for moved in (count // 6, count // 3):
            rows[f"{name}, {moved} up, {moved} down"] = widths_by(sensitivity, moved)
    rows[f"against the text, {count // 3} up, {count // 3} down"] = widths_by(-by["by the text"], count // 3)
    for name, widths in rows.items():
        kl = setting.kl(layers_of(setting, widths), setting.text)
        print(f"{name:34s} {kl.mean():.5f}  {kl.quantile(0.99):.4f}  {''.join(map(str, widths))}", flush=True)


if __name__ == "__main__":
    main()
