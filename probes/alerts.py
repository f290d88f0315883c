"""What happens when a detector speaks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from stability.divergence import Alert

OnDivergence = str | Callable[[Alert], None]

_ACTIONS = ("ignore", "warn", "raise")


class DivergenceError(RuntimeError):
    """Training diverged, and ``on_divergence="raise"`` asked to stop it.

    Attributes:
        alert: The verdict.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(str(alert))
        self.alert = alert


class DivergenceWarning(UserWarning):
    """A detector's verdict, as a Python warning."""


class AlertAction:
    """Carries out ``on_divergence``.

    Args:
        on_divergence: "ignore", "warn", "raise" or a function that takes the alert.

    Raises:
        ValueError: If it is none of these.
    """

    def __init__(self, on_divergence: OnDivergence) -> None:
        if not callable(on_divergence) and on_divergence not in _ACTIONS:
            raise ValueError(
                f"`on_divergence` must be one of {_ACTIONS} or a function; got {on_divergence!r}."
            )
        self._on_divergence = on_divergence
        self._warned: set[tuple[str, str]] = set()

    def __call__(self, alert: Alert) -> None:
        """Ignores, warns once per kind of alert, raises on divergence, or calls the user's function."""
        if callable(self._on_divergence):
            self._on_divergence(alert)
        elif self._on_divergence == "raise" and alert.severity == "divergence":
            raise DivergenceError(alert)
        elif self._on_divergence != "ignore" and (alert.quantity, alert.severity) not in self._warned:
            self._warned.add((alert.quantity, alert.severity))
            warnings.warn(f"{alert} (seen one recorded step later)", DivergenceWarning, stacklevel=2)
