"""Distances between the next-token distributions of two runs over the same tokens.

The Kullback-Leibler divergence KL(reference || run), nats, is computed on the tokens that are among the k most likely
of both runs, the actual next token, and one further event: any other token. Merging tokens never raises a KL
divergence, so the figure is a lower bound, exact where k is the vocabulary (docs/quality.md: the gap for the default).
"""

from dataclasses import dataclass

import numpy as np

TINY = 1e-12  # least probability of "any other token": below float32 noise of a sum over the vocabulary


@dataclass
class Distributions:
    """The k most likely next tokens at N positions of a run, and the token that came."""

    ids: np.ndarray  # [N, k] int32, most likely first
    logprobs: np.ndarray  # [N, k] f32, nats
    target: np.ndarray  # [N] int32
    target_logprob: np.ndarray  # [N] f32

    def perplexity(self) -> float:
        """exp of the mean negative log-probability of the targets."""
        return float(np.exp(-self.target_logprob.astype(np.float64).mean()))


def kl_divergence(reference: Distributions, run: Distributions, vocab_size: int) -> np.ndarray:
    """KL(reference || run) of every position, f64 [N], nats, estimated as the module says.

    Raises:
        ValueError: the two runs did not read the same tokens.
    """
    if not np.array_equal(reference.target, run.target):
        raise ValueError("two runs over different tokens can't be compared: use the same model, size and text.")
    return np.array([_kl(reference, run, i, vocab_size) for i in range(len(run.target))])


def _kl(reference: Distributions, run: Distributions, i: int, vocab_size: int) -> float:
    _, at_p, at_q = np.intersect1d(reference.ids[i], run.ids[i], return_indices=True, assume_unique=True)
    p, q = reference.logprobs[i][at_p].astype(np.float64), run.logprobs[i][at_q].astype(np.float64)
    if reference.target[i] not in reference.ids[i][at_p]:
        p, q = np.append(p, reference.target_logprob[i]), np.append(q, run.target_logprob[i])
    kl = float(np.sum(np.exp(p) * (p - q)))
    if len(p) < vocab_size:
        other_p, other_q = (max(1 - np.exp(x).sum(), TINY) for x in (p, q))
        kl += other_p * np.log(other_p / other_q)
    return max(kl, 0.0)


def compare_text(reference: Distributions, run: Distributions, vocab_size: int) -> dict[str, float]:
    """Figures of a run over text: perplexity, KL mean and 99th percentile (nats), top-1 agreement (0 to 1)."""
    kl = kl_divergence(reference, run, vocab_size)
    return {
        "perplexity": run.perplexity(),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.percentile(kl, 99)),
        "top1": float((reference.ids[:, 0] == run.ids[:, 0]).mean()),
        "positions": len(kl),
    }


def divergence_point(reference: list[int], run: list[int]) -> int:
    """Index of the first token in which two continuations differ; their length if none does."""
    return next((i for i, (a, b) in enumerate(zip(reference, run, strict=True)) if a != b), len(reference))
