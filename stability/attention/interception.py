"""Sees the attention calls a program makes, its own and this package's, without changing them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from stability.attention import flash
from stability.attention.autocast import cast_under_autocast
from stability.attention.call import AttentionCall
from stability.attention.flex import read_flex_attention, read_transformers_flex_attention
from stability.attention.observers import observe
from stability.attention.report import observe_reports
from stability.attention.seen import SeenAttention, UnseenAttentionError
from stability.attention.stand_ins import StandIns, Target

Observer = Callable[[str, Callable[[], SeenAttention]], None]
SoftmaxObserver = Callable[[Tensor], None]


@contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
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

    with observe(see_own), observe_reports(see_report), _watching(_observers, observer):
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


_observers: list[Observer] = []
_softmax_observers: list[SoftmaxObserver] = []


@contextmanager
def _watching(observers: list[Any], observer: Any) -> Iterator[None]:
    if not _observers and not _softmax_observers:
        _stand_ins.install()
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)
        if not _observers and not _softmax_observers:
            _stand_ins.remove()


def _attention(
    module: str, name: str, read: Callable[..., SeenAttention], untouched: tuple[str, ...] = ()
) -> Target:
    function = f"{module}.{name}"

    def report(*args: Any, **kwargs: Any) -> None:
        for observer in tuple(_observers):
            observer(function, partial(read, *args, **kwargs))

    return Target(module, name, report, untouched)


def _report_softmax(input: Any, dim: Any = None, *_: Any, **__: Any) -> None:
    if not _softmax_observers or not isinstance(input, Tensor) or not isinstance(dim, int):
        return
    if input.dim() >= 2 and dim in (-1, input.dim() - 1) and input.is_floating_point():
        for observer in tuple(_softmax_observers):
            observer(input)


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
    rank = query.dim()
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]) if not enable_gqa else None
    if batch is not None:
        query, key = query.expand(*batch, -1, -1), key.expand(*batch, -1, -1)
    query, key = cast_under_autocast(_four_dimensional(query), _four_dimensional(key))
    if attn_mask is not None:
        (attn_mask,) = cast_under_autocast(attn_mask)
        if rank != 4:  # the mask's axes are the query's last ones: heads stay heads
            attn_mask = attn_mask.reshape((1,) * (rank - attn_mask.dim()) + attn_mask.shape)
            if rank > 4 and batch is not None:
                attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-2:])
            attn_mask = _four_dimensional(attn_mask)
    return SeenAttention(AttentionCall("softmax", query, key, attn_mask, is_causal, scale, enable_gqa))


def _four_dimensional(tensor: Tensor) -> Tensor:
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
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
        Target("torch", "softmax", _report_softmax),
        Target("torch", "Tensor.softmax", _report_softmax),  # functional.softmax comes here too
    ],
    _transformers_interfaces,
)
