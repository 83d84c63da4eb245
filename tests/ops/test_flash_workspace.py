"""The bound on what a prefill puts into its buffer, against the layout that the device plans (dequantize.prefixes)."""

from hypothesis import given
from hypothesis import strategies as st

from tq_vllm.format import SEGMENT_TOKENS
from tq_vllm.ops.flash_workspace import line_tokens

REQUESTS = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 900)), min_size=1, max_size=6)


@given(REQUESTS, st.integers(0, 3000))
def test_line_tokens_bounds_the_line(requests, window):
    line = 0
    for context, query_len in requests:
        first = max(context - window + 1, 0) // SEGMENT_TOKENS * SEGMENT_TOKENS if window else 0
        line += context - first + query_len
    num_tokens = sum(query_len for _, query_len in requests)
    total = num_tokens + sum(context for context, _ in requests)
    bound = line_tokens(len(requests), num_tokens, total, window)
    assert line <= bound <= total
