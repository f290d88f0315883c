"""Which modules are blocks."""

from __future__ import annotations

from torch import nn

from probes.layers import activation_layers, outermost_blocks
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
