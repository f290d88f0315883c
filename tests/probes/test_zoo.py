"""Many architectures: training is the same with and without probes, and every attention is found."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probes
import stability
from tests.probes.test_lifecycle import assert_nothing_is_left
from tests.probes.zoo.architectures import (
    ARCHITECTURES,
    SDPA,
    SOFTMAX,
    TORCH_ARCHITECTURES,
    Architecture,
    TorchArchitecture,
)

pytest.importorskip("transformers", reason="the test extra installs transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


ZOO = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")


# Of the models with an "sdpa" implementation, one does not use transformers' attention interface.
FALCON = ("Falcon", "eager")


def document_row(architecture: Architecture | TorchArchitecture, num_seen: int) -> str:
    """How a line of the table in docs/zoo.md begins."""
    num_sites = architecture.sites(getattr(architecture.build("eager"), "config", None))
    implementations = ", ".join(architecture.implementations)
    return f"| {architecture.family} | {architecture.name} | {implementations} | {num_sites} | {num_seen} |"


def cases(*, with_weights: bool = False) -> list[Any]:
    return [
        pytest.param(
            architecture,
            implementation,
            id=f"{architecture.name}-{implementation}",
            marks=[pytest.mark.slow] * (architecture.slow or number > 0),
        )
        for architecture in [*TORCH_ARCHITECTURES, *ARCHITECTURES]
        for number, implementation in enumerate(architecture.implementations)
        if not with_weights or implementation in architecture.weights
    ]


def train(
    model: nn.Module, batches: list[dict[str, Tensor]], *, watched: bool, attention_every: int | None = None
) -> tuple[list[Tensor], probes.Probe | None]:
    """Losses and gradients of five steps of AdamW, dropout included."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    periods = {"activations_every": 1, "details_every": 1, "attention_every": attention_every}
    probe = probes.attach(model, optimizer, **periods) if watched else None
    trace = []
    for batch in batches:
        loss = model(**batch)[0].square().mean()
        loss.backward()
        trace += [loss.detach()]
        trace += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    if probe is not None:
        probe.close()
        assert_nothing_is_left(model, optimizer)
        assert "softmax" not in vars(torch.Tensor)
    return [*trace, torch.rand(())], probe


