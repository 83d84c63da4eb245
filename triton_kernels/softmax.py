"""Scores to weights, shared by the kernels that attend. Scores and maxima are in base 2: score * log2(e)."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
NOTHING: tl.constexpr = tl.constexpr(-1.0e38)  # maximum of a row that has seen nothing; finite: differences are numbers


@triton.jit
def score_scale(softmax_scale, SOFT_CAP: tl.constexpr):
    """What turns a product of query and key into what `capped` takes: base 2 already where there is no cap."""
    if SOFT_CAP:
        return softmax_scale
    else:
        return softmax_scale * LOG2E


@triton.jit
def capped(scores, soft_cap):
    """Natural scores -> base 2, after soft_cap * tanh(score / soft_cap)."""
    return (soft_cap - 2.0 * soft_cap / (1.0 + tl.exp(scores * (2.0 / soft_cap)))) * LOG2E


@triton.jit
def visible(position, token, window, WINDOW: tl.constexpr):
    """Which tokens [BN] the rows at position [BM] see: bool [BM, BN]."""
    seen = token[None, :] <= position[:, None]
    if WINDOW:
        seen = seen & (token[None, :] > position[:, None] - window)
    return seen


@triton.jit
def online_softmax(scores, scale, maximum, total):
    """Take scores (scores * scale [BM], scale positive, is base 2; -inf: not seen) into maximum and total, f32 [BM].

    Scaling after the maximum makes it part of the exponent's multiply-add.

    Returns:
        weights f32 [BM, BN], the factor f32 [BM] that turns older sums into the new maximum's, new maximum, new total.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    factor = tl.exp2(maximum - new_maximum)
    weights = tl.exp2(scores * scale[:, None] - new_maximum[:, None])
    return weights, factor, new_maximum, total * factor + tl.sum(weights, 1)


@triton.jit
def finish(maximum, total, sink, SINKS: tl.constexpr):
    """Natural log of the sum of exponentials without the sink, -inf for a row that saw nothing; and the factor that
    turns the weighted sum of values into the output. sink: natural score [BM], or anything without SINKS."""
    lse = tl.where(total > 0, (maximum + tl.log2(total)) / LOG2E, float("-inf"))
    if SINKS:
        sink = sink * LOG2E
        new_maximum = tl.maximum(maximum, sink)
        factor = tl.exp2(maximum - new_maximum)
        factor = factor / (total * factor + tl.exp2(sink - new_maximum))
    else:
        factor = 1.0 / tl.where(total > 0, total, 1.0)
    return lse, tl.where(total > 0, factor, 0.0)
