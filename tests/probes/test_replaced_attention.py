"""Probes of models whose attention is replaced."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import probes
import stability

x = torch.randn(2, 5, 8)


def weights_by_hand(layer: nn.MultiheadAttention) -> Tensor:
    q, k, _ = (
        functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
        .unflatten(-1, (3, 2, 4))
        .permute(2, 0, 3, 1, 4)
    )
    return torch.sigmoid(q @ k.mT / 2 - torch.tensor(5.0).log())


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("probe_first", [False, True])
def test_statistics_are_those_of_sigmoid_attention(probe_first: bool, need_weights: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    with ExitStack() as stack:
        if not probe_first:
            replaced = stack.enter_context(stability.replace_attention(layer))
        probe = stack.enter_context(probes.attach(layer, attention_every=1, attention_rows=None))
        if probe_first:
            replaced = stack.enter_context(stability.replace_attention(layer))
        layer(x, x, x, need_weights=need_weights)[0].sum().backward()
        probe.step()
    [site] = probe.attention_sites
    assert (site.mechanism, site.num_heads, site.unseen) == ("sigmoid", 2, None)
    assert len(replaced.sites) == 1
    recorded = {(r.quantity, r.head): r.value for r in probe.records}
    row_sums = weights_by_hand(layer).sum(-1).mean((0, 2))
    for head in range(2):
        assert recorded["attention/row_sum", head] == pytest.approx(row_sums[head].item(), rel=1e-5)


def test_a_probe_that_has_seen_softmax_says_what_it_sees_now() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    with probes.attach(layer, attention_every=1) as probe:
        layer(x, x, x, need_weights=False)[0].sum().backward()
        probe.step()
        assert [site.mechanism for site in probe.attention_sites] == ["softmax"]
        with stability.replace_attention(layer):
            layer(x, x, x, need_weights=False)[0].sum().backward()
            probe.step()
        assert [site.mechanism for site in probe.attention_sites] == ["sigmoid"]