@pytest.mark.parametrize(("architecture", "implementation"), cases())
def test_training_is_untouched_and_every_attention_is_found(
    architecture: Architecture | TorchArchitecture, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reformer asks for a new random seed in every forward pass.
    monkeypatch.setattr(torch, "seed", lambda: 1)
    model = architecture.build(implementation).train()
    batches = [architecture.batch() for _ in range(5)]
    expected_sites = architecture.sites(getattr(model, "config", None))
    twin = copy.deepcopy(model)
    expected, _ = train(twin, batches, watched=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A number asks for attention, and asking where none can be seen is an error.
        every = None if architecture.unseen or expected_sites == 0 else 1
        trace, probe = train(model, batches, watched=True, attention_every=every)
    assert len(trace) == len(expected)
    assert all(map(torch.equal, trace, expected))
    assert not any(tensor.isnan().any() for tensor in expected)

    assert probe is not None
    sites = probe.attention_sites
    assert len(sites) == expected_sites
    complaints = [str(w.message) for w in caught if issubclass(w.category, probes.ProbeWarning)]
    if architecture.unseen:
        assert all(site.unseen for site in sites)
        assert len(complaints) == len(sites)
        assert document_row(architecture, 0) in ZOO
    else:
        assert {site.kind for site in sites} <= {
            SOFTMAX if implementation == "eager" else SDPA,
            *architecture.also,
        }
        assert not any(site.unseen for site in sites)
        assert complaints == []
        assert document_row(architecture, len(sites)) in ZOO
        measured = {(r.layer, r.call) for r in probe.records if r.quantity == "attention/entropy"}
        assert measured == {(site.layer, site.call) for site in sites}


@pytest.mark.slow  # transformers compiles the block masks
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_transformers_flex_attention_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool, **kwargs: Any) -> Tensor:
        # FlexAttention has no backward pass on the CPU.
        return flex_attention(query.detach(), key.detach(), value.detach(), **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    eager = architecture.build("eager").eval()
    model = architecture.build("flex_attention").eval()
    model.load_state_dict(eager.state_dict())
    check_statistics(model, eager, architecture.batch(), "transformers.integrations.flex_attention")


@pytest.mark.parametrize(("architecture", "implementation"), cases())
def test_every_attention_is_rerouted_or_refused(
    architecture: Architecture | TorchArchitecture, implementation: str
) -> None:
    model, batch = architecture.build(implementation).eval(), architecture.batch()
    num_sites = architecture.sites(getattr(model, "config", None))
    expected = model(**batch)[0]
    if num_sites and (
        "sdpa" not in architecture.implementations or (architecture.name, implementation) == FALCON
    ):
        with pytest.raises(NotImplementedError, match="cannot be rerouted"):
            with stability.replace_attention(model):
                model(**batch)
    else:
        with stability.replace_attention(model) as replaced:
            output = model(**batch)[0]
        assert sum(site.calls for site in replaced.sites) == num_sites
        assert torch.equal(output, expected) == (num_sites == 0)
    assert torch.equal(model(**batch)[0], expected)


def dense_weights(output: Any) -> list[Tensor]:
    """The model's own attention weights, in the order of its calls."""
    if "decoder_attentions" in output:
        decoder = zip(output.decoder_attentions, output.cross_attentions, strict=True)
        return [*output.encoder_attentions, *(weights for pair in decoder for weights in pair)]
    return list(output.attentions)


def mean(rows: Tensor, is_row: Tensor) -> Tensor:
    return (rows * is_row).sum((0, 2)) / is_row.sum((0, 2))


@pytest.mark.parametrize(("architecture", "implementation"), cases(with_weights=True))
def test_statistics_are_those_of_the_models_own_weights(
    architecture: Architecture, implementation: str
) -> None:
    model = architecture.build(implementation).eval()
    eager = architecture.build("eager").eval()
    eager.load_state_dict(model.state_dict())
    check_statistics(model, eager, architecture.batch(), "torch")


def check_statistics(model: nn.Module, eager: nn.Module, batch: dict[str, Tensor], kind: str) -> None:
    """What a probe records of one model is what follows from the weights of its eager twin."""
    with torch.no_grad():
        weights = dense_weights(eager(**batch, output_attentions=True))
    with probes.attach(model, attention_every=1, attention_rows=None) as probe:
        model(**batch)
        probe.step()
    sites = probe.attention_sites
    assert len(weights) == len(sites)
    recorded = {(r.layer, r.call, r.quantity, r.head): r.value for r in probe.records}
    for site, p in zip(sites, weights, strict=True):
        assert site.kind.startswith(kind)
        assert site.num_heads == p.shape[1]
        p = p.double()
        # Padding that may look at nothing: the model's softmax makes it uniform, the probe leaves it out.
        is_row = (p.amax(-1) > p.amin(-1)) | ("attention_mask" not in batch)
        square = p.square().sum(-1)
        frobenius = (square - 2 * p.pow(3).sum(-1) + square**2).clamp(min=0).sqrt()
        quantities = {
            "entropy": mean(torch.special.entr(p).sum(-1), is_row),
            "jacobian_frobenius": mean(frobenius, is_row),
            "derivative_max": ((p * (1 - p)).amax(-1) * is_row).amax((0, 2)),
        }
        for quantity, per_head in quantities.items():
            measured = [
                recorded[site.layer, site.call, f"attention/{quantity}", h] for h in range(p.shape[1])
            ]
            torch.testing.assert_close(
                torch.tensor(measured, dtype=torch.float64), per_head, rtol=1e-4, atol=1e-7
            )
