"""Softmax and sigmoid attention as drop-in functions with the same arguments."""

from __future__ import annotations

from stability.attention.api import observe, sigmoid_attention, softmax_attention
from stability.attention.call import AttentionCall

__all__ = ["AttentionCall", "observe", "sigmoid_attention", "softmax_attention"]
