"""What a probe writes stands on the page of a real TensorBoard server, in a real browser."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.record import ALL_LAYERS, Series, StepRecords
from probes.sinks import TensorBoardSink
from stability.divergence import Alert

pytest.importorskip("selenium")

ROOT = Path(__file__).parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs `chromium` and `chromedriver` on the PATH (Debian: chromium, chromium-driver)",
    ),
]


def test_tensorboard_draws_a_card_per_layer(tmp_path: Path) -> None:
    screenshots = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    for name in ("first", "second"):
        model = nn.Sequential(nn.Linear(4, 8), *(nn.Linear(8, 8) for _ in range(10)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with probes.attach(model, optimizer, log_dir=tmp_path / "runs" / name):
            for _ in range(5):
                model(torch.randn(16, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    picture = tmp_path / "page.png"
    with screenshots["serve_tensorboard"](tmp_path / "runs") as address:
        lines = screenshots["screenshot"](address, picture, tags="^grad_norm/(2|10)$", runs="first|second")

    # One line a run; numbers in their order, so that layers of a model are too.
    assert list(lines.items()) == [("grad_norm/2", 2), ("grad_norm/10", 2)]
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


@pytest.fixture(scope="module")
def stress_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The top rung of the laptop's ladder."""
    from experiments.stress_test import main

    log_dir = tmp_path_factory.mktemp("runs")
    arguments = ["--learning-rates", "3", "--seeds", "0", "--steps", "30", "--log-dir", str(log_dir)]
    assert main(arguments) == 0
    return log_dir


def test_what_a_person_sees_of_the_stress_test(stress_runs: Path, tmp_path: Path) -> None:
    screenshots = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    with screenshots["serve_tensorboard"](stress_runs) as address:

        def page(name: str, **arguments: Any) -> dict[str, Any]:
            return screenshots["photograph"](address, tmp_path / f"{name}.png", name, **arguments)

        overview = page("custom_scalars", is_dark=True)
        pictures = page("images", tags="grad_norm")
        words = page("text")
        ladder = page("hparams")

    for chart in (
        "log10 gradient norm: model, worst layer",
        "Attention entropy (nats): min, median, max of layers",
        "log10 largest logit: min, median, max of layers",
        "Softmax against sigmoid: Jacobian norm, median",
        "Alerts so far (see Text)",
        "Alerts by layer: 1 warning, 2 divergence",
    ):
        assert chart in overview["text"]
    assert overview["lines"] > 100
    assert "heat_map/grad_norm" in pictures["text"]
    assert 700 in pictures["images"]  # at its actual size
    alerts = [alert for run in stress_runs.glob("*-lr3-*") for alert in probes.read(run).alerts]
    assert alerts
    assert "alerts/text_summary" in words["text"]
    assert any(alert.reason in words["text"] for alert in alerts)
    assert "CellTransformer" in words["text"]
    for word in ("overview/peak_grad_norm", "mechanism", "sigmoid", "2.59"):
        assert word in ladder["text"]
    for name in ("custom_scalars", "images", "text", "hparams"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG_SIGNATURE)


def test_an_alert_of_the_whole_model_is_drawn_as_that_of_a_layer(tmp_path: Path) -> None:
    screenshots = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    for name, layer in (("none", None), ("layer", "a"), ("whole", ALL_LAYERS)):
        sink = TensorBoardSink(tmp_path / name)
        sink.write(StepRecords(0, (Series("a", "grad_norm"),), np.ones(1), np.full(1, math.nan)))
        if layer is not None:
            sink.write_alert(Alert(0, layer, "grad_norm", "warning", 1.0, None, "it rose.", kind="explosion"))
        sink.close()
    with screenshots["serve_tensorboard"](tmp_path) as address:
        none, of_layer, of_whole = (
            screenshots["photograph"](address, tmp_path / f"{run}.png", "custom_scalars", runs=run)["lines"]
            for run in ("none", "layer", "whole")
        )
    assert none < of_layer == of_whole


def test_a_server_goes_on_while_files_are_thinned(tmp_path: Path) -> None:
    screenshots = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    series = tuple(Series(f"layer.{i}", "grad_norm") for i in range(200))
    sink = TensorBoardSink(tmp_path, max_megabytes=1)

    def write(steps: range) -> None:
        for step in steps:
            sink.write(StepRecords(step, series, np.ones(200), np.full(200, math.nan)))

    def served() -> list[int]:
        query = urllib.parse.urlencode({"run": ".", "tag": "grad_norm/layer.7"})
        with urllib.request.urlopen(f"{address}/data/plugin/scalars/scalars?{query}") as answer:
            return [step for _, step, _ in json.load(answer)]

    write(range(20))
    with screenshots["serve_tensorboard"](tmp_path) as address:
        before = served()
        write(range(20, 1000))
        expected = probes.read(tmp_path)["grad_norm/layer.7"].steps.tolist()
        deadline = time.monotonic() + 60
        while not set(expected) <= set(served()) and time.monotonic() < deadline:
            time.sleep(0.5)
        steps = served()
    assert before == list(range(20))
    assert sink._files.stride > 4
    assert steps == sorted(set(steps))
    assert set(expected) <= set(steps)
    sink.close()


def test_server_without_runs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screenshots = runpy.run_path(str(ROOT / "docs" / "make_screenshots.py"))
    serve = screenshots["serve_tensorboard"]
    monkeypatch.setitem(serve.__wrapped__.__globals__, "TIMEOUT", 5.0)
    with pytest.raises(RuntimeError, match="shows no run of"), serve(tmp_path):
        pass
