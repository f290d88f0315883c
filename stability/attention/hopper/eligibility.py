"""What the Hopper kernels take, as a rule that can be asked."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.metadata import version

import torch

from stability.attention.capability import compute_capability

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
# Gluon is experimental: each minor version of Triton calls or compiles something differently.
COMPILED_WITH = ("3.6", "3.7", "3.8", "3.9")
# Of these, the versions with which the GPU tests have passed on a Hopper GPU.
RUN_WITH = ("3.6",)


@cache  # the look-up takes a third of a millisecond
def installed_triton() -> str:
    """The minor version of the installed Triton: "3.6" of 3.6.0."""
    return ".".join(version("triton").split(".")[:2])


def why_only_by_name() -> str | None:
    """Why "auto" passes over the Hopper kernels where `can_run` has nothing against them, or None."""
    installed = installed_triton()
    if installed in RUN_WITH:
        return None
    return f"its kernels compile with triton {installed}, but no GPU has run them; ask for them by name"


def layout_problem(name: str, tensor: torch.Tensor) -> str | None:
    """Why TMA cannot read this, or None. Rows have to be contiguous and to start on 16-byte boundaries."""
    is_aligned = tensor.data_ptr() % 16 == 0
    return _layout_problem(name, tensor.shape, tensor.stride(), tensor.element_size(), is_aligned)


@lru_cache(maxsize=1024)  # a model's calls are alike
def _layout_problem(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], element_size: int, is_aligned: bool
) -> str | None:
    if strides[3] != 1:
        return f"{name}'s last axis is not contiguous (stride {strides[3]})"
    outer = [stride for size, stride in zip(shape[:3], strides[:3], strict=True) if size > 1]
    if 0 in outer:
        return f"{name} is expanded (strides {strides})"
    if not is_aligned or any(stride * element_size % 16 for stride in outer):
        return f"{name}'s rows do not start on 16-byte boundaries (strides {strides})"
    return None


def can_run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score_bias: torch.Tensor | None = None,
    **_: object,
) -> str | None:
    """Why the Hopper kernels cannot take these tensors [batch, heads, tokens, head_dim], or None if they can.

    Takes every argument of `forward`, and looks at those that matter.

    >>> import torch
    >>> query = torch.empty(1, 2, 16, 64, dtype=torch.bfloat16, device="meta")
    >>> can_run(query, query, query)
    'the tensors are on meta, not on a CUDA device'
    """
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}, not on a CUDA device"
    capability = compute_capability(query.device)
    if capability != (9, 0):
        return f"the device's compute capability is {capability[0]}.{capability[1]}, not 9.0"
    installed = installed_triton()
    if installed not in COMPILED_WITH:
        return f"its Gluon kernels are written for triton {', '.join(COMPILED_WITH)}, not {installed}"
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}, not bfloat16 or float16"
    if query.shape[3] not in HEAD_DIMS:
        return f"head_dim is {query.shape[3]}, not 64 or 128"
    if value.shape[3] != query.shape[3]:
        return f"value's head_dim {value.shape[3]} differs from query's {query.shape[3]}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        problem = layout_problem(name, tensor)
        if problem is not None:
            return problem
    if score_bias is not None and score_bias.stride(1) != 1:
        return f"score_bias's last axis is not contiguous (stride {score_bias.stride(1)})"
    return None
