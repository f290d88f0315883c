"""Detectors of divergence: plain numbers in, verdicts out. One file per family of detectors."""

from stability.divergence.detector import ALL_LAYERS, Alert, Detector, Readings
from stability.divergence.gradient_explosion import GradientExplosionDetector
from stability.divergence.nonfinite import NonFiniteDetector

__all__ = [
    "ALL_LAYERS",
    "Alert",
    "Detector",
    "GradientExplosionDetector",
    "NonFiniteDetector",
    "Readings",
    "default_detectors",
]


def default_detectors() -> list[Detector]:
    """Fresh detectors, as :func:`probes.attach` uses them when none are given.

    Example:
        >>> [type(detector).__name__ for detector in default_detectors()]
        ['NonFiniteDetector', 'GradientExplosionDetector']
    """
    return [NonFiniteDetector(), GradientExplosionDetector()]
