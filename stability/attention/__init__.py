"""Softmax and sigmoid attention as drop-in functions with the same arguments."""

from __future__ import annotations

from stability.attention.api import observe, sigmoid_attention, softmax_attention
from stability.attention.call import AttentionCall
from stability.attention.report import report_attention

__all__ = ["AttentionCall", "observe", "report_attention", "sigmoid_attention", "softmax_attention"]
