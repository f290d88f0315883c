"""Places in a model where attention is computed, and what is read of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from stability.attention.compiled import Place
from stability.attention.seen import SeenAttention, UnseenAttentionError, seen_logits
from stability.html_table import html_table

_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")


@dataclass(frozen=True)
class AttentionSite:
    """A place in the model where attention is computed.

    Attributes:
        layer: Innermost module that made the call.
        call: Which call of that module within a forward pass, from 0.
        kind: Function that computes it; "torch.softmax" for attention written by hand, whose logits are seen.
        mechanism: "softmax" or "sigmoid"; None where unseen.
        num_heads: Query heads; None where unseen.
        query_shape: [batch, heads, tokens, head_dim] when first seen; head_dim is 0 where only the logits are
            seen. None where unseen.
        key_shape: The same of the key.
        unseen: Why nothing is recorded here; None where everything is seen.
    """

    layer: str
    call: int
    kind: str
    mechanism: str | None = None
    num_heads: int | None = None
    query_shape: tuple[int, ...] | None = None
    key_shape: tuple[int, ...] | None = None
    unseen: str | None = None


class AttentionSites(list[AttentionSite]):
    """A list that notebooks show as a table."""

    def _repr_html_(self) -> str:
        head = ("layer", "call", "function", "mechanism", "heads", "query", "key", "not seen because")
        return html_table(
            head,
            [
                [
                    f"`{site.layer}`",
                    str(site.call),
                    site.kind,
                    site.mechanism or "–",
                    "–" if site.num_heads is None else str(site.num_heads),
                    " × ".join(map(str, site.query_shape or ())) or "–",
                    " × ".join(map(str, site.key_shape or ())) or "–",
                    site.unseen or "",
                ]
                for site in self
            ],
        )


def attention_site(place: Place, function: str, seen: SeenAttention) -> AttentionSite:
    """The site of a call that is seen.

    Raises:
        ValueError: Query or key has not four axes.
    """
    call = seen.call
    if call.query.dim() != 4 or call.key.dim() != 4:
        raise ValueError(
            f"query and key must be [batch, heads, tokens, head_dim]; got {tuple(call.query.shape)} "
            f"and {tuple(call.key.shape)}"
        )
    return AttentionSite(
        place.layer,
        place.call,
        function,
        call.mechanism,
        call.query.shape[1],
        tuple(call.query.shape),
        tuple(call.key.shape),
    )


def read_softmax(module: nn.Module, logits: Tensor) -> SeenAttention:
    """Logits of a softmax with their heads apart: [batch, heads, tokens_q, tokens_k]."""
    heads = next((h for name in _HEADS_ATTRIBUTES if isinstance(h := getattr(module, name, None), int)), None)
    if logits.dim() == 3:  # [batch · heads, tokens_q, tokens_k], as for torch.bmm
        is_joined = heads is not None and heads > 0 and logits.shape[0] % heads == 0
        return seen_logits(logits.unflatten(0, (-1, heads)) if is_joined else logits.unsqueeze(1))
    if logits.dim() != 4 or (heads is not None and logits.shape[1] != heads):
        raise UnseenAttentionError(
            f"its softmax is over shape {tuple(logits.shape)}, not [batch, heads, tokens, tokens]"
            + ("" if heads is None else f" with the module's {heads} heads")
        )
    return seen_logits(logits)
