"""The float64 oracle against torch's own attention."""

import math

import pytest
import torch

from tq_vllm.core.attention import attention_reference


@pytest.mark.parametrize(("query_len", "window"), [(9, 0), (3, 0), (9, 4), (1, 2)])
def test_equals_scaled_dot_product_attention(query_len, window):
    q = torch.randn(query_len, 6, 16, dtype=torch.float64)
    k, v = torch.randn(2, 9, 2, 16, dtype=torch.float64)
    mask = torch.ones(query_len, 9, dtype=torch.bool).tril(9 - query_len)
    if window:
        mask &= torch.ones(query_len, 9, dtype=torch.bool).triu(9 - query_len - window + 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    out, _ = attention_reference(q, [k], [v], torch.tensor([0, query_len]), 0.3, window)
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_sinks_and_cap_by_hand():
    """One query, two keys: scores 1 and 3, capped at 2 tanh(s / 2), beside a sink of 0.5."""
    q = torch.tensor([[[1.0, 0.0]]])
    k, v = torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    a, b = (math.exp(2 * math.tanh(s / 2)) for s in (1.0, 3.0))
    out, lse = attention_reference(
        q, [k], [v], torch.tensor([0, 1]), 1.0, logits_soft_cap=2.0, sinks=torch.tensor([0.5])
    )
    total = a + b + math.exp(0.5)
    torch.testing.assert_close(out[0, 0], torch.tensor([a / total, b / total], dtype=torch.float64))
    torch.testing.assert_close(lse[0, 0], torch.tensor(math.log(a + b), dtype=torch.float64))


def test_requests_do_not_see_each_other_and_padding_gets_nothing():
    q, k, v = torch.randn(5, 2, 8), torch.randn(7, 1, 8), torch.randn(7, 1, 8)
    out, lse = attention_reference(q, [k[:3], k[3:]], [v[:3], v[3:]], torch.tensor([0, 1, 3]), 1.0)
    alone, _ = attention_reference(q[1:3], [k[3:]], [v[3:]], torch.tensor([0, 2]), 1.0)
    torch.testing.assert_close(out[1:3], alone)
    assert (out[3:] == 0).all() and (lse[:, 3:] == -math.inf).all()
