"""The mathematics of training stability: attention mechanisms, their Jacobians, bounds and divergence."""

from stability.attention import AttentionCall, sigmoid_attention, sigmoid_attention_varlen, softmax_attention
from stability.attention.replacement import replace_attention
from stability.attention.statistics import AttentionStatistics, attention_statistics
from stability.bounds import (
    SIGMOID_DERIVATIVE_BOUND,
    SOFTMAX_JACOBIAN_ENTRY_BOUND,
    SOFTMAX_JACOBIAN_SPECTRAL_BOUND,
    BoundCheck,
    verify_sigmoid_derivative_bound,
    verify_sigmoid_derivative_bound_on_reals,
    verify_softmax_jacobian_bounds,
)
from stability.jacobian import (
    JacobianNorms,
    sigmoid_jacobian,
    sigmoid_jacobian_norms,
    softmax_jacobian,
    softmax_jacobian_norms,
    softmax_spectral_norm,
)
from stability.layer_jacobian import LayerJacobianNorms, layer_jacobian_norms

__all__ = [
    "SIGMOID_DERIVATIVE_BOUND",
    "SOFTMAX_JACOBIAN_ENTRY_BOUND",
    "SOFTMAX_JACOBIAN_SPECTRAL_BOUND",
    "AttentionCall",
    "AttentionStatistics",
    "BoundCheck",
    "JacobianNorms",
    "LayerJacobianNorms",
    "attention_statistics",
    "layer_jacobian_norms",
    "replace_attention",
    "sigmoid_attention",
    "sigmoid_attention_varlen",
    "sigmoid_jacobian",
    "sigmoid_jacobian_norms",
    "softmax_attention",
    "softmax_jacobian",
    "softmax_jacobian_norms",
    "softmax_spectral_norm",
    "verify_sigmoid_derivative_bound",
    "verify_sigmoid_derivative_bound_on_reals",
    "verify_softmax_jacobian_bounds",
]
