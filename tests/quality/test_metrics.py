"""Distances between distributions, against the exact ones; tasks, gate and rows without an engine."""

import numpy as np
import pytest

from tq_vllm.quality.metrics import Distributions, compare_text, divergence_point, kl_divergence

VOCAB, POSITIONS = 300, 40


def top(logits: np.ndarray, target: np.ndarray, k: int) -> Distributions:
    """What a worker keeps of logits [N, VOCAB] f64."""
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logprobs, 1)[:, :k].astype(np.int32)
    rows = np.arange(len(target))
    return Distributions(ids, np.take_along_axis(logprobs, ids, 1), target, logprobs[rows, target])


@pytest.fixture(scope="module")
def pair():
    """Logits of two runs, the second a little off, and the tokens that came."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((POSITIONS, VOCAB))
    return logits, logits + 0.3 * rng.standard_normal(logits.shape), rng.integers(0, VOCAB, POSITIONS).astype(np.int32)


def exact_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(1)


def test_kl_over_the_whole_vocabulary_is_exact(pair):
    p, q, target = pair
    found = kl_divergence(top(p, target, VOCAB), top(q, target, VOCAB), VOCAB)
    np.testing.assert_allclose(found, exact_kl(p, q), atol=1e-9)
    assert found.mean() > 0.01


def test_kl_of_the_likeliest_tokens_is_a_lower_bound_that_grows_with_k(pair):
    p, q, target = pair
    exact = exact_kl(p, q)
    means = []
    for k in (1, 5, 50, 299):
        found = kl_divergence(top(p, target, k), top(q, target, k), VOCAB)
        assert (found <= exact + 1e-9).all()
        means.append(found.mean())
    assert means == sorted(means) and means[0] > 0
    assert means[-1] == pytest.approx(exact.mean(), rel=0.01)


def test_kl_of_a_run_to_itself_is_zero(pair):
    p, _, target = pair
    assert kl_divergence(top(p, target, 7), top(p, target, 7), VOCAB).max() == 0


def test_runs_over_different_tokens_are_refused(pair):
    p, q, target = pair
    with pytest.raises(ValueError, match="different tokens"):
        kl_divergence(top(p, target, 5), top(q, (target + 1) % VOCAB, 5), VOCAB)


def test_figures_of_text(pair):
    p, q, target = pair
    row = compare_text(top(p, target, 50), top(q, target, 50), VOCAB)
    rows = np.arange(POSITIONS)
    logprobs = q - np.log(np.exp(q).sum(1, keepdims=True))
    assert row["perplexity"] == pytest.approx(np.exp(-logprobs[rows, target].mean()))
    assert row["top1"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean()) and row["top1"] < 1
    assert row["kl_p99"] > row["kl_mean"] > 0


def test_divergence_point():
    assert divergence_point([1, 2, 3], [1, 2, 3]) == 3
    assert divergence_point([1, 2, 3], [1, 9, 3]) == 1
