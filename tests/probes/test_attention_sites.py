"""Which attention a probe lists, and what it says of attention it cannot see."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import probes
from stability.attention import report_attention
from tests.probes.models import SelfAttention, transformer_encoder

by_name = nn.functional.scaled_dot_product_attention


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / 8**0.5).softmax(-1) @ value


def in_matrices(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    return (torch.bmm(query, key.mT).softmax(-1) @ value).unflatten(0, (-1, 2))


def reported(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    report_attention(query, key, mechanism="sigmoid", bias=-1.0)
    return torch.sigmoid(query @ key.mT / 8**0.5 - 1.0) @ value


def reported_and_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    report_attention(query, key)
    return by_hand(query, key, value)


def wrongly_reported(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    report_attention(query[0], key)
    return torch.relu(query @ key.mT) @ value


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.exp() @ (key.exp().mT @ value)


def sites_of(model: nn.Module, *args: Any) -> tuple[probes.Probe, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with probes.attach(model, attention_every=1) as probe:
            for _ in range(2):
                model(*args).sum().backward()
                probe.step()
    return probe, [str(w.message) for w in caught if issubclass(w.category, probes.ProbeWarning)]


@pytest.mark.parametrize(
    ("attention", "kind", "mechanism", "heads"),
    [
        (by_name, "torch.nn.functional.scaled_dot_product_attention", "softmax", 2),
        (by_hand, "torch.softmax", "softmax", 2),
        (in_matrices, "torch.softmax", "softmax", 1),
        (reported, "stability.attention.report_attention", "sigmoid", 2),
        (reported_and_softmax, "stability.attention.report_attention", "softmax", 2),
    ],
)
def test_attention_is_listed_once_and_measured(
    attention: Callable[..., Tensor], kind: str, mechanism: str, heads: int
) -> None:
    if attention is by_name:  # looked up in this module, as a model's own code does
        attention = lambda *args: by_name(*args)  # noqa: E731
    probe, complaints = sites_of(SelfAttention(attention), torch.rand(2, 3, 16))
    (site,) = probe.attention_sites
    assert (site.layer, site.call, site.kind, site.mechanism) == ("(root)", 0, kind, mechanism)
    assert (site.num_heads, site.unseen) == (heads, None)
    assert complaints == []
    assert len([r for r in probe.records if r.quantity == "attention/entropy" and r.head is None]) == 2


@pytest.mark.parametrize(
    ("attention", "kind", "reason"),
    [
        (wrongly_reported, "stability.attention.report_attention", "cannot be read"),
        (linear_attention, "SelfAttention", "no attention call that is known"),
    ],
)
def test_what_is_not_seen_is_said_once(attention: Callable[..., Tensor], kind: str, reason: str) -> None:
    model = SelfAttention(attention)
    with pytest.warns(probes.ProbeWarning, match=reason) as caught:
        with probes.attach(model) as probe:
            for _ in range(3):
                model(torch.rand(2, 3, 16)).sum().backward()
                probe.step()
    assert len(caught) == 1
    (site,) = probe.attention_sites
    assert (site.kind, site.mechanism, site.query_shape) == (kind, None, None)
    assert reason in (site.unseen or "")


def test_a_frozen_encoder_in_evaluation_mode_is_unseen_and_says_what_to_do() -> None:
    model = transformer_encoder()
    model[0].eval().requires_grad_(False)
    with pytest.warns(probes.ProbeWarning, match="set_fastpath_enabled"):
        with probes.attach(model) as probe:
            model(torch.rand(1, 4, 32)).sum().backward()
            probe.step()
    assert [site.layer for site in probe.attention_sites] == ["0.layers.0", "0.layers.1"]
    assert {site.kind for site in probe.attention_sites} == {"torch._transformer_encoder_layer_fwd"}


def test_asking_for_attention_that_is_unseen_is_an_error() -> None:
    model = SelfAttention(linear_attention)
    with pytest.warns(probes.ProbeWarning), probes.attach(model, attention_every=1) as probe:
        model(torch.rand(1, 3, 16)).sum().backward()
        with pytest.raises(ValueError, match="report_attention"):
            probe.step()


def test_attention_over_an_empty_batch_is_seen() -> None:
    # One of several ranks may have no samples where attention is due; it must not stop alone.
    model = SelfAttention(lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, attention_every=1) as probe:
        model(torch.ones(0, 4, 16)).sum().backward()
        optimizer.step()
    assert len(probe.attention_sites) == 1
    assert not any(record.quantity.startswith("attention/") for record in probe.records)


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_with_weights_has_its_heads(training: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=True)[0]

    model = Model().train(training)
    x = torch.rand(2, 3, 16)
    probe, _ = sites_of(model, x)
    (site,) = probe.attention_sites
    assert (site.layer, site.kind, site.query_shape) == ("attention", "torch.softmax", (2, 4, 3, 0))
    _, weights = model.attention(x, x, x, average_attn_weights=False)
    entropy = torch.special.entr(weights).sum(-1).mean().item()
    recorded = [r.value for r in probe.records if r.quantity == "attention/entropy" and r.head is None]
    assert recorded == pytest.approx([entropy] * 2, rel=1e-5)


def test_softmax_of_routers_and_classifiers_is_no_attention() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.Softmax(dim=-1))
    with probes.attach(model) as probe:
        model(torch.rand(2, 3, 16)).sum().backward()
        probe.step()
    assert probe.attention_sites == []


def test_a_softmax_module_belongs_to_the_layer_around_it() -> None:
    class Attend(SelfAttention):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: self.softmax(q @ k.mT) @ v)
            self.softmax = nn.Softmax(dim=-1)

    probe, _ = sites_of(nn.Sequential(Attend()), torch.rand(2, 3, 16))
    assert [site.layer for site in probe.attention_sites] == ["0"]


def test_measuring_a_layer_jacobian_adds_no_site() -> None:
    model = transformer_encoder()
    with probes.attach(model, attention_every=1, layer_jacobian_every=1) as probe:
        model(torch.rand(1, 4, 32)).sum().backward()
        probe.step()
    assert [site.call for site in probe.attention_sites] == [0, 0]


def test_flex_attention_is_seen_through_its_score_function() -> None:
    def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # FlexAttention has no backward pass on the CPU.
        return flex_attention(*(x.detach() for x in (query, key, value)), score_mod=_twice) + query

    probe, complaints = sites_of(SelfAttention(flex), torch.rand(2, 3, 16))
    (site,) = probe.attention_sites
    assert site.kind == "torch.nn.attention.flex_attention.flex_attention"
    assert complaints == []


def _twice(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return score * 2
