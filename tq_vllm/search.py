"""Nearest-neighbour search on TurboQuant codes: a flat index that needs no training (TurboQuant section 4.4).

    index = TurboQuantIndex(dim=1536, bits=4)
    index.add(vectors)                      # [num_vectors, 1536]
    scores, ids = index.search(queries, 10)  # [num_queries, 10] each
    index.save("vectors.tq")
    index = TurboQuantIndex.load("vectors.tq")

A vector is rotated, scaled to unit variance and quantized like a vector of the cache (`core.quantizers`); the queries
are rotated instead of the stored vectors being rotated back, so a score is <rotated query, codes> times one scale.
"""

import math
import os
import zipfile

import numpy as np
import torch

from tq_vllm.config import SCALE_RULES, SCALE_SEARCH
from tq_vllm.core.hadamard import hadamard_factors, hadamard_matrix
from tq_vllm.core.packing import pack_codes, packed_size, unpack_codes
from tq_vllm.core.quantizers import decode_vectors, encode_vectors
from tq_vllm.core.rotations import default_rotation, get_rotation

BITS = (2, 3, 4, 5, 8)
METRICS = ("inner_product", "cosine")
_FILE_VERSION = 1
_TILE_ELEMENTS = 1 << 22  # decoded coordinates held at a time: 16 MiB of float32
_QUERY_ROWS = 1024  # queries scored at a time against a tile


