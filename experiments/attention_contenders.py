"""Attention implementations to race: the cases, what each contender runs in a pass, and its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import stability
from stability.attention.call import AttentionCall
from stability.attention.operands import make_operands
from stability.attention.operator import attend
from stability.attention.validation import logit_terms

Kind = Literal["ours", "peer", "softmax"]
PASSES = ("forward", "backward", "forward+backward")
# Of the forward pass's two matrix products; the backward pass has five.
FLOP_FACTORS = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        batch: Sequences.
        heads: Heads of each.
        tokens: Stored tokens of each sequence.
        head_dim: Size of a head.
        bias: "-ln n" or "0".
        padding: Share of the tokens that are padding, on average over the sequences.
        is_causal: Whether query i sees the keys j ≤ i only.
        is_packed: Whether no padding is stored, and the valid tokens lie one behind the other.
    """

    batch: int
    heads: int
    tokens: int
    head_dim: int
    bias: Literal["-ln n", "0"] = "-ln n"
    padding: float = 0.0
    is_causal: bool = False
    is_packed: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and tokens of each as they lie in memory; packed sequences are one row."""
        return (1, sum(self.valid_lengths)) if self.is_packed else (self.batch, self.tokens)

    @property
    def lengths(self) -> list[int] | None:
        """Valid tokens per sequence, spread evenly around their mean; None without padding."""
        if not self.padding:
            return None
        places = ((i + 0.5) / self.batch for i in range(self.batch))
        return [max(1, round(self.tokens * (1 - 2 * self.padding * place))) for place in places]

    @property
    def valid_lengths(self) -> list[int]:
        """Valid tokens per sequence, also where these are all."""
        return self.lengths or [self.tokens] * self.batch

    def flop(self, which: str) -> float:
        """Floating-point operations of a pass that touch valid tokens."""
        pairs = sum(length**2 for length in self.valid_lengths)
        return FLOP_FACTORS[which] * 4 * self.heads * pairs * self.head_dim * (0.5 if self.is_causal else 1.0)

    def __str__(self) -> str:
        parts = [f"n {self.tokens}", f"head dim {self.head_dim}", f"bias {self.bias}"]
        parts += [f"{self.padding:.0%} padding"] * bool(self.padding)
        parts += ["packed"] * self.is_packed + ["causal"] * self.is_causal
        return ", ".join(parts)


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: In the table.
        kind: "ours" and "peer" compute sigmoid attention, "softmax" something else that costs about the same.
        attend: Query, key and value [batch, heads, tokens, head_dim] → output of that shape.
        around: A context that its calls need.
    """

    name: str
    kind: Kind
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def contenders(case: Case, device: str) -> list[Contender]:
    """Who can compute a case on this device; SDPA computes the padding as well, as it must.

    Args:
        case: What is computed.
        device: "cpu" or "cuda".

    Returns:
        Ours first.
    """
    lengths = case.lengths if case.lengths is None else torch.tensor(case.lengths, device=device)
    bias = None if case.bias == "-ln n" else 0.0
    public = partial(
        stability.sigmoid_attention,
        is_causal=case.is_causal, bias=bias, key_lengths=lengths, query_lengths=lengths,
    )  # fmt: skip
    if device == "cpu":
        return [Contender("reference", "ours", public)]
    found = [Contender("stability, accurate", "ours", public)]
    found += [Contender("stability, accurate, operator", "ours", partial(_operator, case, lengths))]
    found += [Contender("stability, fast", "ours", partial(public, precision="fast"))]
    found += [Contender("stability, Triton, accurate", "ours", partial(public, implementation="triton"))]
    return found + _triton_sigmoid(case, lengths, bias) + _softmax(case, lengths)


