"""The drop-in replacement: a model's attention calls computed by this package's functions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import torch
from torch import nn

from stability.attention.call import Mechanism
from stability.attention.replaced_calls import AttentionReplacement
from stability.module_calls import is_compiled

_replaced_modules: set[nn.Module] = set()


@contextmanager
def replace_attention(
    model: nn.Module, mechanism: Mechanism = "sigmoid", *, bias: float | None = None
) -> Iterator[AttentionReplacement]:
    """Computes a model's attention by this package's functions while the context is open.

    Every attention call that modules of `model` make is rerouted with its meaning kept: scale, causal order,
    masks, grouped queries, dropout, autocast. The model itself is not changed: ``state_dict()``, copies and
    pickles are what they were, and when the context closes, it computes what it did. Train inside.

    Rerouted are ``scaled_dot_product_attention``, also where a module imported it by name; ``flex_attention``
    without `score_mod`; plain calls of ``flash_attn``; ``nn.MultiheadAttention`` and ``nn.Transformer*`` in
    training and evaluation, weights included where they are asked for; this package's functions; and models
    of Hugging Face transformers in every implementation, through their attention interface. Whatever else is
    known to be attention raises an error; `sites` of the value tells what was rerouted.

    Formula: σ(scale · Q Kᵀ + masks + bias) V in place of softmax(scale · Q Kᵀ + masks) V.

    Args:
        model: The model; not a compiled one.
        mechanism: "sigmoid", or "softmax" for this package's softmax attention.
        bias: Sigmoid only: a number for all rows. None means −ln n, where n counts the keys that any query of
            the sequence may see: all without a mask, those that are no padding with one. A causal model that
            decodes token by token sees n grow, and needs a number to compute what it did in training.

    Yields:
        What has been rerouted so far.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `mechanism` is unknown, `bias` comes with softmax, the model is compiled, scripted or
            data-parallel, holds an attention function as an attribute, or is being replaced already.
        NotImplementedError: Inside the context, from a layer whose attention cannot be rerouted: written by
            hand, soft-capped, with attention sinks, packed, or compiled.

    Warns:
        UserWarning: On leaving, if nothing was rerouted.

    Source:
        Ramapuram et al. 2024 (arXiv 2409.04431), sigmoid attention as a drop-in replacement.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=8, batch_first=True)
        >>> with replace_attention(layer, "sigmoid") as replaced:
        ...     output = layer(torch.randn(1, 3, 8))
        >>> [(site.layer, site.calls) for site in replaced.sites]
        [('self_attn', 1)]
    """
    _check_arguments(mechanism, bias)
    _check_model(model)
    replacement = AttentionReplacement(model, mechanism, bias)
    modules = set(model.modules())
    _replaced_modules.update(modules)
    try:
        with ExitStack() as handles:
            replacement.install(handles)
            yield replacement
    finally:
        _replaced_modules.difference_update(modules)
    if not replacement.sites:
        warnings.warn(
            f"replace_attention rerouted nothing: {type(model).__name__} made no attention call that is "
            "known while the context was open.",
            stacklevel=3,
        )


def _check_arguments(mechanism: object, bias: object) -> None:
    if mechanism not in get_args(Mechanism):
        raise ValueError(f'`mechanism` must be "softmax" or "sigmoid"; got {mechanism!r}.')
    if bias is None:
        return
    if not isinstance(bias, int | float) or isinstance(bias, bool):
        raise TypeError(f"`bias` must be a number or None; got {type(bias).__name__}.")
    if mechanism == "softmax":
        raise ValueError("`bias` belongs to sigmoid attention; leave it out for softmax.")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    attention = getattr(attention, "__wrapped__", attention)  # a probe's stand-in
    for name, module in model.named_modules():
        where = f"`{name}` in `model`" if name else "`model`"
        if module in _replaced_modules:
            raise ValueError(f"{where} is being replaced already; leave that context first.")
        if is_compiled(module) or isinstance(module, torch.jit.ScriptModule | nn.DataParallel):
            raise ValueError(
                f"{where} is compiled, scripted or data-parallel ({type(module).__name__}), and its "
                "attention cannot be rerouted yet. Give the plain module inside."
            )
        for attribute, value in vars(module).items():
            if getattr(value, "__wrapped__", value) is attention:
                raise ValueError(
                    f"{where} holds scaled_dot_product_attention as its attribute {attribute!r}, where it "
                    "cannot be rerouted. Call it by its name in forward."
                )
