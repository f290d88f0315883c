"""Which layers a pattern selects, and which of them parameters and activations belong to."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

_CONTAINERS = (nn.ModuleList, nn.Sequential)


def select_layers(names: Iterable[str], patterns: str | Sequence[str]) -> set[str]:
    """Layer names that match at least one shell-style pattern.

    Args:
        names: Candidates, in model order.
        patterns: One pattern or several, as in :mod:`fnmatch`; "*" matches dots too.

    Raises:
        TypeError: If a pattern is not a string.
        ValueError: If one of them matches nothing; names examples of what there is.
    """
    candidates = list(names)
    wanted = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(wanted, Iterable) or not all(isinstance(pattern, str) for pattern in wanted):
        raise TypeError(f"`layers` must be a pattern or a sequence of patterns (strings); got {patterns!r}.")
    matched = {p: {name for name in candidates if fnmatch.fnmatchcase(name, p)} for p in wanted}
    idle = [pattern for pattern, names_of_pattern in matched.items() if not names_of_pattern]
    if idle or not matched:
        examples = ", ".join(candidates[:8])
        raise ValueError(
            f"`layers` must match at least one module name, and so must each of several patterns; "
            f"{', '.join(map(repr, idle)) or repr(patterns)} matches none of the model's {len(candidates)}. "
            f"The first are: {examples}."
        )
    return set().union(*matched.values())


def parameter_layers(names: dict[nn.Module, str]) -> dict[Tensor, str]:
    """Layer of every parameter, frozen ones too (they may thaw); a shared one goes to its first owner."""
    layer_of: dict[Tensor, str] = {}
    for module, name in names.items():
        for parameter in module.parameters(recurse=False):
            layer_of.setdefault(parameter, name)
    return layer_of


def activation_layers(names: dict[nn.Module, str], selected: set[str]) -> set[str]:
    """Layers whose outputs are watched: those with parameters of their own, and blocks.

    A block is an element of an ``nn.ModuleList`` or ``nn.Sequential``: the residual stream between blocks is
    where an exploding or vanishing gradient can be followed from layer to layer.
    """
    blocks = {child for module in names if isinstance(module, _CONTAINERS) for child in module.children()}
    return {
        name
        for module, name in names.items()
        if name in selected
        and (module in blocks or next(module.parameters(recurse=False), None) is not None)
        and not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    }


def outermost_blocks(model: nn.Module) -> set[nn.Module]:
    """Blocks that lie in no other block, few enough to be looked at in every step.

    Of a model without blocks these are its children, and of one without children the model itself.
    """
    return _blocks_in(model) or set(model.children()) or {model}


def _blocks_in(module: nn.Module) -> set[nn.Module]:
    blocks: set[nn.Module] = set()
    for child in module.children():
        # A container of containers (the stages of a convolutional network) is looked into.
        if isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS):
            blocks.add(child)
        else:
            blocks |= _blocks_in(child)
    return blocks


def forward_place(layer: str, place_of: Mapping[str, int]) -> float:
    """Where a layer stands in the forward pass.

    A layer that is never called as a module (the output projection of ``nn.MultiheadAttention``) stands right
    before the end of the nearest module around it that is called; without one, before all.

    Args:
        layer: Its name.
        place_of: Places of the layers that are called; a module ends after those inside.
    """
    if layer in place_of:
        return place_of[layer]
    layer = layer.partition("/call_")[0]  # a later call of a module, as detectors read it
    if layer in place_of:
        return place_of[layer]
    around = layer.rpartition(".")[0]
    while around:
        if around in place_of:
            return place_of[around] - 0.5
        around = around.rpartition(".")[0]
    return -1.0
