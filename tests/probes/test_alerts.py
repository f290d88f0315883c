"""What an alert does on the host: warnings, the terminal, errors, the user's function."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import probes
from probes.alerts import AlertAction
from stability.divergence import Alert

WARNING = Alert(7, "blocks.1", "loss", "warning", 2.0, 1.0, "it rose.", kind="loss-spike", remedies=("wait",))
DIVERGENCE = Alert(8, "blocks.2", "grad_norm", "divergence", 9.0, 1.0, "it exploded.", kind="explosion")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_warns_once_per_kind_and_severity() -> None:
    action = AlertAction("warn")
    with pytest.warns(probes.DivergenceWarning) as caught:
        for alert in (WARNING, WARNING, DIVERGENCE, WARNING, DIVERGENCE):
            action(alert)
    assert [str(warning.message) for warning in caught] == [
        "step 7: warning in blocks.1: it rose. (seen one recorded step later)",
        "step 8: divergence in blocks.2: it exploded. (seen one recorded step later)",
    ]


def test_the_warning_points_at_the_line_of_the_script() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = probes.attach(model, optimizer, every=0, details_every=0, activations_every=0)
    probe.log(loss=float("nan"))
    optimizer.step()
    with pytest.warns(probes.DivergenceWarning) as caught:
        optimizer.step()
        probe.close()
    assert [warning.filename for warning in caught] == [__file__]


def test_the_warning_says_where_the_report_is(tmp_path: Path) -> None:
    with pytest.warns(probes.DivergenceWarning, match=r"one recorded step later; .*report\.html\)"):
        AlertAction("warn")(WARNING, tmp_path)


def test_on_a_terminal_it_is_shown_with_its_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.warns(probes.DivergenceWarning):
        AlertAction("warn")(WARNING)
    shown = terminal.getvalue()
    assert "loss-spike in blocks.1" in shown
    assert "• wait" in shown


def test_markup_in_a_name_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.warns(probes.DivergenceWarning):
        AlertAction("warn")(Alert(0, "experts[0][/red]", "loss", "warning", 1.0, None, "it [bold]rose."))
    assert "experts[0][/red]" in terminal.getvalue()
    assert "[bold]" in terminal.getvalue()


def test_without_rich_the_python_warning_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.warns(probes.DivergenceWarning):
        AlertAction("warn")(WARNING)


def test_without_a_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(probes.DivergenceWarning):
        AlertAction("warn")(WARNING)
    assert capsys.readouterr() == ("", "")


def test_raise_raises_on_divergence_only_and_says_when_it_was_seen() -> None:
    action = AlertAction("raise")
    with pytest.warns(probes.DivergenceWarning):
        action(WARNING)
    with pytest.raises(probes.DivergenceError, match=r"exploded\. \(seen one recorded step later\)") as error:
        action(DIVERGENCE)
    assert error.value.alert is DIVERGENCE


@pytest.mark.parametrize("on_divergence", ["raise", "skip", "warn"])
def test_in_the_same_step_the_text_says_so(on_divergence: str) -> None:
    with pytest.warns(probes.DivergenceWarning, match="seen before the update"):
        AlertAction(on_divergence, same_step=True)(WARNING)


def test_a_left_out_update_is_said_to_be() -> None:
    with pytest.warns(probes.DivergenceWarning, match=r"\(seen before the update, which is left out\)"):
        AlertAction("skip", same_step=True)(DIVERGENCE)


def test_a_function_gets_every_alert() -> None:
    alerts: list[Alert] = []
    action = AlertAction(alerts.append)
    for alert in (WARNING, WARNING, DIVERGENCE):
        action(alert)
    assert alerts == [WARNING, WARNING, DIVERGENCE]


def test_ignore(recwarn: pytest.WarningsRecorder) -> None:
    AlertAction("ignore")(DIVERGENCE)
    assert not recwarn.list
