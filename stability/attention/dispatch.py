"""Which implementation computes a call of sigmoid attention: the rule, in this one place.

"auto" takes the first of these that can compute the call as it was asked for:

1. "hopper": what "triton" takes, on compute capability 9.0, within the limits that
   `stability.attention.hopper.can_run` names (Triton's version, head dimensions, strides, alignment);
   and only with a version of Triton that a Hopper GPU has run its tests with (`why_only_by_name`).
2. "triton": CUDA tensors in float16, bfloat16 or float32 on compute capability 8.0 or newer with Triton
   installed; head and value dimensions up to 256; no `attn_mask`, no dropout; precision "fast" in half
   precision only; not inside torch.func transforms or forward-mode differentiation, which kernels lack.
3. "reference": everything, at precision "accurate".

What is asked for by name is computed by that implementation or is a ValueError with the reason. By name, the
Hopper kernels also run with versions of Triton that they are only known to compile with. The choice between
the two kernels is made by the operator when it runs, so that compiled graphs see the memory of the tensors
they get; the choice between kernels and reference is made by the Python function.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stability.attention.capability import compute_capability
from stability.attention.validation import LogitTerms

Implementation = Literal["auto", "hopper", "triton", "reference"]
Precision = Literal["accurate", "fast"]
SoftmaxImplementation = Literal["auto", "fused", "reference"]

MAX_HEAD_DIM = 256  # of our portable kernels and of FlashAttention
HALF = (torch.float16, torch.bfloat16)
_IMPLEMENTATIONS, _PRECISIONS = get_args(Implementation), get_args(Precision)


@dataclass(frozen=True)
class Explanation:
    """Which implementation computes a call, and why none of the faster ones does.

    Attributes:
        implementation: "hopper", "triton" or "reference".
        refusals: Name of each faster implementation → the reason it is not taken.

    Example:
        >>> print(Explanation("reference", {"triton": "the tensors are on the CPU"}))
        sigmoid_attention runs on 'reference'.
          not 'triton': the tensors are on the CPU.
    """

    implementation: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [f"sigmoid_attention runs on {self.implementation!r}."]
        lines += [f"  not {name!r}: {reason}." for name, reason in self.refusals.items()]
        return "\n".join(lines)


def check_choice(implementation: str, precision: str) -> None:
    """Checks the two names a caller chooses by."""
    for name, given, valid in (
        ("implementation", implementation, _IMPLEMENTATIONS),
        ("precision", precision, _PRECISIONS),
    ):
        _check_name(name, given, valid)


def check_softmax_choice(implementation: str) -> None:
    """Checks the name by which a caller chooses softmax's implementation."""
    _check_name("implementation", implementation, get_args(SoftmaxImplementation))


def _check_name(argument: str, given: str, valid: tuple[str, ...]) -> None:
    if given not in valid:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, valid))}; got {given!r}.")


def choose(
    query: Tensor, value: Tensor, terms: LogitTerms, dropout_p: float, implementation: str, *, is_fast: bool
) -> str | None:
    """The first half of the rule: kernels or reference.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        value: [batch, key_heads, tokens_k, value_dim].
        terms: Checked masks, lengths, scale and biases.
        dropout_p: Probability of dropping a weight.
        implementation: What the caller asks for.
        is_fast: Whether precision "fast" is asked for.

    Returns:
        The implementation to pass to the operator, or None for the reference.

    Raises:
        ValueError: What was asked for cannot compute this call.
    """
    refusals = {}
    if implementation != "reference":
        reason = why_not_triton(query, value, terms, dropout_p=dropout_p, is_fast=is_fast)
        if reason is None:
            return implementation
        refusals["triton" if implementation == "auto" else implementation] = reason
    if implementation in ("auto", "reference"):
        if not is_fast:
            return None
        refusals["reference"] = 'it has precision "accurate" only'
    raise refuse(refusals)


def why_not_triton(
    query: Tensor, value: Tensor, terms: LogitTerms, *, dropout_p: float, is_fast: bool
) -> str | None:
    """Why the portable kernels cannot compute a call, or None if they can.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        value: [batch, key_heads, tokens_k, value_dim].
        terms: Checked masks, lengths, scale and biases.
        dropout_p: Probability of dropping a weight.
        is_fast: Whether precision "fast" is asked for.

    Returns:
        The first reason, as the part of a sentence.
    """
    if (reason := _machine_reason(query.device.type, query.device.index)) is not None:
        return reason
    if query.dtype is not torch.float32 and query.dtype not in HALF:
        return f"kernels take float16, bfloat16 and float32, not {query.dtype}"
    if terms.attn_mask is not None:
        return "kernels take no `attn_mask` (padding goes by lengths, a bias per key by `score_bias`)"
    if dropout_p > 0:
        return "kernels have no dropout"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"head dimensions end at {MAX_HEAD_DIM}, not {query.shape[3]} and {value.shape[3]} (value)"
    if is_fast and query.dtype not in HALF:
        return f'precision "fast" is for float16 and bfloat16, not {query.dtype}'
    if is_transformed():
        return "torch.func transforms and forward-mode differentiation go through the reference"
    return None


def why_not_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_packed: bool,
    needs_statistics: bool,
    **arguments: Any,
) -> str | None:
    """Why the Hopper kernels cannot compute a call that the portable ones can, or None if they can.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_heads, tokens_k, head_dim].
        value: [batch, key_heads, tokens_k, value_dim].
        is_packed: Whether the sequences are told apart by cumulative lengths.
        needs_statistics: Whether row sums and derivative maxima are asked for.
        arguments: The further keyword arguments of every implementation's ``forward``.

    Returns:
        The first reason, as the part of a sentence.
    """
    capability = compute_capability(query.device) if query.is_cuda else None
    if capability != (9, 0):
        found = "no CUDA device" if capability is None else "{}.{}".format(*capability)
        return f"it needs compute capability 9.0 (Hopper), not {found}"
    if is_packed:
        return "it takes no packed sequences (cumulative lengths)"
    if needs_statistics:
        return "it computes no statistics of the rows"
    try:
        from stability.attention import hopper
    except (ImportError, AttributeError) as error:  # Gluon's interface changes from release to release
        return f"it does not fit the installed Triton ({error})"
    return hopper.can_run(query, key, value, **arguments)


def refuse(refusals: dict[str, str]) -> ValueError:
    """The error for a call that no implementation asked for can compute."""
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in refusals.items())
    return ValueError(
        f"No implementation asked for can compute this call. {reasons}. "
        'Pass implementation="auto" and precision="accurate" for one that can.'
    )


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# Torch traces a transform inside it, and guards the graph by the transforms it was traced in.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_ampere(device_type: str, index: int | None) -> str | None:
    """Why a device has neither our kernels nor FlashAttention, or None if it may have them."""
    if device_type != "cuda":
        return f"the tensors are on {device_type!r}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or newer, not {}.{}".format(*capability)
    return None


def _machine_reason(device_type: str, index: int | None) -> str | None:
    return _cached_machine_reason(device_type, index)


# What torch.compiler.assume_constant_result sets: compiled graphs take the machine as it is. That function
# itself would import dynamo, and with it Triton, at `import stability`.
_machine_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _cached_machine_reason(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter computes on the CPU
    return why_not_ampere(device_type, index)
