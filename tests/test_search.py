"""TurboQuantIndex: scores against decoded vectors, best-k against a full sort, files, and what is refused."""

import numpy as np
import pytest
import torch

from tq_vllm import search
from tq_vllm.core.quantizers import decode_vectors, encode_vectors
from tq_vllm.core.rotations import default_rotation, get_rotation
from tq_vllm.search import TurboQuantIndex


def random_vectors(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def decoded(x: torch.Tensor, bits: int, metric: str, rule: str) -> torch.Tensor:
    """The vectors of an index by the reference, float64: rotate, quantize, decode, rotate back."""
    rotation = get_rotation(x.shape[1], default_rotation(x.shape[1]))
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    y = rotation.forward(unit).float() * x.shape[1] ** 0.5
    vectors = rotation.inverse(decode_vectors(*encode_vectors(y, bits, rule), bits).double()) / x.shape[1] ** 0.5
    return vectors if metric == "cosine" else vectors * x.double().norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("metric", search.METRICS)
@pytest.mark.parametrize("bits", search.BITS)
@pytest.mark.parametrize("dim", [50, 96, 192])
def test_scores_are_those_of_the_decoded_vectors(dim, bits, metric):
    x = random_vectors(300, dim) * torch.linspace(0.01, 30, 300)[:, None]
    queries = random_vectors(7, dim, seed=1)
    index = TurboQuantIndex(dim, bits, metric)
    index.add(x)
    scores, ids = index.search(queries, 300)
    assert scores.shape == ids.shape == (7, 300)
    assert (ids.sort(dim=1).values == torch.arange(300)).all()
    assert (scores.diff(dim=1) <= 0).all()
    q = torch.nn.functional.normalize(queries.double(), dim=-1) if metric == "cosine" else queries.double()
    exact = (q @ decoded(x, bits, metric, "norm").t()).gather(1, ids)
    # a float32 rotation may move a coordinate over a threshold: few vectors, and by little
    difference = (scores.double() - exact).abs()
    assert (difference <= 1e-5 * exact.abs().max()).double().mean() > 0.99
    assert difference.max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("bits", [3, 4])
def test_tiles_and_batches_do_not_change_the_result(bits, monkeypatch):
    x, queries = random_vectors(1000, 64), random_vectors(33, 64, seed=1)
    whole = TurboQuantIndex(64, bits)
    whole.add(x)
    expected_scores, expected_ids = whole.search(queries, 20)
    monkeypatch.setattr(search, "_TILE_ELEMENTS", 64 * 7)  # less than k vectors a tile
    monkeypatch.setattr(search, "_QUERY_ROWS", 5)
    parts = TurboQuantIndex(64, bits)
    for part in x.split([1, 0, 499, 500]):
        parts.add(part)
    scores, ids = parts.search(queries, 20)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-4)
    assert (ids == expected_ids).double().mean() > 0.99  # but for scores equal within rounding
    assert len(parts) == 1000


@pytest.mark.parametrize("dim", [64, 96, 100])
def test_recall_grows_with_bits(dim):
    x = torch.nn.functional.normalize(random_vectors(3000, dim), dim=-1)
    queries = x[:200] + 0.6 * torch.nn.functional.normalize(random_vectors(200, dim, seed=1), dim=-1)
    best = (queries @ x.t()).topk(10).indices

    def overlap(bits):
        index = TurboQuantIndex(dim, bits, "cosine")
        index.add(x)
        ids = index.search(queries, 10)[1]
        return (ids[:, :, None] == best[:, None, :]).any(-1).double().mean().item()

    two, four, eight = overlap(2), overlap(4), overlap(8)
    assert two > 0.45 and four > 0.8 and eight > 0.97
    assert two < four < eight


def test_the_unbiased_rule_makes_the_product_with_the_vector_itself_exact():
    x = random_vectors(50, 128)
    for rule, exact in (("unbiased", True), ("norm", False)):
        index = TurboQuantIndex(128, 2, scale_rule=rule)
        index.add(x)
        scores, ids = index.search(x, 50)
        ratio = scores[ids == torch.arange(50)[:, None]] / x.square().sum(-1)
        assert ((ratio - 1).abs() < 1e-3).all() == exact


