from __future__ import annotations

import json

import pytest
import torch

import probes
from experiments.collective_scaling import KINDS, MODELS, Shape, main, slots
from experiments.token_transformer import TokenTransformer, TokenTransformerConfig
from probes.layout import slots_of


def test_slots_are_counted_as_a_probe_measures_them(monkeypatch):
    counts = []
    monkeypatch.setattr(
        "probes.delivery.Delivery.send",
        lambda self, step, pending, **options: counts.append(len(slots_of(pending))),
    )
    model = TokenTransformer(TokenTransformerConfig(16, 128, 8, num_layers=2, num_heads=4))
    optimizer = torch.optim.AdamW(model.parameters())
    with probes.attach(model, optimizer, activations_every=2, attention_every=2, details_every=4) as probe:
        for _ in range(4):
            loss = model(torch.arange(100)[None] % 16).square().mean()
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
    every_200th, every_step, every_10th, _ = counts
    shape = MODELS["160M"]._replace(blocks=2, heads=4)
    # In one process there are no first gradient, and no slot that says whether there is more.
    assert slots(shape) == dict(zip(KINDS, (every_step + 2, every_10th + 2, every_200th + 2), strict=True))
    assert shape == Shape(2, 4, 8, 4, 2)


def test_it_writes_its_table(tmp_path, capsys):
    assert main(["--models", "160M", "--ranks", "2", "1000", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "collective_scaling.json").read_text())
    assert [row["slots"] for row in written["rows"][:3]] == list(slots(MODELS["160M"]).values())
    assert written["rows"][0]["bytes_of_all"] == pytest.approx(2 * 16 * written["rows"][0]["slots"])
    assert "JSON lines" in capsys.readouterr().out
