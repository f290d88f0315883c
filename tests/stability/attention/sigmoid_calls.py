"""Calls of sigmoid attention that every kernel must compute, and how far from float64 it may be."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from stability.attention import sigmoid_attention

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
# The interpreter multiplies bfloat16 tiles as if they were integers.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
INPUTS = ("query", "key", "value", "bias", "score_bias", "grad_output")

# heads, key heads, queries, keys, head_dim, value_dim, further arguments
SHAPES: dict[str, tuple[int, int, int, int, int, int, dict[str, Any]]] = {
    "one token": (2, 2, 1, 1, 64, 64, {}),
    "odd": (2, 2, 63, 111, 16, 16, {}),
    "causal": (2, 2, 111, 111, 24, 24, {"is_causal": True}),
    "causal, more keys": (1, 1, 63, 130, 16, 40, {"is_causal": True}),
    "causal, more queries": (1, 1, 130, 63, 16, 16, {"is_causal": True}),
    "grouped": (4, 2, 40, 70, 32, 16, {"enable_gqa": True}),
    "padded": (
        2, 1, 70, 111, 16, 16, {"key_lengths": [104, 3], "query_lengths": [70, 5], "enable_gqa": True}
    ),
    "padded, causal": (
        2, 2, 130, 130, 16, 16, {"key_lengths": [130, 67], "query_lengths": [65, 130], "is_causal": True}
    ),
    "empty": (1, 1, 20, 20, 16, 16, {"key_lengths": [0, 20], "query_lengths": [20, 0]}),
}  # fmt: skip
if DEVICE == "cuda":  # the head dimensions of the Hopper kernels, which the interpreter has no time for
    SHAPES |= {
        f"{name}, head dim {dim}": (*shape[:4], dim, dim, shape[6])
        for name, shape in SHAPES.items()
        for dim in (64, 128)
    }


def make_inputs(shape: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors, [batch, tokens, heads, dim] in memory; query, key and value with NaN in the padding."""
    heads, key_heads, tokens_q, tokens_k, head_dim, value_dim, arguments = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = {
        "query": random(2, tokens_q, heads, head_dim).transpose(1, 2),
        "key": random(2, tokens_k, key_heads, head_dim).transpose(1, 2),
        "value": random(2, tokens_k, key_heads, value_dim).transpose(1, 2),
        "bias": random(2, heads) - 2,
        "score_bias": random(2, tokens_k),
        "grad_output": random(2, heads, tokens_q, value_dim),
    }
    for lengths, names in (("key_lengths", ("key", "value")), ("query_lengths", ("query", "grad_output"))):
        for i, length in enumerate(arguments.get(lengths, ())):
            for name in names:
                inputs[name][i, :, length:] = torch.nan
            if lengths == "key_lengths":
                inputs["score_bias"][i, length:] = torch.nan
    is_float32 = ("bias", "score_bias")
    return {
        name: tensor.to(DEVICE, torch.float32 if name in is_float32 else dtype)
        for name, tensor in inputs.items()
    }


def attend_and_differentiate(
    shape: str, implementation: str, *inputs: Tensor, **choice: Any
) -> tuple[Tensor, ...]:
    """Output and the gradients of query, key, value, bias and score_bias."""
    *leaves, grad_output = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    query, key, value, bias, score_bias = leaves
    output = sigmoid_attention(
        query,
        key,
        value,
        bias=bias,
        score_bias=score_bias,
        implementation=implementation,
        **SHAPES[shape][6],
        **choice,
    )
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)
