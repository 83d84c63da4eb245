"""Nearest-neighbour search of the paper (section 4.4, figure 5, table 2): recall@1@k and quantization time.

    python bench/paper/nearest.py [--datasets keys mlp gate-up] [--threads 1] [--json FILE]

Rivals at the same bits per coordinate: faiss's product quantizer (256 centroids for 4 coordinates at 2 bits, for 2 at 4
bits) and RaBitQ (after a random rotation; it centres on the mean of the data; queries not quantized). recall@1@k: how
often the true nearest of a query by inner product is among the k that the codes rank first. Times are CPU seconds for
one thread, wall seconds for more. A row whose scores are not those of its vectors is not printed. faiss-cpu is needed
by this bench only.
"""

import argparse
import json
import math
import os
import sys
import time

import torch
import vectors

from tq_vllm.core.quantizers import decode_vectors, encode_vectors
from tq_vllm.core.rotations import default_rotation, get_rotation
from tq_vllm.search import TurboQuantIndex

KS = (1, 2, 4, 8)
PQ_ITERATIONS = 10
# Root mean square of (score - inner product) on unit vectors above which a method is not what its row says.
LARGEST_ERROR = {2: 0.2, 4: 0.05}


class TurboQuant:
    """TurboQuantIndex, with the options of a row; `centred` on the mean of the vectors."""

    def __init__(self, dim, bits, centred=False, **options):
        self.index, self.options, self.centred = TurboQuantIndex(dim, bits, **options), options, centred

    def train(self, x):
        """Nothing but the mean of a centred row: TurboQuant has no training."""
        if self.centred:
            self.index = TurboQuantIndex(self.index.dim, self.index.bits, center=x.mean(0), **self.options)

    def add(self, x):
        self.index.add(x)
        self.bytes = self.index.nbytes / len(self.index)

    def search(self, queries, k):
        return self.index.search(queries, k)

    def check(self, x, queries):
        """Scores equal the inner products with the reference's decoded vectors, but for a few flipped roundings."""
        some, bits, dim = x[:200], self.index.bits, self.index.dim
        rotation = get_rotation(dim, default_rotation(dim))
        coded = encode_vectors(
            rotation.forward(some) * math.sqrt(dim), bits, self.index.scale_rule, self.index.scale_search
        )
        exact = queries @ rotation.inverse(decode_vectors(*coded, bits)).t() / math.sqrt(dim)
        small = TurboQuantIndex(dim, bits, **self.options)
        small.add(some)
        scores, ids = small.search(queries, len(some))
        return ((scores - exact.gather(1, ids)).abs() < 1e-4).double().mean().item() > 0.98


class Faiss:
    """A faiss index, after a random rotation where the method asks for one."""

    def __init__(self, index, rotation=None, code_size=None):
        self.index, self.rotation, self.bytes = index, rotation, code_size

    def _rotated(self, x):
        return self.rotation.apply(x.numpy()) if self.rotation else x.numpy()

    def train(self, x):
        self.index.train(self._rotated(x))

    def add(self, x):
        self.index.add(self._rotated(x))

    def search(self, queries, k):
        scores, ids = self.index.search(self._rotated(queries), k)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def check(self, x, queries):
        """Nothing of its own: what all methods are checked for is `measure`."""
        return True


def methods(faiss, dim: int, bits: int) -> dict:
    """The rows of one dimension and width: name -> a function that makes the empty index."""

    def product_quantizer():
        index = faiss.IndexPQ(dim, dim * bits // 8, 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.niter, index.pq.cp.min_points_per_centroid = PQ_ITERATIONS, 1
        return Faiss(index, code_size=index.code_size)

    def rabitq():
        index = faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT, bits)
        index.qb = 0
        rotation = faiss.RandomRotationMatrix(dim, dim)
        rotation.init(1)
        return Faiss(index, rotation, index.code_size)

    return {
        "faiss PQ": product_quantizer,
        "faiss RaBitQ": rabitq,
        "TurboQuant, paper": lambda: TurboQuant(dim, bits, scale_rule="raw", scale_search=(1.0,)),
        "norm matched": lambda: TurboQuant(dim, bits, scale_search=(1.0,)),
        "TurboQuantIndex": lambda: TurboQuant(dim, bits),
        "same, centred": lambda: TurboQuant(dim, bits, centred=True),
    }


def measure(make, x: torch.Tensor, queries: torch.Tensor, bits: int, threads: int) -> dict | None:
    """Return recalls, times in seconds and bytes a vector; None if the check fails."""
    clock = time.process_time if threads == 1 else time.perf_counter
    method, times = make(), [clock()]
    for step in (method.train, method.add):
        step(x)
        times.append(clock())
    scores, ids = method.search(queries, KS[-1])
    exact = queries @ x.t()
    error = (scores - exact.gather(1, ids)).square().mean().sqrt().item()
    if not error <= LARGEST_ERROR[bits] or not method.check(x, queries):
        return None
    hit = ids == exact.argmax(1, keepdim=True)
    return {
        "recall": [hit[:, :k].any(1).double().mean().item() for k in KS],
        "train_s": times[1] - times[0],
        "add_s": times[2] - times[1],
        "bytes_per_vector": method.bytes,
    }


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="recall@1@k and quantization time against faiss PQ and RaBitQ")
    parser.add_argument("--datasets", nargs="+", choices=vectors.DATASETS, default=["keys", "mlp", "gate-up"])
    parser.add_argument("--count", type=int, default=5000, help="stored vectors")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="rows, by name (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(arguments)
    try:
        import faiss
    except ModuleNotFoundError:
        print("nearest.py compares with faiss, which is not installed: `pip install faiss-cpu`.", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    clock = "CPU s" if options.threads == 1 else "wall s"
    print(f"CPU, threads: {options.threads}; faiss {faiss.__version__}, torch {torch.__version__}; times: {clock}")
    print(f"text {vectors.text_hash()}; PQ: {PQ_ITERATIONS} k-means iterations on the stored vectors")
    rows, failed = [], 0
    for name in options.datasets:
        x = vectors.load(name, options.count + options.queries)
        x, queries = x[: -options.queries], x[-options.queries :]
        dim = x.shape[1]
        print(f"\n{name}: {vectors.DATASETS[name][1]}; d={dim}, {len(x)} vectors, {len(queries)} queries")
        print(f"{'bits':4} {'method':18} {'bytes':>6} " + " ".join(f"  1@{k}" for k in KS) + "  train s    add s")
        for bits in (2, 4):
            for method, make in methods(faiss, dim, bits).items():
                if options.methods and method not in options.methods:
                    continue
                row = measure(make, x, queries, bits, options.threads)
                if row is None:
                    failed += 1
                    print(f"{bits:4} {method:18} not printed: its scores are not those of its vectors")
                    continue
                rows.append({"dataset": name, "dim": dim, "count": len(x), "bits": bits, "method": method, **row})
                recalls = " ".join(f"{recall:5.3f}" for recall in row["recall"])
                figures = f"{row['bytes_per_vector']:6.0f} {recalls} {row['train_s']:8.2f} {row['add_s']:8.3f}"
                print(f"{bits:4} {method:18} {figures}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            report = {"threads": options.threads, "cpus": os.cpu_count(), "clock": clock, "rows": rows}
            json.dump(report, file, indent=2)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
