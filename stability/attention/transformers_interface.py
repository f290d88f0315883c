"""Hugging Face transformers models: their attention and mask interfaces, with an implementation of ours.

The implementation "stability" is transformers' "sdpa" with a refusal of what that would leave out, and ends
in torch's ``scaled_dot_product_attention``. :func:`stability.replace_attention` gives it to a model while the
model runs, whatever implementation it has, so that its masks and its attention arrive in one form.

Nothing is imported here: where there is a model of transformers, its modules are loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

IMPLEMENTATION = "stability"

# What models hand to their attention function beside scale, dropout and masks, and "sdpa" leaves out.
_UNKNOWN_TO_SDPA = {
    "softcap": "its logits are soft-capped",
    "s_aux": "it has attention sinks",
    "cache": "its keys are in a paged cache",
    "indices": "its keys are selected by index",
}


def interface_configs(model: nn.Module) -> list[Any]:
    """The configurations by which modules of `model` choose an attention implementation.

    Models whose classes do not choose (``model.set_attn_implementation`` warns of them) are left out.
    """
    modeling_utils: Any = sys.modules.get("transformers.modeling_utils")
    if modeling_utils is None:
        return []
    configs: dict[int, Any] = {}
    for pretrained in model.modules():
        if not isinstance(pretrained, modeling_utils.PreTrainedModel):
            continue
        for module in pretrained.modules():  # parts of their own kind come later and decide for themselves
            config = getattr(module, "config", None)
            if pretrained._can_set_attn_implementation():
                if hasattr(config, "_attn_implementation_internal"):
                    configs[id(config)] = config
            else:
                configs.pop(id(config), None)
    return list(configs.values())


@contextmanager
def implementation_of(configs: list[Any]) -> Iterator[None]:
    """Gives models of these configurations our implementation, and theirs back."""
    if configs:
        _register()
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _register() -> None:
    masking_utils: Any = sys.modules["transformers.masking_utils"]
    modeling_utils: Any = sys.modules["transformers.modeling_utils"]
    modeling_utils.AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    masking_utils.AttentionMaskInterface.register(IMPLEMENTATION, masking_utils.sdpa_mask)


def _attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    for name, reason in _UNKNOWN_TO_SDPA.items():
        if kwargs.get(name) is not None:
            layer = f"layer {module.layer_idx}'s " if hasattr(module, "layer_idx") else ""
            raise NotImplementedError(
                f"attention in {layer}{type(module).__name__} cannot be rerouted: {reason} ({name}), for "
                "which this package's attention functions have no argument."
            )
    sdpa: Any = sys.modules["transformers.integrations.sdpa_attention"]
    return sdpa.sdpa_attention_forward(module, *args, **kwargs)
