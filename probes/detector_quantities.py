"""Whether what detectors read is ever recorded: one that reads a misspelt quantity would never speak."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from probes.failures import ProbeWarning, stacklevel_of_script
from probes.quantities import QUANTITIES
from probes.record import ALL_LAYERS
from stability.divergence import Detector, EpisodeDetector, LossDetector, QuantityRangeDetector, Readings

_USUAL_LOSS = "loss"  # the default detectors read it; who does not log it does without


def check_quantities(detectors: Iterable[Detector]) -> None:
    """Raises if a detector reads a quantity of layers that no probe records.

    What the script logs is no layer's, so this is known before anything is logged.
    """
    for detector in _single(detectors):
        if isinstance(detector, QuantityRangeDetector) and detector.quantity not in QUANTITIES:
            near = get_close_matches(detector.quantity, QUANTITIES)
            raise ValueError(
                "a QuantityRangeDetector must read a quantity that probes record of layers; got "
                f"{detector.quantity!r}. {_which(near, list(QUANTITIES))} Numbers of probe.log are no "
                "layer's."
            )


class AwaitedLosses:
    """Warns of detectors of a loss that the script does not log, though it logs others.

    Args:
        detectors: Those of a probe.
    """

    def __init__(self, detectors: Iterable[Detector]) -> None:
        names = {detector.name for detector in _single(detectors) if isinstance(detector, LossDetector)}
        self._awaited = names - {_USUAL_LOSS, *QUANTITIES}
        self._logged: dict[str, None] = {}
        self._num_steps = 0

    def see(self, readings: Readings) -> None:
        """Takes a step's numbers."""
        if not self._awaited:
            return
        self._num_steps += 1
        self._awaited -= readings.keys()
        self._logged |= dict.fromkeys(
            name for name, values in readings.items() if name not in QUANTITIES and ALL_LAYERS in values
        )

    def tell(self) -> None:
        """Warns, at the end: a validation loss may have come late."""
        for name in sorted(self._awaited) if self._logged else ():
            near = get_close_matches(name, self._logged)
            warnings.warn(
                f"LossDetector(name={name!r}) had nothing to judge: the script logged no such number in "
                f"{self._num_steps} steps. {_which(near, list(self._logged))}",
                ProbeWarning,
                stacklevel=stacklevel_of_script(),
            )
        self._awaited.clear()


def _single(detectors: Iterable[Detector]) -> Iterator[Detector]:
    for detector in detectors:
        if isinstance(detector, EpisodeDetector):
            yield from _single(detector.detectors)
        else:
            yield detector


def _which(near: list[str], known: list[str]) -> str:
    return f"Near names: {', '.join(near)}." if near else f"There are: {', '.join(known)}."