class TurboQuantIndex:
    """Vectors kept as `bits`-bit codes and one scale each; ids count 0, 1, 2 ... in the order of `add`.

    Bytes a vector: ceil(dim * bits / 8) and a scale of 4 bytes ("cosine" without `center`: 2); with `center` 4 more.

    Args:
        dim: coordinates of a vector, at least 2; any number (a dimension without a Hadamard matrix is rotated densely).
        bits: width of a code: 2, 3, 4, 5 or 8.
        metric: "inner_product", or "cosine", which normalises both sides; a zero vector has cosine 0.
        scale_rule: what a stored scale makes exact: "norm" the length, "unbiased" (EDEN) inner products on average over
            rotations, "raw" with `scale_search=(1.0,)` TurboQuant Alg. 1 as printed.
        scale_search: encoder's scale candidates (`config.SCALE_SEARCH`); `(1.0,)` adds several times faster, and less
            exactly from 3 bits on.
        center: a vector [dim], such as the mean of a sample ("cosine": of normalised vectors), taken off vectors and
            queries; its own part of a score is kept exactly. Pays where the vectors have a large mean in common.
        device: where the codes lie and scores are computed.
    Errors: ValueError that names what, got and allowed.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        metric: str = "inner_product",
        scale_rule: str = "norm",
        scale_search: tuple[float, ...] = SCALE_SEARCH,
        center: torch.Tensor | np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ):
        for what, got, allowed in (
            ("bits", bits, BITS),
            ("metric", metric, METRICS),
            ("scale_rule", scale_rule, SCALE_RULES),
        ):
            if got not in allowed:
                raise ValueError(f"{what} of a TurboQuantIndex: got {got!r}, allowed {', '.join(map(str, allowed))}.")
        if not isinstance(dim, int) or dim < 2:
            raise ValueError(f"dim of a TurboQuantIndex: got {dim!r}, allowed integers from 2 on.")
        if not scale_search or min(scale_search) <= 0:
            raise ValueError(f"scale_search of a TurboQuantIndex: got {scale_search!r}, allowed numbers above 0.")
        self.dim, self.bits, self.metric, self.scale_rule = dim, bits, metric, scale_rule
        self.scale_search, self.device = tuple(scale_search), torch.device(device)
        self.center = None if center is None else self._checked(torch.as_tensor(center)[None], "center")[0]
        self._rotate = _Rotate(dim, self.device)
        self._scale_dtype = torch.float16 if metric == "cosine" and center is None else torch.float32
        empty = torch.empty(0, packed_size(dim, bits), dtype=torch.uint8, device=self.device)
        self._codes = [empty]  # parts of [num_vectors, packed_size(dim, bits)] uint8
        self._scales = [torch.empty(0, dtype=self._scale_dtype, device=self.device)]  # parts of [num_vectors]
        self._offsets = [torch.empty(0, device=self.device)]  # parts of <center, vector> [num_vectors] f32
        self._byte_table = _byte_table(bits).to(self.device) if 8 % bits == 0 else None

    def __len__(self) -> int:
        return sum(map(len, self._codes))

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return sum(part.nbytes for part in (*self._codes, *self._scales, *self._offsets))

    def add(self, vectors: torch.Tensor | np.ndarray) -> None:
        """Append vectors [num_vectors, dim] of any float dtype; ValueError for another shape, NaN or infinity."""
        vectors = self._checked(vectors, "vectors")
        parts = [self._encode(part) for part in vectors.split(max(1, _TILE_ELEMENTS // self.dim))]
        codes, scales, offsets = zip(*parts, strict=True)  # nothing is kept of a batch that fails
        self._codes.extend(codes)
        self._scales.extend(scales)
        self._offsets.extend(offsets)

    def search(self, queries: torch.Tensor | np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scores f32, ids int64), both [num_queries, k], of the k best vectors a query, the best first.

        queries [num_queries, dim] of any float dtype. A score estimates <query, vector> or their cosine; it equals the
        exact product with the decoded vector. Memory: 16 MiB of decoded vectors and 1024 queries' scores of them.
        Errors: ValueError for queries of another shape, NaN or infinity, and for k outside 1 .. len(index).
        """
        queries = self._checked(queries, "queries")
        if not 1 <= k <= len(self):
            raise ValueError(f"k of a search: got {k}, allowed 1 to {len(self)}, the number of vectors in the index.")
        if self.metric == "cosine":
            queries = torch.nn.functional.normalize(queries, dim=-1, eps=1e-38)
        if self.center is not None:  # <q, x> = <q - c, x - c> + <c, x> + <c, q - c>
            queries = queries - self.center
            constant = (queries @ self.center)[:, None]
        queries = self._rotate(queries) / math.sqrt(self.dim)
        self._codes, self._scales = [torch.cat(self._codes)], [torch.cat(self._scales)]
        self._offsets = [torch.cat(self._offsets)]
        best = [
            (
                torch.empty(len(rows), 0, device=self.device),
                torch.empty(len(rows), 0, dtype=torch.int64, device=self.device),
            )
            for rows in queries.split(_QUERY_ROWS)
        ]
        tile = max(1, _TILE_ELEMENTS // self.dim)
        for start in range(0, len(self), tile):
            codes, scales = self._codes[0][start : start + tile], self._scales[0][start : start + tile]
            vectors = self._decode(codes) * scales.to(torch.float32)[:, None]  # [tile, dim] f32
            for i, rows in enumerate(queries.split(_QUERY_ROWS)):
                tile_scores = rows @ vectors.t()  # [rows, tile]
                if self.center is not None:
                    tile_scores += self._offsets[0][start : start + tile]
                best[i] = _merge(best[i], tile_scores, start, k)
        scores, ids = (torch.cat(part) for part in zip(*best, strict=True))
        return scores if self.center is None else scores + constant, ids

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to one file (a NumPy .npz of plain arrays), replacing it only when all is written."""
        part = f"{os.fspath(path)}.part"
        with open(part, "wb") as file:
            np.savez(
                file,
                version=_FILE_VERSION,
                dim=self.dim,
                bits=self.bits,
                metric=self.metric,
                scale_rule=self.scale_rule,
                scale_search=np.array(self.scale_search, dtype=np.float64),
                codes=torch.cat(self._codes).cpu().numpy(),
                scales=torch.cat(self._scales).cpu().numpy(),
                center=np.zeros(0, np.float32) if self.center is None else self.center.cpu().numpy(),
                offsets=torch.cat(self._offsets).cpu().numpy(),
            )
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> "TurboQuantIndex":
        """Read an index that `save` wrote; ValueError if the file is anything else, OSError if it can't be opened."""
        try:
            with np.load(path, allow_pickle=False) as file:
                version = int(file["version"])
                if version != _FILE_VERSION:
                    raise ValueError(f"file version {version}, this tq_vllm reads {_FILE_VERSION}")
                index = cls(
                    int(file["dim"]),
                    int(file["bits"]),
                    str(file["metric"]),
                    str(file["scale_rule"]),
                    tuple(file["scale_search"].tolist()),
                    file["center"] if file["center"].size else None,
                    device,
                )
                codes, scales, offsets = (torch.from_numpy(file[part]) for part in ("codes", "scales", "offsets"))
        except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{os.fspath(path)} is not a file that TurboQuantIndex.save wrote ({error}).") from error
        num_vectors, num_offsets = len(codes), 0 if index.center is None else len(codes)
        shapes = (num_vectors, packed_size(index.dim, index.bits)), (num_vectors,), (num_offsets,)
        dtypes = torch.uint8, index._scale_dtype, torch.float32
        got = [(tuple(part.shape), part.dtype) for part in (codes, scales, offsets)]
        if got != list(zip(shapes, dtypes, strict=True)):
            raise ValueError(f"{os.fspath(path)} is damaged: codes, scales and offsets are {got}.")
        index._codes, index._scales = [codes.to(index.device)], [scales.to(index.device)]
        index._offsets = [offsets.to(index.device)]
        return index

    def _checked(self, x: torch.Tensor | np.ndarray, what: str) -> torch.Tensor:
        """Return x as f32 [n, dim] on the index's device."""
        x = torch.as_tensor(x)
        if x.dim() != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"{what} of a TurboQuantIndex: got {x.dtype} {list(x.shape)}, allowed floats [n, {self.dim}]."
            )
        x = x.to(self.device, torch.float32)
        if not torch.linalg.vector_norm(x, dim=-1).isfinite().all():
            raise ValueError(f"{what} of a TurboQuantIndex: got NaN, infinity or a length over 1.8e19, allowed finite.")
        return x

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (packed codes, scales, offsets) of x [n, dim] f32; no offsets without `center`.

        scale * codes / sqrt(dim) is the decoded vector, rotated and centred.
        """
        if self.metric == "cosine":
            x = torch.nn.functional.normalize(x, dim=-1, eps=1e-38)
        offsets = torch.empty(0, device=self.device)
        if self.center is not None:
            offsets, x = x @ self.center, x - self.center
        norm = torch.linalg.vector_norm(x, dim=-1)
        y = self._rotate(torch.nn.functional.normalize(x, dim=-1, eps=1e-38)) * math.sqrt(self.dim)
        codes, scales = encode_vectors(y, self.bits, self.scale_rule, self.scale_search)
        scales = scales if self._scale_dtype == torch.float16 else scales * norm
        return pack_codes(codes, self.bits), scales.to(self._scale_dtype), offsets

    def _decode(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the centroids f32 [n, dim] of packed codes [n, packed_size]."""
        if self._byte_table is None:
            codes = unpack_codes(packed, self.bits, self.dim)
            return decode_vectors(codes, torch.ones(len(codes), device=self.device), self.bits)
        decoded = self._byte_table.index_select(0, packed.flatten().to(torch.int32))  # [n * packed_size, 8 / bits]
        return decoded.view(len(packed), -1)[:, : self.dim]