@pytest.mark.parametrize("metric", search.METRICS)
def test_centre(metric, tmp_path, monkeypatch):
    """Scores are <q, c> + <x, c> - |c|^2 + those of centred vectors without `center`; the error falls with the mean."""
    x, queries = random_vectors(500, 64) + 3, random_vectors(5, 64, seed=1) + 3
    unit = torch.nn.functional.normalize if metric == "cosine" else lambda x: x
    mean = unit(x).mean(0)
    plain, centred = TurboQuantIndex(64, 4), TurboQuantIndex(64, 4, metric, center=mean.numpy())
    plain.add(unit(x) - mean)
    monkeypatch.setattr(search, "_TILE_ELEMENTS", 64 * 70)
    centred.add(x)
    centred.save(tmp_path / "index")
    loaded = TurboQuantIndex.load(tmp_path / "index")
    assert loaded.nbytes == centred.nbytes == 500 * (32 + 4 + 4)
    scores, ids = loaded.search(queries, 500)
    part, order = plain.search(unit(queries) - mean, 500)
    expected = torch.zeros(5, 500).scatter_(1, order, part)
    expected += unit(x) @ mean + (unit(queries) @ mean)[:, None] - mean @ mean
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    uncentred = TurboQuantIndex(64, 4, metric)
    uncentred.add(x)
    exact = unit(queries) @ unit(x).t()
    errors = [
        (found - exact.gather(1, order)).square().mean().item()
        for found, order in ((scores, ids), uncentred.search(queries, 500))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("metric", search.METRICS)
@pytest.mark.parametrize("bits", [3, 4])
def test_saved_and_loaded(tmp_path, bits, metric):
    x, queries = random_vectors(200, 80), random_vectors(4, 80, seed=1)
    index = TurboQuantIndex(80, bits, metric, "unbiased", (1.0, 0.9))
    index.add(x[:150])
    index.save(tmp_path / "index.tq")
    loaded = TurboQuantIndex.load(tmp_path / "index.tq")
    assert len(loaded) == 150 and loaded.nbytes == index.nbytes
    for each in (index, loaded):
        each.add(x[150:].numpy())
    for got, expected in zip(loaded.search(queries, 200), index.search(queries.numpy(), 200), strict=True):
        assert torch.equal(got, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["index.tq"]


def test_bytes_are_codes_and_a_scale():
    for bits, metric, each in ((4, "cosine", 50 + 2), (4, "inner_product", 50 + 4), (3, "cosine", 38 + 2)):
        index = TurboQuantIndex(100, bits, metric)
        index.add(random_vectors(10, 100))
        assert index.nbytes == 10 * each


def test_zero_and_extreme_vectors():
    x = random_vectors(6, 64)
    x[0] = 0
    x[1] *= 1e-20
    x[2] *= 1e15
    for metric in search.METRICS:
        index = TurboQuantIndex(64, 8, metric)
        index.add(x)
        scores, ids = index.search(x[3:], 6)
        assert scores.isfinite().all()
        assert (scores[ids == 0] == 0).all()
    index = TurboQuantIndex(64, 8)
    index.add(x)
    scores, ids = index.search(x[1:2] * 1e20, 6)
    assert scores[ids == 1].item() == pytest.approx((x[1] @ x[1] * 1e20).item(), rel=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": 6}, "bits of a TurboQuantIndex: got 6, allowed 2, 3, 4, 5, 8."),
        ({"dim": 1}, "dim of a TurboQuantIndex: got 1,"),
        ({"dim": 64.0}, "dim of a TurboQuantIndex: got 64.0,"),
        ({"metric": "l2"}, "metric of a TurboQuantIndex: got 'l2', allowed inner_product, cosine."),
        ({"scale_rule": "max"}, "scale_rule of a TurboQuantIndex: got 'max'"),
        ({"scale_search": ()}, "scale_search of a TurboQuantIndex"),
        (
            {"center": torch.zeros(63)},
            "center of a TurboQuantIndex: got torch.float32 [1, 63], allowed",
        ),
    ],
)
def test_arguments_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        TurboQuantIndex(**{"dim": 64, "bits": 4} | arguments)
    assert str(error.value).startswith(message)


def test_inputs_refused():
    index = TurboQuantIndex(64, 4)
    index.add(random_vectors(3, 64))
    not_finite = random_vectors(2, 64)
    not_finite[1, 5] = torch.nan
    for bad in (random_vectors(3, 63), torch.randn(64), torch.ones(3, 64, dtype=torch.int64), not_finite):
        for call in (index.add, lambda x: index.search(x, 1)):
            with pytest.raises(ValueError, match="of a TurboQuantIndex: got .*, allowed"):
                call(bad)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"got {k}, allowed 1 to 3"):
            index.search(random_vectors(1, 64), k)
    assert len(index) == 3
    assert index.search(random_vectors(0, 64), 2)[1].shape == (0, 2)


def test_files_refused(tmp_path):
    index = TurboQuantIndex(64, 4)
    index.add(random_vectors(3, 64))
    index.save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "text").write_text("not an index")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "other.npz", codes=np.zeros(3))
    for name in ("text", "empty", "cut", "other.npz"):
        with pytest.raises(ValueError, match="is not a file that TurboQuantIndex.save wrote"):
            TurboQuantIndex.load(tmp_path / name)
    parts = dict(np.load(tmp_path / "good"))
    for change in ({"codes": parts["codes"][:, 1:]}, {"scales": parts["scales"][1:]}):
        with open(tmp_path / "damaged", "wb") as file:
            np.savez(file, **parts | change)
        with pytest.raises(ValueError, match="is damaged"):
            TurboQuantIndex.load(tmp_path / "damaged")
    with pytest.raises(OSError):
        TurboQuantIndex.load(tmp_path / "absent")
