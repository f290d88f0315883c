"""What usually helps, by kind of alert, with its literature (arXiv numbers)."""

from __future__ import annotations

from stability.divergence.detector import Readings

_QK_NORM = "qk-norm: normalise queries and keys (2302.05442)"
_QK_CLIP = "QK-clip: rescale query and key weights where the largest logit passes 100 (2507.20534)"
_Z_LOSS = "z-loss on the output logits (2204.02311; 2309.14322)"
_CLIPPING = "clip the gradient norm (1211.5063), or by its own history (ZClip, 2504.02507; AdaGC, 2502.11034)"
_BETA2 = "lower Adam's beta2 to 0.95-0.99, or clip updates by their RMS as StableAdamW does (2304.13013)"
_WARM_UP = "longer warm-up, lower peak learning rate (2309.14322; 2406.09405)"
_SIGMOID = "sigmoid attention in place of softmax: its row Jacobian is diagonal (2409.04431; 2604.27124)"
_SIGMOID_BIAS = "sigmoid attention's bias at -ln n, or a norm behind it (2409.04431; 2604.27124)"
_SIGMA_REPARAM = "sigma-reparametrisation of the projections (2303.06296)"
_SKIP = "skip the batch, or go back to the last good checkpoint and past it (PaLM, 2204.02311)"
_INITIALISATION = "initialise by fan-in (1502.01852), projections into a residual stream by 1/sqrt(2 layers)"

REMEDIES: dict[str, tuple[str, ...]] = {
    "non-finite": (
        "the batch and the layer's input first; then loss scaling or bfloat16 (1710.03740)",
        "go back to the last good checkpoint: weights that hold NaN do not recover",
        _CLIPPING,
    ),
    "gradient-explosion": (_CLIPPING, _WARM_UP, _QK_NORM),
    "vanishing-gradient": (_INITIALISATION, "residual connections, normalisation before layers (2002.04745)"),
    "dead-layer": ("leaky ReLU or GELU, smaller learning rate (1903.06733)", _INITIALISATION),
    "loss-spike": (_SKIP, _Z_LOSS, _BETA2, "look at the batch and its labels"),
    "frozen-layer": (
        "an Adam that forgets its first steps: beta2 0.95 in place of 0.999; a smaller epsilon where "
        "gradients are below it",
        "the residual stream: what one layer adds without bound, layer norm divides out of all others",
        _WARM_UP,
    ),
    "entropy-collapse": (_QK_NORM, _SIGMA_REPARAM, _SIGMOID, _WARM_UP),
    "logit-growth": (_QK_NORM, _QK_CLIP, _WARM_UP),
    "saturation": (_SIGMOID_BIAS, _QK_NORM),
    "row-sum-growth": (_SIGMOID_BIAS,),
    "jacobian-growth": (_SIGMOID_BIAS, _QK_NORM),  # softmax cannot reach the limit
    "dense-coupling": (_SIGMOID, _QK_NORM),
    "update-rms": (_BETA2, _WARM_UP),
    "update-ratio": (_WARM_UP, "a learning rate of its own for the layer (muP, 2203.03466)"),
    "weight-jump": (
        "go back to the last good checkpoint; see what wrote to these weights or their optimizer state",
        _BETA2,
        _WARM_UP,
    ),
    "initialisation": (_INITIALISATION, "muP (2203.03466)"),
}
"""Kind → remedies, the likeliest first."""


def remedies_for(kind: str, layer: str, readings: Readings) -> tuple[str, ...]:
    """Those of a kind that the layer can follow: not sigmoid attention, where its attention is sigmoid.

    Args:
        kind: Of an alert; one that is not known has no remedies.
        layer: Where it began.
        readings: Of the alert's step. Row sums are recorded of sigmoid attention alone: softmax's are 1.

    Example:
        >>> with_row_sum = {"attention/entropy": {"a": 0.1}, "attention/row_sum": {"a": 1.0}}
        >>> set(REMEDIES["entropy-collapse"]) - set(remedies_for("entropy-collapse", "a", with_row_sum))
        {'sigmoid attention in place of softmax: its row Jacobian is diagonal (2409.04431; 2604.27124)'}
    """
    is_sigmoid = layer in readings.get("attention/row_sum", {})
    return tuple(remedy for remedy in REMEDIES.get(kind, ()) if not (is_sigmoid and remedy == _SIGMOID))
