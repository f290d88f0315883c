"""Detectors of divergence: plain numbers in, verdicts out. One file per family of detectors."""

from stability.divergence.attention import (
    dense_coupling_detector,
    entropy_collapse_detector,
    jacobian_growth_detector,
    large_logit_detector,
    logit_growth_detector,
    row_sum_growth_detector,
    saturation_detector,
)
from stability.divergence.detector import ALL_LAYERS, Alert, Detector, Readings
from stability.divergence.episodes import Episode, EpisodeDetector
from stability.divergence.frozen_layer import FrozenLayerDetector
from stability.divergence.gradient_explosion import GradientExplosionDetector
from stability.divergence.initialisation import InitialisationDetector
from stability.divergence.loss import LossDetector
from stability.divergence.nonfinite import NonFiniteDetector
from stability.divergence.quantity_range import QuantityRangeDetector
from stability.divergence.remedies import REMEDIES
from stability.divergence.update_size import update_ratio_detector, update_rms_detector
from stability.divergence.vanishing_gradient import VanishingGradientDetector
from stability.divergence.weight_jump import WeightJumpDetector

__all__ = [
    "ALL_LAYERS",
    "REMEDIES",
    "Alert",
    "Detector",
    "Episode",
    "EpisodeDetector",
    "FrozenLayerDetector",
    "GradientExplosionDetector",
    "InitialisationDetector",
    "LossDetector",
    "NonFiniteDetector",
    "QuantityRangeDetector",
    "Readings",
    "VanishingGradientDetector",
    "WeightJumpDetector",
    "default_detectors",
    "dense_coupling_detector",
    "entropy_collapse_detector",
    "jacobian_growth_detector",
    "large_logit_detector",
    "logit_growth_detector",
    "row_sum_growth_detector",
    "saturation_detector",
    "update_ratio_detector",
    "update_rms_detector",
]


def default_detectors() -> list[Detector]:
    """Fresh detectors, as :func:`probes.attach` uses them when none are given: all of them, as one voice.

    Example:
        >>> [type(detector).__name__ for detector in default_detectors()]
        ['EpisodeDetector']
    """
    return [
        EpisodeDetector(
            [
                NonFiniteDetector(),
                WeightJumpDetector(),
                InitialisationDetector(),
                GradientExplosionDetector(),
                GradientExplosionDetector("activation_grad_norm"),
                VanishingGradientDetector(),
                LossDetector(),
                logit_growth_detector(),
                large_logit_detector(),
                entropy_collapse_detector(),
                saturation_detector(),
                row_sum_growth_detector(),
                jacobian_growth_detector(),
                dense_coupling_detector(),
                update_rms_detector(),
                update_ratio_detector(),
                FrozenLayerDetector(),
            ]
        )
    ]
