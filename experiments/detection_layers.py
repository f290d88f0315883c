"""Where in a model of the fault suite a fault can sit, and the weights it finds there."""

from __future__ import annotations

from torch import Tensor, nn

from experiments.detection_models import MLPClassifier


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight matrix (or convolution) of a layer."""
    return next(parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1)


def query_and_key(attention: nn.Module) -> list[list[Tensor]]:
    """Weight and bias of the query and of the key projection, as views that can be written to."""
    if isinstance(attention, nn.MultiheadAttention):
        width = attention.embed_dim
        return [
            [attention.in_proj_weight[start : start + width], attention.in_proj_bias[start : start + width]]
            for start in (0, width)
        ]
    projections = (attention.get_submodule(name) for name in ("query", "key"))
    return [list(projection.parameters()) for projection in projections]


def candidate_layers(model: nn.Module, sits_in: str | None) -> list[str | None]:
    """Where in a model a kind of fault can sit: [None] for a kind that is no layer's.

    Args:
        model: The model.
        sits_in: As in :class:`experiments.detection_faults.Kind`.
    """
    if sits_in is None:
        return [None]
    is_candidate = {"weight": _has_matrix, "attention": _is_attention, "relu": _feeds_relu}[sits_in]
    modules = [(name, module) for name, module in model.named_modules() if "." in name]  # inside a block
    return [name for name, module in modules if is_candidate(name, module, model)]


def _has_matrix(name: str, module: nn.Module, model: nn.Module) -> bool:
    is_layer = isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
    return is_layer and not name.endswith("out_proj")  # which nn.MultiheadAttention never calls as a module


def _is_attention(name: str, module: nn.Module, model: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or name.endswith(".attention")


def _feeds_relu(name: str, module: nn.Module, model: nn.Module) -> bool:
    if isinstance(model, MLPClassifier):
        return isinstance(module, nn.Linear)
    return isinstance(module, nn.BatchNorm2d) or name.endswith("linear1")
