"""What the Hopper kernels take, as a rule that can be asked."""

from __future__ import annotations

from importlib.util import find_spec

import torch

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)


def layout_problem(name: str, tensor: torch.Tensor) -> str | None:
    """Why TMA cannot read this, or None. Rows have to be contiguous and to start on 16-byte boundaries."""
    if tensor.stride(3) != 1:
        return f"{name}'s last axis is not contiguous (stride {tensor.stride(3)})"
    size = tensor.element_size()
    if tensor.data_ptr() % 16 or any(stride * size % 16 for stride in tensor.stride()[:3]):
        return f"{name}'s rows do not start on 16-byte boundaries (strides {tuple(tensor.stride())})"
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
    capability = torch.cuda.get_device_capability(query.device)
    if capability != (9, 0):
        return f"the device's compute capability is {capability[0]}.{capability[1]}, not 9.0"
    if find_spec("triton.experimental.gluon") is None:
        return "the installed triton has no Gluon"
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}, not bfloat16 or float16"
    if query.shape[3] not in HEAD_DIMS:
        return f"head_dim is {query.shape[3]}, not 64 or 128"
    if value.shape[3] != query.shape[3]:
        return f"value's head_dim {value.shape[3]} differs from query's {query.shape[3]}"
    if key.shape[1] != query.shape[1]:
        return f"{query.shape[1]} query heads share {key.shape[1]} key heads"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        problem = layout_problem(name, tensor)
        if problem is not None:
            return problem
    if score_bias is not None and score_bias.stride(1) != 1:
        return f"score_bias's last axis is not contiguous (stride {score_bias.stride(1)})"
    return None
