"""What a notebook shows of a probe."""

from __future__ import annotations

import math

import torch

import probes
from probes.attention_sites import AttentionSite, AttentionSites
from tests.probes.models import transformer_encoder


def test_a_probe_is_shown_with_what_it_has_seen() -> None:
    model = transformer_encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, on_divergence="ignore") as probe:
        for step in range(3):
            x = torch.randn(2, 5, 32) * (math.nan if step == 2 else 1.0)
            model(x).square().mean().backward()
            optimizer.step()
        assert "<td>attached</td>" in probe._repr_html_()
    page = probe._repr_html_()
    for words in ("<td>closed</td>", "<td>3</td>", "2 seen, 0 not", "<td>non-finite</td>"):
        assert words in page
    sites = probe.attention_sites
    assert sites._repr_html_().count("<tr>") == 3
    assert "2 × 4 × 5 × 8" in sites._repr_html_()


def test_attention_that_is_not_seen_is_shown_with_its_reason() -> None:
    page = AttentionSites([AttentionSite("a", 0, "torch.softmax", unseen="its <softmax>")])._repr_html_()
    assert "<code>a</code>" in page
    assert "its &lt;softmax&gt;" in page
