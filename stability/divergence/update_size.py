"""Updates that are too large for their weights or for Adam's second moment: one detector per quantity.

They read what a probe records in detail, every two hundredth step by default.
"""

from __future__ import annotations

from stability.divergence.quantity_range import QuantityRangeDetector


def update_rms_detector(*, limit: float = 10.0, ratio: float = 3.0) -> QuantityRangeDetector:
    """Gradients that Adam's second moment has not caught up with.

    Args:
        limit: √mean(g²/v̂). Above 2.3 in an early layer a loss spike follows within 8 steps (2304.13013);
            clean runs on small batches reach 4.
        ratio: The same over its median.

    Source:
        Wortsman et al. 2304.13013 §3.

    Example:
        >>> detector = update_rms_detector()
        >>> for step, value in enumerate([1.0, 1.1, 30.0]):
        ...     for alert in detector.update(step, {"adam_update_rms": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        2 update-rms blocks.1
    """
    return QuantityRangeDetector(
        "adam_update_rms",
        "update-rms",
        "gradients are larger than Adam's second moment knows",
        limit=limit,
        ratio=ratio,
        min_history=1,
    )


def update_ratio_detector(*, limit: float = 0.3, ratio: float = 3.0) -> QuantityRangeDetector:
    """Updates of the size of their weights.

    Args:
        limit: Norm of the change over norm of the weights. About 1e-3 is usual practice; clean runs of small
            models reach 0.1 after the first steps.
        ratio: The same over its median.

    Source:
        Common practice (Karpathy); the limit is calibrated.

    Example:
        >>> detector = update_ratio_detector()
        >>> for step, value in enumerate([1e-3, 1e-3, 0.8]):
        ...     for alert in detector.update(step, {"update_ratio": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        2 update-ratio blocks.1
    """
    return QuantityRangeDetector(
        "update_ratio",
        "update-ratio",
        "updates are as large as their weights",
        limit=limit,
        ratio=ratio,
        min_history=1,
    )
