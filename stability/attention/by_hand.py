"""How attention that is written by hand gives itself away: by a module's name and the shape of a softmax."""

from __future__ import annotations

import re

from torch import nn

# Modules that compute attention themselves are named for it, and so are wrappers around them; what only
# prepares or projects (AttentionOutput, AttentionMask) has another ending.
_ATTENTION_CLASS = re.compile(r"(attention|attn|mha|mhsa)(block|layer)?(v?\d+d?)?$", re.IGNORECASE)


def is_named_for_attention(module: nn.Module) -> bool:
    """Whether the module's class has a name that classes computing attention have."""
    return _ATTENTION_CLASS.search(type(module).__name__) is not None


def is_attention_softmax(num_axes: int, *, is_named: bool) -> bool:
    """Whether a softmax over the last of so many axes is likely one of attention.

    Routers and classifiers have [tokens, classes] or [batch, tokens, classes].

    Args:
        num_axes: Axes of the softmax's argument.
        is_named: Whether the module that calls it is named for attention.
    """
    return num_axes == 4 or (num_axes >= 3 and is_named)