class _Rotate:
    """The rotation `get_rotation(dim, default_rotation(dim))` in float32, for many long vectors.

    A Hadamard matrix is a Kronecker product of two of about sqrt(dim), so that 2 * dim**1.5 multiplications a vector do
    what dim**2 do; a dense rotation is one product.
    """

    def __init__(self, dim: int, device: torch.device):
        rotation = get_rotation(dim, default_rotation(dim))
        if rotation.kind == "dense":
            self._signs, self._left, self._right = None, rotation.matrix().to(device, torch.float32), None
            return
        inner = min(1 << round(math.log2(dim) / 2), 1 << hadamard_factors(dim)[1])
        self._signs = rotation.signs()[0].to(device, torch.float32) / math.sqrt(dim)  # [dim]
        self._left = hadamard_matrix(dim // inner).to(device, torch.float32)
        self._right = hadamard_matrix(inner).to(device, torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rotated x, f32 [n, dim]."""
        if self._signs is None:
            return x @ self._left.t()
        rows = (x * self._signs).view(len(x), len(self._left), len(self._right))
        return ((rows @ self._right.t()).transpose(1, 2) @ self._left.t()).transpose(1, 2).reshape(x.shape)


def _byte_table(bits: int) -> torch.Tensor:
    """Return the centroids of the codes in each byte, f32 [256, 8 / bits], for bits that divide 8."""
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8)[:, None], bits, 8 // bits)
    return decode_vectors(codes, torch.ones(256), bits)


def _merge(best: tuple[torch.Tensor, torch.Tensor], scores: torch.Tensor, start: int, k: int) -> tuple:
    """Return the k best (scores, ids) of `best` and of scores [rows, tile] of the ids start, start + 1, ..."""
    found, ids = scores.topk(min(k, scores.shape[1]), dim=1)
    found, ids = torch.cat((best[0], found), 1), torch.cat((best[1], ids + start), 1)
    found, order = found.topk(min(k, found.shape[1]), dim=1)
    return found, ids.gather(1, order)
