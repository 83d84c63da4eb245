"""Distortion against bits, bias, and variance against the inner product (TurboQuant theorems 1 to 3, figures 1 to 3).

    python bench/paper/distortion.py [--datasets synthetic mlp tokens] [--count 800] [--sketches 8] [--json FILE]

For unit vectors x and unit queries q = t x + sqrt(1 - t^2) z, z a random direction orthogonal to x, and D_b the
distortion |x - x^|^2 of b bits, the error <q, x^> - t has
  mse   mean -t D_b  d * variance (D_b - D_b^2)(1 - t^2) + t^2 V_b, V_b the variance of one coordinate's part of <x, x^>
  prod  mean 0       d * variance pi/2 D_(b-1) - t^2 D_(b-1)^2, over its sketches
  eden  mean 0       d * variance D_b / (1 - D_b) (1 - t^2): the scale rule "unbiased", no bit for QJL
A line whose measurement is away from that theory, from the paper's bounds, or biased by more than 5 standard errors, is
not printed.
"""

import argparse
import json
import math
import sys

import torch
import vectors

from tq_vllm.core.qjl import TurboQuantProd
from tq_vllm.core.quantizers import TurboQuantMSE, decode_vectors, encode_vectors
from tq_vllm.core.rotations import default_rotation, get_rotation

# Lloyd-Max distortion of N(0, 1) at 0 to 4 bits, and what the paper prints for mse and (times d) for prod.
GAUSSIAN = (1.0, 0.36338, 0.11748, 0.03454, 0.009497)
PAPER_MSE = (None, 0.36, 0.117, 0.03, 0.009)
PAPER_PROD = (None, 1.57, 0.56, 0.18, 0.047)
INNER_PRODUCTS = (0.0, 0.1, 0.2, 0.4, 0.8)
SELF_VARIANCE_2_BITS = 0.1494  # V_2, given the length of the vector (0.3386 - 0.6152^2 / 2)
MSE_TOLERANCE = 0.03  # relative; a variance of `count` vectors may be off by 4 of its standard errors, sqrt(2 / count)


def queries_at(x: torch.Tensor, t: float, seed: int) -> torch.Tensor:
    """Return unit queries f32 [n, d] whose inner product with x [n, d] is t."""
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    z = torch.nn.functional.normalize(z - (z * x).sum(-1, keepdim=True) * x, dim=-1)
    return t * x + math.sqrt(1 - t * t) * z


def decoded(method: str, x: torch.Tensor, bits: int, sketches: int) -> list[torch.Tensor]:
    """Return the decoded vectors [n, d] of every draw of a sketch; mse and eden have none, and repeat theirs."""
    dim = x.shape[1]
    if method == "prod":
        quantizers = (TurboQuantProd(dim, bits, sketch_seed=100 + seed) for seed in range(sketches))
        return [quantizer.dequantize(quantizer.quantize(x)) for quantizer in quantizers]
    if method == "mse":
        quantizer = TurboQuantMSE(dim, bits)
        return [quantizer.dequantize(quantizer.quantize(x))] * sketches
    rotation = get_rotation(dim, default_rotation(dim))
    codes = encode_vectors(rotation.forward(x) * math.sqrt(dim), bits, "unbiased", (1.0,))
    return [rotation.inverse(decode_vectors(*codes, bits)) / math.sqrt(dim)] * sketches


def theory(method: str, bits: int, t: float) -> tuple[float, float]:
    """Return (mean, d * variance) of the error of an inner product t (mse with t other than 0: 2 bits)."""
    d, coarse = GAUSSIAN[bits], GAUSSIAN[bits - 1]
    if method == "prod":
        return 0.0, math.pi / 2 * coarse - t * t * coarse**2
    if method == "mse":
        return -t * d, (d - d * d) * (1 - t * t) + t * t * SELF_VARIANCE_2_BITS
    return 0.0, d / (1 - d) * (1 - t * t)


def errors(x: torch.Tensor, draws: list[torch.Tensor], t: float) -> torch.Tensor:
    """Return <q, x^ - x>, f64 [draws, n], with other queries for every draw."""
    return torch.stack([(queries_at(x, t, 7 + i) * (hat - x)).double().sum(-1) for i, hat in enumerate(draws)])


