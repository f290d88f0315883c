"""Operators that are called for what they do: ``torch.compile`` neither leaves them out nor reorders them."""

from __future__ import annotations

import torch
from torch._library.effects import EffectType
from torch._library.simple_registry import singleton


def keep_in_graphs(operator: torch._library.custom_ops.CustomOpDef) -> None:
    """Marks an operator that returns nothing as one with an effect.

    Torch's own function for this lives in a module whose import costs a second and brings Triton along.
    """
    operator.register_fake(lambda *_: None)
    singleton.find(operator._qualname).effect.register(EffectType.ORDERED)
