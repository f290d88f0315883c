"""Sees the attention calls a program makes, its own and this package's, or computes them otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from stability.attention import flash
from stability.attention.autocast import cast_under_autocast
from stability.attention.call import AttentionCall, Mechanism
from stability.attention.compiled import Tracer
from stability.attention.flex import read_flex_attention, read_transformers_flex_attention
from stability.attention.observers import observe
from stability.attention.report import observe_reports
from stability.attention.seen import SeenAttention, UnseenAttentionError
from stability.attention.stand_ins import StandIns, Target

Observer = Callable[[str, Callable[[], SeenAttention]], None]
SoftmaxObserver = Callable[[Tensor], None]
Replacer = Callable[[str, Callable[[], SeenAttention], tuple, dict[str, Any]], Callable[[], Any] | None]
SoftmaxReplacer = Callable[[Tensor], Callable[[], Tensor] | None]


@contextmanager
def observe_attention(observer: Observer, tracer: Tracer | None = None) -> Iterator[None]:
    """Calls ``observer`` before every attention call while the context is open.

    Seen are the attention functions of this package and what :func:`stability.attention.report_attention`
    declares; ``scaled_dot_product_attention`` and ``flex_attention`` of PyTorch, the fused inference kernels
    of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``; and, if the packages are imported when
    the first context opens, the functions of ``flash_attn`` and the flex and flash implementations of Hugging
    Face transformers. Modules that imported a function by name are found too; functions that were put into
    other objects (an attribute of a model, a closure) are not. The calls themselves, their results and
    gradients are untouched.

    Args:
        observer: Takes the function's name, and ``read()``, which gives the :class:`SeenAttention` or raises:
            :class:`UnseenAttentionError` where the weights cannot be known, anything where the arguments are
            wrong. What the observer raises reaches the caller of the attention function.
        tracer: Sees the calls of compiled code in the observer's stead; None: they are not seen.

    Example:
        >>> import torch
        >>> calls = []
        >>> x = torch.zeros(1, 2, 3, 4)
        >>> with observe_attention(lambda function, read: calls.append((function, read().call.is_causal))):
        ...     _ = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> calls
        [('torch.nn.functional.scaled_dot_product_attention', True)]
    """

    def see_own(call: AttentionCall) -> None:
        observer(f"stability.{call.mechanism}_attention", lambda: SeenAttention(call))

    def see_report(call: AttentionCall) -> None:
        observer("stability.attention.report_attention", lambda: SeenAttention(call))

    def trace_own(call: AttentionCall) -> None:
        if tracer is not None:
            tracer.trace_call(f"stability.{call.mechanism}_attention", SeenAttention, call)

    def trace_report(call: AttentionCall) -> None:
        if tracer is not None:
            tracer.trace_report("stability.attention.report_attention", call)

    with (
        observe(see_own, trace_own),
        observe_reports(see_report, trace_report),
        _watching(_observers, observer),
        _tracing(tracer),
    ):
        yield


@contextmanager
def observe_softmax(observer: SoftmaxObserver) -> Iterator[None]:
    """Calls ``observer`` with the argument of every softmax over the last axis while the context is open.

    This is how attention that is written by hand shows (``nn.MultiheadAttention`` with ``need_weights``,
    Hugging Face's "eager"): the argument is its logits, complete with scale, masks and score modifications.
    What a function calls that :func:`observe_attention` reports is left out.

    Args:
        observer: Takes the tensor, of two or more dimensions.

    Example:
        >>> import torch
        >>> seen = []
        >>> with observe_softmax(lambda logits: seen.append(tuple(logits.shape))):
        ...     _ = torch.zeros(1, 2, 3, 4).softmax(dim=-1)
        >>> seen
        [(1, 2, 3, 4)]
    """
    with _watching(_softmax_observers, observer):
        yield


@contextmanager
def replace_calls(replacer: Replacer, softmax_replacer: SoftmaxReplacer) -> Iterator[None]:
    """Asks, while the context is open, what is to be computed in the place of every attention call.

    Calls are those of :func:`observe_attention` and :func:`observe_softmax`, which do not see the ones that
    are replaced. Calls of this package's two functions are among them.

    Args:
        replacer: Takes the function's name, its ``read()``, the positional and the keyword arguments. Returns
            the computation that takes the call's place, or None to leave it. What it raises reaches the
            caller.
        softmax_replacer: The same for a softmax over the last axis; takes the argument.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 1, 2, 4)
        >>> with replace_calls(lambda function, read, args, kwargs: lambda: args[2] * 3, lambda logits: None):
        ...     torch.nn.functional.scaled_dot_product_attention(x, x, x)[0, 0, 0]
        tensor([3., 3., 3., 3.])
    """
    with _watching(_replacers, replacer), _watching(_softmax_replacers, softmax_replacer):
        yield


_observers: list[Observer] = []
_softmax_observers: list[SoftmaxObserver] = []
_replacers: list[Replacer] = []
_softmax_replacers: list[SoftmaxReplacer] = []
_watchers: tuple[list[Any], ...] = (_observers, _softmax_observers, _replacers, _softmax_replacers)
_tracers: list[Tracer] = []


@contextmanager
def _tracing(tracer: Tracer | None) -> Iterator[None]:
    if tracer is None:
        yield
        return
    _tracers.append(tracer)
    try:
        yield
    finally:
        _tracers.remove(tracer)


@contextmanager
def _watching(observers: list[Any], observer: Any) -> Iterator[None]:
    if not any(_watchers):
        _stand_ins.install()
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)
        if not any(_watchers):
            _stand_ins.remove()


def _attention(
    module: str, name: str, read: Callable[..., SeenAttention], untouched: tuple[str, ...] = ()
) -> Target:
    function = f"{module}.{name}"

    def report(*args: Any, **kwargs: Any) -> Callable[[], Any] | None:
        for replacer in tuple(_replacers):
            if (instead := replacer(function, partial(read, *args, **kwargs), args, kwargs)) is not None:
                return instead
        for observer in tuple(_observers):
            observer(function, partial(read, *args, **kwargs))
        return None

    def trace(*args: Any, **kwargs: Any) -> None:
        _refuse_to_trace()
        for tracer in _tracers:
            tracer.trace_call(function, read, *args, **kwargs)

    return Target(module, name, report, trace, untouched)


def _own_attention(module: str, mechanism: Mechanism) -> Target:
    """This package's functions report themselves, from inside; a stand-in can only replace them."""
    name = f"{mechanism}_attention"

    def read(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> SeenAttention:
        arguments = {argument: arguments[argument] for argument in arguments if argument in _CALL_ARGUMENTS}
        return SeenAttention(AttentionCall(mechanism, query, key, **arguments))

    def report(*args: Any, **kwargs: Any) -> Callable[[], Any] | None:
        for replacer in tuple(_replacers):
            instead = replacer(f"stability.{name}", partial(read, *args, **kwargs), args, kwargs)
            if instead is not None:
                return instead
        return None

    return Target(module, name, report, lambda *_, **__: _refuse_to_trace())


def _refuse_to_trace() -> None:
    """Compiled code cannot be rerouted; unless it has to be one graph, torch then runs it as it is."""
    if _replacers:
        raise NotImplementedError(
            "attention in compiled code cannot be rerouted; run it without torch.compile inside "
            "replace_attention."
        )


# Without an input where it has another of torch's names (x=, a=): such a call is made, and not seen.
def _report_softmax(input: Any = None, dim: Any = None, *_: Any, **__: Any) -> Callable[[], Tensor] | None:
    if _is_over_last_axis(input, dim):
        for replacer in tuple(_softmax_replacers):
            if (instead := replacer(input)) is not None:
                return instead
        for observer in tuple(_softmax_observers):
            observer(input)
    return None


def _trace_softmax(input: Any = None, dim: Any = None, *_: Any, **__: Any) -> None:
    if _is_over_last_axis(input, dim):
        for tracer in _tracers:
            tracer.trace_softmax(input)


def _is_over_last_axis(input: Any, dim: Any) -> bool:
    return (
        isinstance(input, Tensor)
        and isinstance(dim, int)
        and input.dim() >= 2
        and dim in (-1, input.dim() - 1)
        and input.is_floating_point()
    )


def _read_torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> SeenAttention:
    """A torch call in our terms; [..., tokens, head_dim] becomes [batch, heads, tokens, head_dim]."""
    if query.is_nested or key.is_nested:
        raise UnseenAttentionError("its tensors are nested; pad them, or pass masks instead")
    num_own = 3 if enable_gqa else 2  # last axes that query and key have each of their own
    batch = torch.broadcast_shapes(query.shape[:-num_own], key.shape[:-num_own])
    query, key = (tensor.expand(*batch, *tensor.shape[-num_own:]) for tensor in (query, key))
    rank = query.dim()
    if attn_mask is not None:
        (attn_mask,) = cast_under_autocast(attn_mask)
        if rank != 4:  # the mask's axes are the query's last ones: heads stay heads
            attn_mask = attn_mask.reshape((1,) * (rank - attn_mask.dim()) + attn_mask.shape)
            if rank > 4:
                attn_mask = attn_mask.expand(*query.shape[:-2], *attn_mask.shape[-2:])
            attn_mask = _four_dimensional(attn_mask, num_own)
    query, key = (_four_dimensional(tensor, num_own) for tensor in (query, key))
    query, key = cast_under_autocast(query, key)
    return SeenAttention(AttentionCall("softmax", query, key, attn_mask, is_causal, scale, enable_gqa))


def _four_dimensional(tensor: Tensor, num_own: int) -> Tensor:
    """[batch, heads, tokens, dim]; of three axes the first is the heads where key has heads of its own."""
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        return tensor.unsqueeze(3 - num_own)
    return tensor.flatten(0, tensor.dim() - 4) if tensor.dim() > 4 else tensor


def _read_fast_path(*_: Any, **__: Any) -> NoReturn:
    raise UnseenAttentionError(
        "PyTorch takes its fused inference kernel where a module is in evaluation mode and no parameter "
        "requires a gradient; torch.backends.mha.set_fastpath_enabled(False) makes it visible"
    )


def _transformers_interfaces() -> Iterable[dict[str, Any]]:
    """Where Hugging Face transformers looks an attention implementation up by its name."""
    modeling_utils = sys.modules.get("transformers.modeling_utils")
    interface: Any = vars(modeling_utils).get("AttentionInterface") if modeling_utils else None
    mapping = getattr(interface, "_global_mapping", None)
    return [mapping] if isinstance(mapping, dict) else []


_CALL_ARGUMENTS = frozenset(field.name for field in fields(AttentionCall))

# transformers compiles the function it imported, and what is compiled must be the original.
_TRANSFORMERS_FLEX = "transformers.integrations.flex_attention"

_stand_ins = StandIns(
    [
        _attention("torch.nn.functional", "scaled_dot_product_attention", _read_torch_attention),
        _attention(
            "torch.nn.attention.flex_attention", "flex_attention", read_flex_attention, (_TRANSFORMERS_FLEX,)
        ),
        _attention("torch", "_native_multi_head_attention", _read_fast_path),
        _attention("torch", "_transformer_encoder_layer_fwd", _read_fast_path),
        _attention(_TRANSFORMERS_FLEX, "flex_attention_forward", read_transformers_flex_attention),
        _attention(
            "transformers.integrations.flash_attention",
            "flash_attention_forward",
            flash.read_transformers_flash_attention,
        ),
        _attention("flash_attn", "flash_attn_func", flash.read_flash_attn),
        _attention("flash_attn", "flash_attn_qkvpacked_func", flash.read_flash_attn_qkvpacked),
        _attention("flash_attn", "flash_attn_kvpacked_func", flash.read_flash_attn_kvpacked),
        _attention("flash_attn", "flash_attn_varlen_func", flash.read_flash_attn_varlen),
        _attention("flash_attn", "flash_attn_varlen_qkvpacked_func", flash.read_flash_attn_varlen),
        _attention("flash_attn", "flash_attn_varlen_kvpacked_func", flash.read_flash_attn_varlen),
        *(_own_attention(m, "softmax") for m in ("stability", "stability.attention")),
        *(_own_attention(m, "sigmoid") for m in ("stability", "stability.attention")),
        Target("torch", "softmax", _report_softmax, _trace_softmax),
        Target("torch.nn.functional", "softmax", _report_softmax, _trace_softmax),
        Target("torch", "Tensor.softmax", _report_softmax, _trace_softmax),
    ],
    _transformers_interfaces,
    opaque=[("torch.nn.functional", "multi_head_attention_forward")],
)
