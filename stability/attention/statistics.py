"""Statistics of attention rows from query and key alone, without the matrix of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from stability.attention.call import AttentionCall, Mechanism
from stability.attention.logits import NEGATIVE_INFINITY
from stability.attention.moments import row_quantities
from stability.attention.rows import Coverage, RowSelection
from stability.attention.summary import SummaryValue, summarize_calls
from stability.attention.validation import logit_terms


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """Per-row statistics of one attention call; J is the row Jacobian ∂weights/∂logits.

    Every statistic is [batch, heads, num_rows], float32 (float64 for float64 inputs), on the query's device.
    A row that is padding or has no allowed key is not `valid`: its `max_logit` and `log_sum_exp` are −inf and
    all else is 0. A NaN in a valid row's query or keys comes out as NaN.

    Attributes:
        mechanism: "softmax" or "sigmoid".
        coverage: "all" rows, a "sampled" choice, or "given" ones.
        rows: [batch, num_rows] int64, the rows' positions.
        row_weights: [batch, num_rows] int64, how many rows each stands for (the size of its stratum).
        max_logit: Largest logit, masks and score_bias included, sigmoid's bias not.
        log_sum_exp: Logarithm of the softmax denominator; None for sigmoid.
        entropy: Entropy in nats of the weights (sigmoid: of the weights divided by their sum).
        jacobian_frobenius: ‖J‖_F.
        jacobian_spectral: ‖J‖₂, or the bound min(‖J‖_F, trace J, ‖J‖_∞): see `spectral_kind`.
        spectral_kind: "exact" or "upper_bound".
        off_diagonal_share: Off-diagonal energy over ‖J‖_F²; 0 for sigmoid, whose J is diagonal.
        trace: Trace J.
        derivative_max: p₁(1 − p₁) for softmax, max s(1 − s) for sigmoid; at most 1/4.
        row_sum: Σ s; None for softmax, where it is 1.
        saturated_share: Share of allowed keys with s > 0.99; None for softmax.

    Example:
        >>> import torch
        >>> query = torch.zeros(1, 1, 2, 4)  # all logits 0: two equal keys
        >>> statistics = attention_statistics(query, query, mechanism="softmax")
        >>> statistics.jacobian_spectral.flatten().tolist(), statistics.off_diagonal_share.flatten().tolist()
        ([0.5, 0.5], [0.5, 0.5])
    """

    mechanism: Mechanism
    coverage: Coverage
    rows: Tensor
    row_weights: Tensor
    max_logit: Tensor
    entropy: Tensor
    jacobian_frobenius: Tensor
    jacobian_spectral: Tensor
    spectral_kind: Literal["exact", "upper_bound"]
    off_diagonal_share: Tensor
    trace: Tensor
    derivative_max: Tensor
    log_sum_exp: Tensor | None = None
    row_sum: Tensor | None = None
    saturated_share: Tensor | None = None

    @cached_property
    def valid(self) -> Tensor:
        """[batch, heads, num_rows], False for padding and rows without an allowed key."""
        return self.max_logit != NEGATIVE_INFINITY

    def summarize(self) -> dict[str, SummaryValue]:
        """Means and maxima over the valid rows, per layer and per head.

        Returns:
            Quantity → value, in the order a probe records them: maxima of `max_logit` and `derivative_max`,
            means of `entropy`, `jacobian_frobenius`, `jacobian_spectral`, `off_diagonal_share` and, for
            sigmoid, of `row_sum` and `saturated_share`.
        """
        (summary,) = summarize_calls([self])
        return summary.by_name()


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    mechanism: Mechanism,
    rows: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    query_lengths: Tensor | Sequence[int] | None = None,
    bias: float | Tensor | None = None,
    score_bias: Tensor | None = None,
    seed: int = 0,
    first_sample: int = 0,
    exact_spectral: bool = False,
) -> AttentionStatistics:
    """Measures the rows of an attention call; memory is linear in the tokens, and nothing is read back.

    The arguments have the meanings of :func:`stability.softmax_attention` and
    :func:`stability.sigmoid_attention`. Dropout is not part of the statistics.

    Args:
        query: [batch, heads, tokens_q, head_dim], floating point.
        key: [batch, heads, tokens_k, head_dim]; fewer heads with `enable_gqa`.
        mechanism: "softmax" or "sigmoid".
        rows: None: all rows. An integer: so many rows per sequence, one drawn from each of as many equal
            strata of its valid rows. An integer tensor [num_rows] or [batch, num_rows]: these.
        attn_mask: Boolean (True takes part) or added to the logits; broadcastable to
            [batch, heads, tokens_q, tokens_k].
        is_causal: Query i sees the keys j ≤ i.
        scale: Factor of q·k. None means 1/√head_dim.
        enable_gqa: Whether groups of query heads share a key head.
        key_lengths: [batch] numbers of valid keys.
        query_lengths: [batch] numbers of valid queries.
        bias: Sigmoid only; None means −ln(max(key_lengths, 1)).
        score_bias: Sigmoid only; [tokens_k] or [batch, tokens_k].
        seed: Seed of sampled rows.
        first_sample: Where the batch is a part of a larger one: how many sequences stand before it. A
            sequence's sampled rows are then those it would have in the whole batch.
        exact_spectral: For softmax, solve for ‖J‖₂ instead of bounding it.

    Returns:
        Statistics of the rows.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, value or device.

    Source:
        Derived in docs/science.md.

    Example:
        >>> query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
        >>> statistics = attention_statistics(query, key, mechanism="softmax", is_causal=True)
        >>> statistics.entropy.exp()  # the number of keys each row sees
        tensor([[[1., 2., 3., 4.]]])
        >>> summary = attention_statistics(query, key, mechanism="sigmoid", rows=2).summarize()
        >>> summary["row_sum"].value, summary["row_sum"].kind
        (tensor(0.8000), 'estimate')
    """
    call = AttentionCall(
        mechanism=mechanism,
        query=query,
        key=key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        bias=bias,
        score_bias=score_bias,
    )
    return call_statistics(call, RowSelection(rows, seed), first_sample, exact_spectral=exact_spectral)


@torch.no_grad()
def call_statistics(
    call: AttentionCall, selection: RowSelection, first_sample: int = 0, *, exact_spectral: bool = False
) -> AttentionStatistics:
    """Statistics of a call whose rows are selected together with those of other calls.

    Args:
        call: Its arguments.
        selection: Chooses the rows, the same for calls alike.
        first_sample: Number of sequences that other processes hold before these.
        exact_spectral: See :func:`attention_statistics`.

    Returns:
        Statistics of the rows, as :func:`attention_statistics` gives them.

    Raises:
        TypeError: See :func:`attention_statistics`.
        ValueError: See :func:`attention_statistics`.
    """
    terms = logit_terms(call)
    selected = selection.of(call, terms.query_lengths, first_sample)
    quantities = row_quantities(
        call.query, call.key, call.mechanism, terms, selected, exact_spectral=exact_spectral
    )
    return AttentionStatistics(
        mechanism=call.mechanism,
        coverage=selected.coverage,
        rows=selected.rows,
        row_weights=selected.weights,
        spectral_kind="exact" if exact_spectral or call.mechanism == "sigmoid" else "upper_bound",
        **quantities,
    )
