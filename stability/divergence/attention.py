"""Attention that sharpens, saturates or couples as it should not: one detector per quantity.

They read what a probe records of attention calls, every tenth step by default. Limits come from the
literature where it has one; all are checked against the clean runs in docs/detectors.md.
"""

from __future__ import annotations

from stability.divergence.quantity_range import QuantityRangeDetector


def logit_growth_detector(
    *, limit: float = 12.0, ratio: float = 3.5, window: int = 5
) -> QuantityRangeDetector:
    """Attention logits that grow faster than learning makes them, which precedes loss spikes.

    Args:
        limit: Largest logit. Clean runs grow faster while their logits are small, and stay under 25.
        ratio: Largest logit over its median in the window. Calibrated: clean runs reach 2.8 beyond a logit of
            10.
        window: Measurements: at every tenth step, logits that grow by 5 % a step are 4.5 times the median of
            five.

    Source:
        Wortsman et al. 2309.14322; Dehghani et al. 2302.05442.

    Example:
        >>> detector = logit_growth_detector()
        >>> for step, value in enumerate([4.0, 4.5, 5.0, 5.5, 30.0]):
        ...     for alert in detector.update(step, {"attention/max_logit": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        4 logit-growth blocks.1
    """
    return QuantityRangeDetector(
        "attention/max_logit",
        "logit-growth",
        "attention logits grow",
        limit=limit,
        ratio=ratio,
        window=window,
    )


def large_logit_detector(*, limit: float = 100.0, ratio: float = 3.0) -> QuantityRangeDetector:
    """Attention logits that have grown large, however slowly.

    Args:
        limit: Largest logit: where QK-Clip (2507.20534) acts.
        ratio: Largest logit over its median.

    Source:
        As :func:`logit_growth_detector`.

    Example:
        >>> detector = large_logit_detector()
        >>> for step, value in enumerate([20.0, 25.0, 30.0, 35.0, 120.0]):
        ...     for alert in detector.update(step, {"attention/max_logit": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        4 logit-growth blocks.1
    """
    return QuantityRangeDetector(
        "attention/max_logit", "logit-growth", "attention logits have grown large", limit=limit, ratio=ratio
    )


def entropy_collapse_detector(
    *, limit: float = 1.5, ratio: float = 2.0, window: int = 8
) -> QuantityRangeDetector:
    """Attention rows that come down to few keys faster than learning makes them.

    Args:
        limit: Mean entropy of a row in nats; 0.69 is two keys with equal weights, 1.4 is four.
        ratio: Median entropy in the window over entropy. Calibrated: clean runs reach 1.4.
        window: Measurements.

    Source:
        Zhai et al. 2303.06296, who tie low attention entropy to divergence.

    Example:
        >>> detector = entropy_collapse_detector()
        >>> for step, value in enumerate([3.2, 3.1, 3.2, 3.0, 0.4]):
        ...     for alert in detector.update(step, {"attention/entropy": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        4 entropy-collapse blocks.1
    """
    return QuantityRangeDetector(
        "attention/entropy",
        "entropy-collapse",
        "attention collapses to few keys",
        bad="small",
        limit=limit,
        ratio=ratio,
        window=window,
    )


def saturation_detector(*, limit: float = 0.7, ratio: float = 1.5) -> QuantityRangeDetector:
    """Sigmoid weights that have saturated, whose derivative is gone.

    Args:
        limit: Share of weights above 0.99.
        ratio: Share over its median.

    Source:
        Ramapuram et al. 2409.04431; 2604.27124. The limit is calibrated.

    Example:
        >>> detector = saturation_detector()
        >>> for step, value in enumerate([0.1, 0.1, 0.12, 0.11, 0.9]):
        ...     for alert in detector.update(step, {"attention/saturated_share": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        4 saturation blocks.1
    """
    return QuantityRangeDetector(
        "attention/saturated_share", "saturation", "sigmoid attention saturates", limit=limit, ratio=ratio
    )


def row_sum_growth_detector(*, limit: float = 16.0, ratio: float = 8.0) -> QuantityRangeDetector:
    """Rows of sigmoid weights whose sum has left that of softmax, 1, far behind.

    Args:
        limit: Mean sum of a row.
        ratio: Sum over its median.

    Source:
        Large attention norms are what hurts sigmoid attention: Ramapuram et al. 2409.04431. Calibrated.

    Example:
        >>> detector = row_sum_growth_detector()
        >>> for step, value in enumerate([1.0, 1.1, 1.2, 1.1, 40.0]):
        ...     for alert in detector.update(step, {"attention/row_sum": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        4 row-sum-growth blocks.1
    """
    return QuantityRangeDetector(
        "attention/row_sum", "row-sum-growth", "sigmoid attention's rows have grown", limit=limit, ratio=ratio
    )


def jacobian_growth_detector(*, limit: float = 1.0, ratio: float = 4.0) -> QuantityRangeDetector:
    """Row Jacobians ∂weights/∂logits that pass on more than softmax's ever can.

    Args:
        limit: Frobenius norm; that of softmax is at most ½, so only sigmoid, with √n/4, can get there.
        ratio: Norm over its median.

    Source:
        docs/science.md; 2604.27124.

    Example:
        >>> detector = jacobian_growth_detector()
        >>> for step, value in enumerate([0.2, 0.2, 0.25, 0.2, 1.5]):
        ...     for alert in detector.update(step, {"attention/jacobian_frobenius": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        4 jacobian-growth blocks.1
    """
    return QuantityRangeDetector(
        "attention/jacobian_frobenius",
        "jacobian-growth",
        "attention's row Jacobian has grown",
        limit=limit,
        ratio=ratio,
    )


def dense_coupling_detector(*, limit: float = 0.45, ratio: float = 3.0) -> QuantityRangeDetector:
    """Softmax rows that have become a contest of two keys, each coupled to the other as densely as can be.

    Args:
        limit: Share of the row Jacobian's energy off the diagonal; two equal keys have 0.5.
        ratio: Share over its median.

    Source:
        docs/science.md; 2604.27124. The limit is calibrated.

    Example:
        >>> detector = dense_coupling_detector()
        >>> for step, value in enumerate([0.1, 0.1, 0.12, 0.11, 0.48]):
        ...     for alert in detector.update(step, {"attention/off_diagonal_share": {"blocks.1": value}}):
        ...         print(alert.step, alert.kind, alert.layer)
        4 dense-coupling blocks.1
    """
    return QuantityRangeDetector(
        "attention/off_diagonal_share",
        "dense-coupling",
        "attention's keys have become densely coupled",
        limit=limit,
        ratio=ratio,
    )
