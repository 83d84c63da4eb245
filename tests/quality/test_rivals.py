"""Rivals of bench/quality: what they keep has the error that their papers and the theory say, and the bytes counted."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "quality"))

from layers import EvictedLayer, KiviLayer, TokenLayer  # noqa: E402
from rivals import EVICTIONS, RIVALS, Eviction, polar, polar_bytes, polar_codebooks  # noqa: E402

HEAD_DIM = 64
BY_NAME = {rival.name: rival for rival in RIVALS}


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 160, HEAD_DIM, generator=torch.Generator().manual_seed(0))


def error(kept: torch.Tensor, x: torch.Tensor) -> float:
    return float((kept - x).square().sum() / x.square().sum())


@pytest.mark.parametrize(
    "name, of_keys, of_values",
    [
        ("none", 0, 0),
        ("TurboQuant paper, mse 4 bit", 0.0092, 0.0092),  # Lloyd-Max for head size 64
        ("TurboQuant paper, QJL keys 4 bit", 0.0523, 0.0092),  # keys: pi / 2 times the error of 3 bits
        ("TurboQuant paper, mse 3 bit", 0.0334, 0.0334),
        ("TurboQuant paper, mse 2 bit", 0.1145, 0.1145),
        ("PolarQuant 4-2-2-2 bit", 0.0325, 0.0325),
        ("fp8 e4m3, unscaled", 0.0007, 0.0007),
    ],
)
def test_squared_error_of_gaussian_vectors(name, of_keys, of_values, x):
    keys, values = BY_NAME[name].layer(HEAD_DIM, 0).round_trip(x, x)
    assert error(keys, x) == pytest.approx(of_keys, rel=0.05)
    assert error(values, x) == pytest.approx(of_values, rel=0.05)


def test_a_step_sees_its_own_tokens_raw_and_earlier_ones_as_kept(x):
    layer = TokenLayer(lambda k, v: (k + 1, v + 2))
    layer.update(x[:, :, :16], x[:, :, :16])
    keys, values = layer.update(x[:, :, 16:32], x[:, :, 16:32])
    torch.testing.assert_close(keys, torch.cat((x[:, :, :16] + 1, x[:, :, 16:32]), 2))
    torch.testing.assert_close(values, torch.cat((x[:, :, :16] + 2, x[:, :, 16:32]), 2))


def test_kivi_keeps_its_newest_tokens_raw(x):
    layer = KiviLayer(2, residual=64)
    for start in range(0, 160, 16):
        keys, values = layer.update(*[x[:, :, start : start + 16]] * 2)
    wrong_keys, wrong_values = ((kept != x).any(-1).any(1).any(0) for kept in (keys, values))
    assert wrong_keys.tolist() == [True] * 128 + [False] * 32  # 144 earlier tokens: two full groups of 64
    assert wrong_values.tolist() == [True] * 80 + [False] * 80
    assert error(keys[:, :, :128], x[:, :, :128]) < 0.2


def test_kivi_has_four_levels_at_two_bits_for_each_channel_of_a_group(x):
    layer = KiviLayer(2, residual=32)
    layer.update(x[:, :, :32], x[:, :, :32])
    keys, _ = layer.update(x[:, :, 32:48], x[:, :, 32:48])
    assert len(keys[0, 0, :32, 5].unique()) <= 4


def test_polar_angles_are_coded_once_a_level_and_radii_are_kept(x):
    assert [len(book) for book in polar_codebooks()] == [16, 4, 4, 4]
    assert polar_bytes(HEAD_DIM) == 31  # 32 x 4 + 16 x 2 + 8 x 2 + 4 x 2 bits, and four radii of two bytes
    kept = polar(x)
    torch.testing.assert_close(kept.square().sum(-1), x.square().sum(-1), rtol=2e-3, atol=0)


def test_bytes_of_a_token():
    size = {name: rival.token_bytes(HEAD_DIM, 1024) for name, rival in BY_NAME.items()}
    assert size["none"] == 256 and size["fp8 e4m3, unscaled"] == 128
    assert size["TurboQuant paper, mse 4 bit"] == 68 and size["TurboQuant paper, QJL keys 4 bit"] == 70
    assert KiviLayer.token_bytes(4, 32, HEAD_DIM, 1 << 30) == pytest.approx(80)  # 4 bits and 1 for scale and zero
    assert KiviLayer.token_bytes(2, 32, HEAD_DIM, 64) == pytest.approx(48 + 0.75 * (128 - 24))


@pytest.mark.parametrize("eviction", EVICTIONS, ids=lambda e: e.name)
def test_budgets_keep_the_share_that_is_counted(eviction):
    budgets = eviction.budgets(512, 30)
    assert sum(budgets) / (30 * 512) == pytest.approx(eviction.kept, rel=0.01)
    assert (budgets[0] > budgets[-1]) == eviction.pyramid and min(budgets) > eviction.window


def test_what_the_last_tokens_look_at_is_kept():
    attention = torch.full((1, 6, 128, 128), 1e-3)
    attention[:, :2, -32:, 10] = 1.0  # the heads of the first KV head
    attention[:, 2:, -32:, 50] = 1.0
    kept = Eviction("e", 0.3, False).choose(attention, 3, 38)
    assert kept.shape == (1, 3, 38)
    assert {8, 9, 10, 11, 12} <= set(kept[0, 0].tolist()) and {48, 49, 50, 51, 52} <= set(kept[0, 2].tolist())
    assert set(range(96, 128)) <= set(kept[0, 1].tolist()) and kept[0].diff().min() > 0


def test_an_evicted_cache_has_the_kept_tokens_and_all_later_ones(x):
    kept = torch.tensor([[[0, 5], [1, 2], [3, 9]]] * 2)
    layer = EvictedLayer(x, x, kept)
    keys, _ = layer.update(x[:, :, :4], x[:, :, :4])
    torch.testing.assert_close(keys[:, 0], torch.cat((x[:, 0, [0, 5]], x[:, 0, :4]), 1))
    assert layer.get_seq_length() == 6
