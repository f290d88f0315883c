"""What happens to each attention call of a model while its attention is replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stability.attention.api import sigmoid_attention, softmax_attention
from stability.attention.by_hand import is_attention_softmax, is_named_for_attention
from stability.attention.call import AttentionCall, Mechanism
from stability.attention.interception import replace_calls
from stability.attention.report import observe_reports, report_attention
from stability.attention.rerouting import REROUTED
from stability.attention.seen import SeenAttention, UnseenAttentionError
from stability.attention.transformers_interface import implementation_of, interface_configs
from stability.attention.validation import logit_dtype
from stability.module_calls import ModuleCalls, in_backward, is_being_traced, is_compiled, layer_names

# The least that models add to a logit to exclude its key; the weight is 0 in float32 long before.
_EXCLUDING = -1e4

_MULTIHEAD = "torch.nn.MultiheadAttention"


class ReplacedSite(NamedTuple):
    """A place in the model whose attention is rerouted.

    Attributes:
        layer: Innermost module that makes the call.
        function: Function that would have computed it.
        calls: How often so far; recomputation by activation checkpointing is not counted.
    """

    layer: str
    function: str
    calls: int


class AttentionReplacement:
    """A model's attention while it is rerouted. Made by :func:`stability.replace_attention`."""

    def __init__(self, model: nn.Module, mechanism: Mechanism, bias: float | None) -> None:
        self._mechanism = mechanism
        self._bias = bias
        names = layer_names(model)
        self._modules = {name: module for module, name in names.items()}
        self._configs = interface_configs(model)
        self._calls = ModuleCalls(names, self._before_module, self._after_module)
        self._running_model = ExitStack()
        self._counts: Counter[tuple[str, str]] = Counter()
        # Layers named for attention of which no call is known; whatever is known takes them out.
        self._unexplained = {name for name, module in self._modules.items() if is_named_for_attention(module)}
        self._reported: set[str] = set()

    @property
    def sites(self) -> list[ReplacedSite]:
        """What has been rerouted so far, in the order of its first calls."""
        return [ReplacedSite(layer, function, n) for (layer, function), n in self._counts.items()]

    def install(self, handles: ExitStack) -> None:
        """Starts rerouting; ends when ``handles`` closes."""
        handles.callback(self._running_model.close)
        handles.callback(register_module_forward_pre_hook(self._refuse_compiled).remove)
        self._calls.install(handles)
        handles.enter_context(replace_calls(self._replace, self._replace_softmax))
        handles.enter_context(observe_reports(self._see_report))

    def _before_module(self, module: nn.Module, name: str, args: tuple) -> None:
        if len(self._calls.running) == 1:  # the outermost call, whatever it is
            self._running_model.enter_context(_without_fast_path())
            self._running_model.enter_context(implementation_of(self._configs))

    def _after_module(self, module: nn.Module, name: str, args: tuple, kwargs: dict, output: object) -> None:
        if not self._calls.running:
            self._running_model.close()
        if name in self._unexplained and output is not None:
            self._refuse(name, type(module).__name__, "it makes no attention call that is known")

    def _replace(
        self, function: str, read: Callable[[], SeenAttention], args: tuple, kwargs: dict[str, Any]
    ) -> Callable[[], Tensor] | None:
        layer = self._calls.current_layer
        if layer is None:
            if in_backward() and not self._calls.num_others:
                raise NotImplementedError(
                    f"activation checkpointing repeats {function} outside any module, where its layer is not "
                    "known. Checkpoint modules, not functions or methods, inside replace_attention."
                )
            return None
        self._unexplained.difference_update(self._calls.running)
        if function == f"stability.{self._mechanism}_attention":
            return None  # with the arguments its author gave it
        return partial(self._reroute, layer, function, read, args, kwargs)

    def _reroute(
        self,
        layer: str,
        function: str,
        read: Callable[[], SeenAttention],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Tensor:
        if function not in REROUTED:
            self._refuse(layer, function, "the function has no counterpart here")
        try:
            output = REROUTED[function](self._attend, read, *args, **kwargs)
        except UnseenAttentionError as error:
            self._refuse(layer, function, str(error))
        self._count(layer, function)
        return output

    def _attend(self, call: AttentionCall, value: Tensor, dropout_p: float) -> Tensor:
        arguments: dict[str, Any] = {
            "attn_mask": call.attn_mask,
            "dropout_p": dropout_p,
            "is_causal": call.is_causal,
            "scale": call.scale,
            "enable_gqa": call.enable_gqa,
            "key_lengths": call.key_lengths,
            "query_lengths": call.query_lengths,
        }
        if self._mechanism == "softmax":
            if call.score_bias is not None:
                raise UnseenAttentionError("softmax attention has no score_bias")
            return softmax_attention(call.query, call.key, value, **arguments)
        return sigmoid_attention(call.query, call.key, value, **arguments, bias=self._bias_of(call))

    def _bias_of(self, call: AttentionCall) -> float | Tensor | None:
        """Sigmoid's bias for a call: a number, [batch, heads], or None for −ln of the number of all keys."""
        if self._bias is not None or call.attn_mask is None or call.key_lengths is not None:
            return self._bias
        mask = call.attn_mask[(None,) * (4 - call.attn_mask.dim())]
        bias = _bias_of_mask(mask.expand(*mask.shape[:3], call.key.shape[2]))
        return bias.to(call.query.device).expand(call.query.shape[:2])

    def _replace_softmax(self, logits: Tensor) -> Callable[[], Tensor] | None:
        running = self._calls.running
        if not running:
            return None
        layer = running[-1]
        if len(running) > 1 and isinstance(self._modules[layer], nn.Softmax):
            layer = running[-2]
        module = self._modules[layer]
        if isinstance(module, nn.MultiheadAttention):  # with need_weights
            self._unexplained.difference_update(running)
            self._count(layer, _MULTIHEAD)
            return None if self._mechanism == "softmax" else partial(self._weights, module.num_heads, logits)
        if layer not in self._reported and is_attention_softmax(
            logits.dim(), is_named=is_named_for_attention(module)
        ):
            self._refuse(layer, "torch.softmax", "it is written by hand, as a softmax")
        return None

    def _weights(self, num_heads: int, logits: Tensor) -> Tensor:
        """Sigmoid's weights in the place of softmax's, from logits [batch · heads, tokens_q, tokens_k]."""
        scores = logits.unflatten(0, (-1, num_heads)).to(logit_dtype(logits.dtype))
        bias: Any = self._bias
        if bias is None:
            bias = _bias_of_mask(scores.detach())
        # A probe sees the final logits, as the mask of products that are zero.
        zero = scores.new_zeros(())
        query, key = zero.expand(*scores.shape[:3], 1), zero.expand(*scores.shape[:2], scores.shape[3], 1)
        report_attention(query, key, mechanism="sigmoid", attn_mask=scores, scale=1.0, bias=bias)
        if isinstance(bias, Tensor):
            bias = bias[..., None, None]
        return (scores + bias).sigmoid().to(logits.dtype).flatten(0, 1)

    def _see_report(self, call: AttentionCall) -> None:
        layer = self._calls.current_layer
        if layer is None:
            return
        if call.mechanism != self._mechanism:
            self._refuse(
                layer, "stability.attention.report_attention", "it is declared, and computed by hand"
            )
        self._unexplained.difference_update(self._calls.running)
        self._reported.add(layer)

    def _count(self, layer: str, function: str) -> None:
        if not in_backward():
            self._counts[layer, function] += 1

    def _refuse(self, layer: str, function: str, reason: str) -> NoReturn:
        raise NotImplementedError(
            f"attention in {layer} ({function}) cannot be rerouted to {self._mechanism} attention: {reason}. "
            f"Let the layer call stability.{self._mechanism}_attention, or torch's "
            "scaled_dot_product_attention with a float attn_mask for what is added to its logits."
        )

    def _refuse_compiled(self, module: nn.Module, args: tuple) -> None:
        original = module._modules.get("_orig_mod", module)
        if original in self._calls.names and (is_being_traced() or is_compiled(module)):
            raise NotImplementedError(
                f"{self._calls.names[original]} is compiled, traced or exported, and attention in recorded "
                "code cannot be rerouted yet. Run the model without torch.compile inside replace_attention."
            )


def _bias_of_mask(mask: Tensor) -> Tensor:
    """−ln of the number of keys that any query may see by a mask [..., tokens_q, tokens_k]: [...]."""
    is_allowed = mask if mask.dtype is torch.bool else mask.detach() > _EXCLUDING
    return -is_allowed.any(dim=-2).sum(-1).clamp(min=1).float().log()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keeps torch's modules from their fused inference kernels, which are softmax attention."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)
