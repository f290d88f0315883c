"""The line on the terminal, as a terminal would get it."""

from __future__ import annotations

import io
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.record import ALL_LAYERS, Series, StepRecords
from probes.sinks import ConsoleSink, console
from stability.divergence import Alert

SERIES = (
    Series(ALL_LAYERS, "loss"),
    Series(ALL_LAYERS, "grad_norm"),
    Series("blocks.0", "grad_norm"),
    Series("blocks.1", "grad_norm"),
)
ALERT = Alert(3, "blocks.1", "grad_norm", "warning", 1.0, None, "it rose.", kind="gradient-explosion")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return self.getvalue().split("\r\x1b[2K")


def step(number: int, *values: float) -> StepRecords:
    return StepRecords(number, SERIES, np.array(values), np.full(len(values), math.nan))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda: os.terminal_size((120, 24)))
    return now


def test_the_line_says_step_speed_loss_and_the_layer_with_the_largest_gradient(clock: list[float]) -> None:
    terminal = Terminal()
    sink = ConsoleSink(terminal)
    sink.write(step(0, 2.5, 9.0, 0.1, 0.7))
    clock[0] += 2.0
    sink.write(step(1000, 2.25, 9.0, 0.8, 0.7))
    sink.close()
    assert terminal.lines == [
        "",
        "step 0 · loss 2.5 · largest gradient 0.7 in blocks.1",
        "step 1,000 · 500 steps/s · loss 2.25 · largest gradient 0.8 in blocks.0\n",
    ]


def test_it_is_renewed_twice_a_second_at_most(clock: list[float]) -> None:
    terminal = Terminal()
    sink = ConsoleSink(terminal)
    for number in range(100):
        sink.write(step(number, 1.0, 1.0, 1.0, 1.0))
        clock[0] += 0.01
    assert len(terminal.lines) == 3


def test_what_is_not_finite_is_the_largest(clock: list[float]) -> None:
    terminal = Terminal()
    ConsoleSink(terminal).write(step(0, math.nan, 1.0, math.nan, 1e9))
    assert terminal.lines[-1] == "step 0 · loss nan · largest gradient nan in blocks.0"


def test_an_alert_wipes_the_line_and_is_told_in_the_next(clock: list[float]) -> None:
    terminal = Terminal()
    sink = ConsoleSink(terminal)
    sink.write(step(0, 1.0, 1.0, 1.0, 1.0))
    sink.write_alert(ALERT)
    assert terminal.getvalue().endswith("\r\x1b[2K")
    clock[0] += 1.0
    sink.write(step(1, 1.0, 1.0, 1.0, 1.0))
    assert "1 alert: gradient explosion in blocks.1" in terminal.lines[-1]


def test_a_mild_alert_does_not_hide_a_graver_one(clock: list[float]) -> None:
    terminal = Terminal()
    sink = ConsoleSink(terminal)
    kinds = ("logit-growth", "loss-spike", "weight-jump", "frozen-layer")
    for kind, told in zip(kinds, ("logit growth", "loss spike", "weight jump", "weight jump"), strict=True):
        sink.write_alert(replace(ALERT, kind=kind))
        sink.write(step(1, 1.0, 1.0, 1.0, 1.0))
        assert f": {told} in blocks.1" in terminal.lines[-1]
        clock[0] += 1.0
    assert "4 alerts: weight jump" in terminal.lines[-1]


def test_it_keeps_to_one_line_of_the_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    terminal = Terminal()
    ConsoleSink(terminal).write(step(0, 1.0, 1.0, 1.0, 1.0))
    assert terminal.lines[-1] == "step 0 · loss 1 · …"


def test_a_name_cannot_break_the_line(clock: list[float]) -> None:
    terminal = Terminal()
    series = (Series("a\nb\x1b[2J\udce9", "grad_norm"),)
    ConsoleSink(terminal).write(StepRecords(0, series, np.ones(1), np.ones(1)))
    assert terminal.lines[-1] == "step 0 · largest gradient 1 in a?b?[2J?"


def test_where_there_is_no_terminal_nothing_is_written() -> None:
    file = io.StringIO()
    sink = ConsoleSink(file)
    sink.write(step(0, 1.0, 1.0, 1.0, 1.0))
    sink.write_alert(ALERT)
    sink.close()
    assert file.getvalue() == ""


def test_a_training_with_it(clock: list[float]) -> None:
    terminal = Terminal()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, sinks=[ConsoleSink(terminal)]) as probe:
        for _ in range(3):
            loss = model(torch.randn(2, 4)).square().mean()
            probe.log(loss=loss)
            loss.backward()
            optimizer.step()
            clock[0] += 1.0
    assert terminal.lines[-1].startswith("step 2 · 1 steps/s · loss ")
    assert terminal.getvalue().endswith("\n")