def _operator(case: Case, lengths: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The operator without the public function's checks: what that one is held against."""
    bias = -math.log(case.tokens) if case.bias == "-ln n" else 0.0
    call = AttentionCall("sigmoid", query, key, bias=bias, key_lengths=lengths, query_lengths=lengths)
    terms = logit_terms(call)
    return attend(
        make_operands(query, key, value, terms),
        scale=terms.scale, is_causal=case.is_causal, is_fast=False, implementation="auto",
    )[0]  # fmt: skip


def _triton_sigmoid(case: Case, lengths: Tensor | None, bias: float | None) -> list[Contender]:
    try:
        import triton_sigmoid
    except (ImportError, RuntimeError):  # it raises at import without a GPU
        return []

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return triton_sigmoid.sigmoid_attention(
            *tensors, is_causal=case.is_causal, sigmoid_bias=bias
        ).transpose(1, 2)

    lengths_twice = [] if lengths is None else [lengths.int()] * 2

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return triton_sigmoid.sigmoid_attention_padded(
            *tensors, *lengths_twice, is_causal=case.is_causal, sigmoid_bias=bias
        ).transpose(1, 2)

    def operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from triton_sigmoid.sigmoid_triton_dense import sigmoid_attention_fwd_op

        number = -math.log(case.tokens) if bias is None else bias
        biases = torch.full((case.batch,), number, device=query.device)
        scale = torch.tensor(case.head_dim**-0.5, device=query.device)
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return sigmoid_attention_fwd_op(*tensors, biases, None, scale, case.is_causal).transpose(1, 2)

    if lengths is not None:
        return [Contender("triton-sigmoid", "peer", padded)]
    return [
        Contender("triton-sigmoid", "peer", dense),
        Contender("triton-sigmoid, operator", "peer", operator),
    ]


def _softmax(case: Case, lengths: Tensor | None) -> list[Contender]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sdpa = partial(scaled_dot_product_attention, is_causal=case.is_causal)

    def allowed(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        is_allowed = row >= 0 if not case.is_causal else row >= column
        if lengths is not None:
            is_allowed = is_allowed & (column < lengths[batch]) & (row < lengths[batch])
        return is_allowed

    mask = None
    if case.is_causal or lengths is not None:
        batch = case.batch if lengths is not None else None
        mask = create_block_mask(allowed, batch, None, case.tokens, case.tokens, device="cuda")
    flex = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
    return [
        Contender(
            "softmax, SDPA FlashAttention-2",
            "softmax",
            sdpa,
            partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
        ),
        Contender("softmax, SDPA cuDNN", "softmax", sdpa, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
        Contender("softmax, flex_attention compiled", "softmax", flex),
    ]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Query, key, value and the output's gradient, [batch, tokens, heads, head_dim] in memory."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor

    @classmethod
    def random(cls, case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Standard normal tensors of a case."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (*case.stored, case.heads, case.head_dim)
        tensors = (torch.randn(shape, device=device, generator=generator) for _ in range(4))
        return cls(*(tensor.to(dtype).transpose(1, 2) for tensor in tensors))


def passes(contender: Contender, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """What to time of a contender, ready to be called any number of times.

    Args:
        contender: Who.
        inputs: Shared by all.

    Returns:
        Pass → function; without the backward passes for an operator that has no derivative.
    """
    tensors = (inputs.query, inputs.key, inputs.value)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def forward() -> Tensor:
        with contender.around(), torch.no_grad():
            return contender.attend(*tensors)

    def attend_with_graph() -> Tensor:
        with contender.around():
            return contender.attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend_with_graph(), leaves, inputs.grad_output)

    output = attend_with_graph()
    if not output.requires_grad:
        return {"forward": forward}

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, inputs.grad_output, retain_graph=True)

    return dict(zip(PASSES, (forward, backward, both), strict=True))


def relative_error(contender: Contender, case: Case, inputs: Inputs, num_rows: int = 64) -> float:
    """‖output − exact‖ / ‖exact‖ over some rows of the last sequence's last head, exact in float64.

    Args:
        contender: Who; softmax contenders are held against softmax.
        case: What is computed.
        inputs: Shared by all.
        num_rows: Rows, spread over the valid ones.

    Returns:
        The relative Frobenius error.
    """
    length = case.lengths[-1] if case.lengths is not None else case.tokens
    rows = torch.linspace(0, length - 1, min(num_rows, length), device=inputs.query.device).long()
    query, key, value = (
        tensor[-1, -1, :length].double() for tensor in (inputs.query, inputs.key, inputs.value)
    )
    logits = query[rows] @ key.mT / math.sqrt(case.head_dim)
    if case.is_causal:
        hidden = torch.arange(length, device=rows.device) > rows[:, None]
        logits = logits.masked_fill(hidden, -math.inf)
    # SDPA takes no lengths: its rows see the padding too, and their error is not the arithmetic's.
    if contender.kind == "softmax":
        weights = logits.softmax(dim=-1)
    else:
        weights = (logits - (math.log(length) if case.bias == "-ln n" else 0.0)).sigmoid()
    exact = weights @ value
    with contender.around(), torch.no_grad():
        output = contender.attend(inputs.query, inputs.key, inputs.value)[-1, -1, rows].double()
    return float((output - exact).norm() / exact.norm())
