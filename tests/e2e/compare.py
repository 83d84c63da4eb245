"""Teacher-forced comparison of runs: how far apart are the log-probabilities of the same tokens?"""

from statistics import mean

from engine import Output


def distances(
    a: dict[str, Output], b: dict[str, Output], cancelled: set[str] = frozenset(), of: str = "logprobs"
) -> dict[str, float]:
    """Mean |difference of log-probability|, nats, of every request that finished in both runs with the same tokens.

    `of`: "logprobs", of the tokens decoded in both, or "prompt_logprobs".

    Raises AssertionError if a request of `a` that was not cancelled did not finish in `b`, and if the tokens of a
    request differ: then the runs were not teacher-forced alike.
    """
    assert a.keys() - b.keys() <= set(cancelled) and b.keys() <= a.keys(), sorted(a.keys() ^ b.keys())
    found = {}
    for i in a.keys() & b.keys():
        x, y = a[i], b[i]
        length = min(len(x.tokens), len(y.tokens))
        assert length and x.tokens[:length] == y.tokens[:length], i
        p, q = (o.prompt_logprobs if of == "prompt_logprobs" else o.logprobs[:length] for o in (x, y))
        found[i] = mean(abs(s - t) for s, t in zip(p, q, strict=True))
    return found


def worst(found: dict[str, float]) -> str:
    """For messages: the three requests that are farthest apart."""
    return ", ".join(f"{i}: {d:.4f}" for i, d in sorted(found.items(), key=lambda item: -item[1])[:3])