def inner_product_line(method: str, bits: int, t: float, x: torch.Tensor, draws: list[torch.Tensor]) -> dict:
    """Measure mean and variance at one inner product; "ok" says whether they are the theory's."""
    error, dim = errors(x, draws, t), x.shape[1]
    mean, variance = theory(method, bits, t)
    # vectors share a sketch, and draws share a vector: the larger of both standard errors
    standard_error = max((means.std() / math.sqrt(len(means))).item() for means in (error.mean(0), error.mean(1)))
    measured = dim * error.var().item()
    ok = abs(error.mean().item() - mean) <= 5 * standard_error + 0.02 * abs(mean)
    ok = ok and abs(measured / variance - 1) <= 4 * math.sqrt(2 / len(x))
    return {
        "method": method,
        "bits": bits,
        "t": t,
        "mean": error.mean().item(),
        "mean_theory": mean,
        "standard_error": standard_error,
        "d_variance": measured,
        "d_variance_theory": variance,
        "ok": ok,
    }


def distortion_line(method: str, bits: int, x: torch.Tensor, draws: list[torch.Tensor]) -> dict:
    """Measure |x - x^|^2 (mse) or d * squared error of an inner product 0 (the others) beside theory and bounds."""
    if method == "mse":
        measured = (draws[0] - x).double().square().sum(-1).mean().item()
        expected, paper, tolerance = GAUSSIAN[bits], PAPER_MSE[bits], MSE_TOLERANCE
        lower, upper = 4.0**-bits, math.sqrt(3) * math.pi / 2 * 4.0**-bits
    else:
        measured = x.shape[1] * errors(x, draws, 0.0).square().mean().item()
        expected, tolerance = theory(method, bits, 0.0)[1], 4 * math.sqrt(2 / len(x))
        paper = PAPER_PROD[bits] if method == "prod" else None
        lower, upper = 4.0**-bits, math.sqrt(3) * math.pi**2 * 4.0**-bits
    ok = abs(measured / expected - 1) <= tolerance and lower <= measured <= upper
    return {
        "method": method,
        "bits": bits,
        "measured": measured,
        "theory": expected,
        "paper": paper,
        "lower": lower,
        "upper": upper,
        "ok": ok,
    }


def print_line(text: str, line: dict) -> None:
    """Print a line's figures, or only that its check failed."""
    print(text if line["ok"] else f"{line['method']:4} {line['bits']:4}  not printed: away from theory or bounds")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="distortion, bias and variance beside the paper's theory and bounds")
    parser.add_argument("--datasets", nargs="+", choices=vectors.DATASETS, default=["synthetic", "mlp", "tokens"])
    parser.add_argument("--count", type=int, default=800, help="vectors")
    parser.add_argument("--sketches", type=int, default=8, help="random matrices S of prod, and queries a vector")
    parser.add_argument("--json", help="also write all lines to this file")
    options = parser.parse_args(arguments)
    report = []
    for name in options.datasets:
        x = vectors.load(name, options.count)
        print(f"\n{name}: {vectors.DATASETS[name][1]}; d={x.shape[1]}, {len(x)} unit vectors")
        draws = {
            (method, bits): decoded(method, x, bits, options.sketches)
            for method in ("mse", "prod", "eden")
            for bits in ((2, 3, 4) if method == "eden" else (1, 2, 3, 4))
        }
        print("distortion: |x - x^|^2 of mse; d * squared error of an inner product of prod and of the EDEN scale")
        print("what bits  measured    theory     paper     lower     upper")
        for (method, bits), hats in draws.items():
            line = distortion_line(method, bits, x, hats)
            paper = "        -" if line["paper"] is None else f"{line['paper']:9.4g}"
            figures = f"{line['measured']:9.5f} {line['theory']:9.5f} {paper} {line['lower']:9.5f} {line['upper']:9.5f}"
            print_line(f"{method:4} {bits:4} {figures}", line)
            report.append({"dataset": name, "table": "distortion", **line})
        print("error of an inner product t, 2 bits: mean (standard error), and d * variance")
        print("what bits    t      mean    theory   (s.e.)  d * var   theory")
        for method in ("mse", "prod", "eden"):
            for t in INNER_PRODUCTS:
                line = inner_product_line(method, 2, t, x, draws[method, 2])
                mean = f"{line['mean']:9.5f} {line['mean_theory']:9.5f} {line['standard_error']:8.5f}"
                variance = f"{line['d_variance']:8.4f} {line['d_variance_theory']:8.4f}"
                print_line(f"{method:4}    2 {t:4.1f} {mean} {variance}", line)
                report.append({"dataset": name, "table": "inner product", **line})
        sys.stdout.flush()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"text": vectors.text_hash(), "lines": [line for line in report if line["ok"]]}, file, indent=2)
    return 0 if all(line["ok"] for line in report) else 1


if __name__ == "__main__":
    sys.exit(main())
