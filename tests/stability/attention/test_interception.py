from __future__ import annotations

import pytest
import torch
from torch import nn

import stability
from stability.attention import AttentionCall
from stability.attention.interception import observe_attention


def test_every_way_to_attention_is_seen_with_its_arguments() -> None:
    calls: list[AttentionCall] = []
    q = torch.rand(2, 4, 5, 8)
    k = torch.rand(2, 2, 7, 8)
    mask = torch.ones(5, 7, dtype=torch.bool)
    with observe_attention(calls.append):
        nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=0.3, enable_gqa=True)
        nn.functional.scaled_dot_product_attention(q, q, q, None, 0.0, True)
        stability.softmax_attention(q, q, q, key_lengths=[5, 3])
        stability.sigmoid_attention(q, q, q, bias=-1.0)
        nn.MultiheadAttention(8, 2, batch_first=True)(q[0], q[0], q[0], need_weights=False)
    assert [call.mechanism for call in calls] == ["softmax"] * 3 + ["sigmoid", "softmax"]
    assert calls[0].attn_mask is mask
    assert (calls[0].scale, calls[0].enable_gqa) == (0.3, True)
    assert calls[1].is_causal
    assert calls[2].key_lengths is not None
    assert calls[3].bias == -1.0
    assert calls[4].query.shape == (4, 2, 5, 4)


def test_other_ranks_are_brought_to_four_dimensions() -> None:
    calls: list[AttentionCall] = []
    with observe_attention(calls.append):
        for shape in ((5, 8), (3, 5, 8), (2, 3, 4, 5, 8)):
            x = torch.rand(shape)
            nn.functional.scaled_dot_product_attention(x, x, x)
    assert [tuple(call.query.shape) for call in calls] == [(1, 1, 5, 8), (3, 1, 5, 8), (6, 4, 5, 8)]


def test_results_are_untouched_and_the_original_returns() -> None:
    original = nn.functional.scaled_dot_product_attention
    q = torch.rand(1, 2, 3, 4)
    expected = original(q, q, q)
    with observe_attention(lambda call: None), observe_attention(lambda call: None):
        assert torch.equal(nn.functional.scaled_dot_product_attention(q, q, q), expected)
    assert nn.functional.scaled_dot_product_attention is original
    with pytest.raises(KeyError), observe_attention(lambda call: None):
        raise KeyError
    assert nn.functional.scaled_dot_product_attention is original


def test_a_patch_made_meanwhile_by_others_stays_and_reports_nothing_twice() -> None:
    original = nn.functional.scaled_dot_product_attention
    q = torch.rand(1, 2, 3, 4)
    calls: list[AttentionCall] = []
    try:
        with observe_attention(calls.append):
            ours = nn.functional.scaled_dot_product_attention

            def theirs(*args: torch.Tensor) -> torch.Tensor:
                return ours(*args)

            nn.functional.scaled_dot_product_attention = theirs
        assert nn.functional.scaled_dot_product_attention is theirs
        nn.functional.scaled_dot_product_attention(q, q, q)
        assert calls == []
        with observe_attention(calls.append):
            nn.functional.scaled_dot_product_attention(q, q, q)
        assert len(calls) == 1
    finally:
        nn.functional.scaled_dot_product_attention = original
