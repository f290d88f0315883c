"""Softmax and sigmoid attention as drop-in functions with the same arguments."""

from __future__ import annotations

from stability.attention.api import explain, sigmoid_attention, softmax_attention
from stability.attention.call import AttentionCall
from stability.attention.dispatch import Explanation
from stability.attention.observers import observe
from stability.attention.report import report_attention
from stability.attention.varlen import sigmoid_attention_varlen

__all__ = [
    "AttentionCall",
    "Explanation",
    "explain",
    "observe",
    "report_attention",
    "sigmoid_attention",
    "sigmoid_attention_varlen",
    "softmax_attention",
]
