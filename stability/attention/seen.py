"""What is seen of an attention call: its arguments, or the logits of any of its rows, or why neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from stability.attention.call import AttentionCall
from stability.attention.logits import NEGATIVE_INFINITY
from stability.attention.rows import RowSelection
from stability.attention.statistics import AttentionStatistics, attention_statistics, call_statistics

RowLogits = Callable[[Tensor], Tensor]

# Logits formed at a time: 16 MiB in float32.
_CHUNK_ELEMENTS = 2**22


class UnseenAttentionError(Exception):
    """The weights of an attention call cannot be known; the message says why."""


@dataclass(frozen=True, eq=False)
class SeenAttention:
    """One attention call as far as it can be seen. Do not keep it beyond its observer.

    Attributes:
        call: Its arguments. Where only the logits are seen, query and key have the right shapes and no
            elements: head_dim 0.
        row_logits: Takes positions [batch, rows], returns these rows' final logits [batch, heads, rows,
            tokens_k], masks and score modifications included. None: `call` says everything.
    """

    call: AttentionCall
    row_logits: RowLogits | None = None

    def statistics(self, selection: RowSelection, first_sample: int = 0) -> AttentionStatistics:
        """Statistics of the rows that are selected; as :func:`stability.attention_statistics` gives them."""
        if self.row_logits is None:
            return call_statistics(self.call, selection, first_sample)
        return _logit_statistics(self.call, self.row_logits, selection, first_sample)


def seen_logits(logits: Tensor) -> SeenAttention:
    """A softmax call of which the final logits [batch, heads, tokens_q, tokens_k] are there already."""

    def row_logits(rows: Tensor) -> Tensor:
        index = rows[:, None, :, None].expand(-1, logits.shape[1], -1, logits.shape[3])
        return logits.detach().gather(2, index)

    query, key = logits[..., :0], logits.mT[..., :0]
    return SeenAttention(AttentionCall("softmax", query.detach(), key.detach()), row_logits)


@torch.no_grad()
def scaled_products(call: AttentionCall, rows: Tensor) -> Tensor:
    """Scaled q·k of the given rows, without masks: [batch, heads, rows, tokens_k], at least float32."""
    query, key = call.query.detach(), call.key.detach()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    scale = query.shape[3] ** -0.5 if call.scale is None else call.scale
    # Products in float64 are beyond the reach of reduced-precision settings (TF32).
    products = (query.double() @ key.double().mT) * scale
    return products if query.dtype is torch.float64 else products.float()


@torch.no_grad()
def _logit_statistics(
    call: AttentionCall, row_logits: RowLogits, selection: RowSelection, first_sample: int
) -> AttentionStatistics:
    batch, heads = call.query.shape[:2]
    tokens_k = call.key.shape[2]
    selected = selection.of(call, None, first_sample)
    chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * tokens_k))
    parts = []
    for positions, weights in zip(
        selected.rows.split(chunk, dim=1), selected.weights.split(chunk, dim=1), strict=True
    ):
        logits = row_logits(positions).masked_fill((weights == 0)[:, None, :, None], NEGATIVE_INFINITY)
        # The logits come in as the mask of products that are zero, so that there is one way to statistics.
        zero = logits.new_zeros(())
        query = zero.expand(batch, heads, positions.shape[1], 1)
        key = zero.expand(batch, heads, tokens_k, 1)
        parts.append(attention_statistics(query, key, mechanism=call.mechanism, attn_mask=logits, scale=1.0))
    per_row: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts], dim=2)
        for field in fields(parts[0])
        if isinstance(getattr(parts[0], field.name), Tensor) and field.name not in ("rows", "row_weights")
    }
    return replace(
        parts[0], **per_row, rows=selected.rows, row_weights=selected.weights, coverage=selected.coverage
    )
