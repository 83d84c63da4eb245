"""Which part of which request a program of the split kernel reads: decided on the device, from seq_lens."""

import triton
import triton.language as tl

MIN_TILES: tl.constexpr = tl.constexpr(2)  # of a split: below that its start and its merge cost more than its tiles


@triton.jit
def plan_requests(seq_lens, query_start_loc, num_reqs, programs, window,
                  REQS: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Cut the tiles of all requests into about `programs` equal splits, none over two requests.

    Returns:
        int32 [REQS] each: first tile a request needs, its tiles, its splits, the number of splits up to and with it.
        At most programs + num_reqs splits in all.
    """
    request = tl.arange(0, REQS)
    real = request < num_reqs
    seq_len = tl.load(seq_lens + request, mask=real, other=0)
    query_len = tl.load(query_start_loc + request + 1, mask=real, other=0)
    query_len -= tl.load(query_start_loc + request, mask=real, other=0)
    first = tl.zeros([REQS], tl.int32)
    if WINDOW:
        first = tl.maximum(seq_len - query_len - window + 1, 0) // BN
    tiles = tl.where(query_len > 0, tl.cdiv(seq_len, BN) - first, 0)
    per_split = tl.maximum(tl.cdiv(tl.sum(tiles, 0), programs), MIN_TILES)
    splits = tl.cdiv(tiles, per_split)
    return first, tiles, splits, tl.cumsum(splits, 0)


@triton.jit
def _at(values, index, REQS: tl.constexpr):
    """values[index] of int32 [REQS]."""
    return tl.sum(tl.where(tl.arange(0, REQS) == index, values, 0), 0)


@triton.jit
def splits_of(request, seq_lens, query_start_loc, num_reqs, programs, window,
              REQS: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """First split and number of splits of a request."""
    _, _, splits, ends = plan_requests(seq_lens, query_start_loc, num_reqs, programs, window, REQS, BN, WINDOW)
    count = _at(splits, request, REQS)
    return _at(ends, request, REQS) - count, count


@triton.jit
def tiles_of(item, seq_lens, query_start_loc, num_reqs, programs, window,
             REQS: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Request of split `item`, num_reqs or more if there is none; its first tile, and one past its last."""
    first, tiles, splits, ends = plan_requests(
        seq_lens, query_start_loc, num_reqs, programs, window, REQS, BN, WINDOW
    )
    request = tl.sum((ends <= item).to(tl.int32), 0)
    count = tl.maximum(_at(splits, request, REQS), 1)
    split = item - (_at(ends, request, REQS) - count)
    tiles = _at(tiles, request, REQS)
    first = _at(first, request, REQS)
    each = tl.cdiv(tiles, count)
    return request, first + split * each, first + tl.minimum(split * each + each, tiles)
