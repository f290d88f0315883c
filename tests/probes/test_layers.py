"""Which modules are blocks, and where layers stand."""

from __future__ import annotations

import torch
from torch import nn

import probes
from probes.layers import activation_layers, forward_place, outermost_blocks
from stability.module_calls import layer_names


def names_of(model: nn.Module) -> set[str]:
    names = layer_names(model)
    return {names[module] for module in outermost_blocks(model)}


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 1, 4)  # holds no container


def test_elements_of_a_list_are_blocks_and_what_stands_beside_it_is_not() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 4), "blocks": nn.ModuleList([block(), block()])})
    assert names_of(model) == {"blocks.0", "blocks.1"}


def test_containers_of_containers_are_looked_into_and_blocks_are_not() -> None:
    inner = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
    model = nn.Sequential(nn.Sequential(inner, block()), nn.Linear(4, 1))
    assert names_of(model) == {"0.0", "0.1", "1"}


def test_without_containers_the_children_are_blocks_and_without_children_the_model_is() -> None:
    assert names_of(block()) >= {"self_attn", "linear1"}
    assert names_of(nn.Linear(1, 1)) == {"(root)"}


def test_activations_are_those_of_parameters_and_of_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ModuleDict({"inner": nn.Linear(4, 1)}))
    names = layer_names(model)
    assert activation_layers(names, set(names.values())) == {"0", "1", "2.inner"}
    assert activation_layers(names, {"0"}) == {"0"}


def test_a_layer_that_is_never_called_stands_in_the_module_around_it() -> None:
    place_of = {"embedding": 0, "blocks.0.attention": 1, "blocks.0": 2, "head": 3}
    assert forward_place("blocks.0.attention.output", place_of) == 0.5
    assert forward_place("blocks.0.mlp.hidden", place_of) == 1.5
    assert forward_place("head", place_of) == 3
    assert forward_place("blocks.0.attention/call_1", place_of) == 1
    assert forward_place("codebook", place_of) == -1


def test_a_nan_batch_is_told_of_the_first_layer_that_is_called() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=8, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, num_layers=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with probes.attach(model, optimizer, activations_every=1, on_divergence="ignore") as probe:
        for step in range(4):
            x = torch.randn(2, 3, 8) if step < 3 else torch.full((2, 3, 8), torch.nan)
            loss = model(x).square().mean()
            probe.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [alert.layer for alert in probe.alerts] == ["0"]
