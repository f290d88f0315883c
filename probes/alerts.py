"""What happens when a detector speaks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from probes.failures import stacklevel_of_script
from stability.divergence import Alert

OnDivergence = str | Callable[[Alert], None]

_ACTIONS = ("ignore", "warn", "raise", "skip", "restore")


class DivergenceError(RuntimeError):
    """Training diverged, and ``on_divergence`` asked to stop it.

    Attributes:
        alert: The verdict.

    Example:
        >>> import torch, probes
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> try:
        ...     with probes.attach(model, optimizer, on_divergence="raise") as probe:
        ...         model(torch.full((1, 2), torch.nan)).sum().backward()
        ...         optimizer.step()
        ... except probes.DivergenceError as error:
        ...     print(error.alert.kind, error.alert.layer, error.alert.step)
        non-finite (root) 0
    """

    def __init__(self, alert: Alert, remark: str = "") -> None:
        super().__init__(f"{alert}{remark}")
        self.alert = alert


class DivergenceWarning(UserWarning):
    """A detector's verdict, as a Python warning.

    Example:
        >>> import warnings, torch, probes
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", probes.DivergenceWarning)
        ...     with probes.attach(model, optimizer) as probe:
        ...         model(torch.full((1, 2), torch.nan)).sum().backward()
        ...         optimizer.step()
        >>> [warning.category.__name__ for warning in caught]
        ['DivergenceWarning']
    """


class AlertAction:
    """Carries out ``on_divergence``.

    Args:
        on_divergence: "ignore", "warn", "raise", "skip", "restore" or a function that takes the alert.
            Skipping and restoring are done by :class:`probes.same_step.SameStep`; here they warn.
        same_step: Whether verdicts come before the optimizer steps.
        warns: Whether this process is the one that tells people; all raise and call the function.

    Raises:
        ValueError: If it is none of these, or can only be done in the same step.
    """

    def __init__(self, on_divergence: OnDivergence, *, same_step: bool = False, warns: bool = True) -> None:
        if not callable(on_divergence) and on_divergence not in _ACTIONS:
            raise ValueError(
                f"`on_divergence` must be one of {_ACTIONS} or a function; got {on_divergence!r}."
            )
        if on_divergence in ("skip", "restore") and not same_step:
            raise ValueError(
                f'on_divergence="{on_divergence}" must act before the optimizer steps; add same_step=True, '
                "which costs one synchronisation of the device at every recorded step."
            )
        self._on_divergence = on_divergence
        self._warns = warns
        self._when = "seen before the update" if same_step else "seen one recorded step later"
        self._warned: set[tuple[str, str]] = set()

    @property
    def leaves_out_updates(self) -> bool:
        """Whether the update of a step that diverges is left out."""
        return self._on_divergence in ("skip", "restore")

    @property
    def restores(self) -> bool:
        """Whether weights and optimizer state go back to the last good snapshot."""
        return self._on_divergence == "restore"

    def __call__(self, alert: Alert, report: Path | None = None) -> None:
        """Ignores, warns once per kind of alert, raises on divergence, or calls the user's function.

        Args:
            alert: The verdict.
            report: The incident's folder, if one was written.
        """
        what_follows = ""
        if self.leaves_out_updates and alert.severity == "divergence":
            what_follows = ", which is left out"
        where = "" if report is None else f"; {report}/report.html"
        remark = f" ({self._when}{what_follows}{where})"
        if callable(self._on_divergence):
            self._on_divergence(alert)
        elif self._on_divergence == "raise" and alert.severity == "divergence":
            raise DivergenceError(alert, remark)
        elif self._on_divergence != "ignore" and self._warns:
            kind = (alert.name, alert.severity)
            if kind not in self._warned:
                self._warned.add(kind)
                _print(alert, remark)
                warnings.warn(f"{alert}{remark}", DivergenceWarning, stacklevel=stacklevel_of_script())


def gravity(alert: Alert) -> int:
    """0 of a condition, 1 of an event (a jump, a spike), 2 of divergence: what a person is told of first."""
    return 2 if alert.severity == "divergence" else int(alert.is_event)


def _print(alert: Alert, remark: str) -> None:
    """Shows an alert on the terminal, if there is one and rich is installed."""
    if not sys.stderr.isatty():
        return
    try:
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text
    except ImportError:
        return
    lines = [f"{alert.reason}{remark}", *(f"• {remedy}" for remedy in alert.remedies)]
    title = f"step {alert.step}: {alert.name} in {alert.layer}"
    colour = "red" if alert.severity == "divergence" else "yellow"
    Console(stderr=True).print(
        Panel(Text("\n".join(lines)), title=Text(title), border_style=colour, title_align="left")
    )
