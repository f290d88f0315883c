"""Training with probes attached is bitwise the training without them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import probes
from experiments.cell_transformer import CellTransformer, CellTransformerConfig
from tests.probes.models import inplace_cnn, transformer_encoder

STEPS = 20


class CellLoss(nn.Module):
    """The cell transformer with fixed genes and lengths, so that one tensor is its input."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.model = CellTransformer(CellTransformerConfig.preset("tiny", num_genes=40, attention=attention))

    def forward(self, values: Tensor) -> Tensor:
        genes = torch.arange(24).expand(3, 24)
        mask = torch.arange(24).expand(3, 24) % 4 == 0
        return self.model(genes, values, mask, torch.tensor([24, 17, 5]))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "TransformerEncoder": (transformer_encoder, (4, 10, 32)),
    "cell transformer, softmax": (lambda: CellLoss("softmax"), (3, 24)),
    "cell transformer, sigmoid": (lambda: CellLoss("sigmoid"), (3, 24)),
    "CNN with in-place ReLU": (inplace_cnn, (4, 3, 8, 8)),
}


def train(name: str, *, is_watched: bool) -> tuple[dict[str, Tensor], Tensor]:
    build, shape = MODELS[name]
    torch.manual_seed(1)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    probe = None
    if is_watched:
        has_attention = "CNN" not in name
        probe = probes.attach(
            model,
            optimizer,
            attention_every=3 if has_attention else None,
            layer_jacobian_every=7 if has_attention else 0,
            attention_rows=4,
        )
    for _ in range(STEPS):
        loss = model(torch.rand(shape)).square().mean()
        if probe is not None:
            probe.log(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if probe is not None:
        probe.close()
        assert max(record.step for record in probe.records) == STEPS - 1
    return model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error::probes.ProbeWarning")
def test_parameters_and_random_state_are_bitwise_equal_after_20_steps(name: str) -> None:
    bare, bare_rng = train(name, is_watched=False)
    watched, watched_rng = train(name, is_watched=True)
    assert bare.keys() == watched.keys()
    for key, tensor in bare.items():
        assert torch.equal(tensor, watched[key]), key
    assert torch.equal(bare_rng, watched_rng)


def test_attaching_leaves_nothing_on_the_model() -> None:
    model = transformer_encoder()
    keys = list(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with probes.attach(model) as probe:
        assert list(model.state_dict()) == keys
        for name, module in model.named_modules():
            assert set(vars(module)) == attributes[name]
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
        duplicate = copy.deepcopy(model)
        torch.save(model, io.BytesIO())
        duplicate(torch.rand(2, 5, 32)).sum().backward()
        assert not probe.attention_sites  # a copy is another model


def test_a_frozen_part_and_its_gradients_stay_as_they_are() -> None:
    model = transformer_encoder()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with probes.attach(model, optimizer) as probe:
        model(torch.rand(2, 5, 32)).sum().backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in model[0].parameters())
    assert {r.layer for r in probe.records if r.quantity == "grad_norm"} == {"1", "(all)"}
    assert any(r.quantity == "activation_rms" and r.layer == "0.layers.0" for r in probe.records)
