"""The report of runs as a user asks for it: from every kind of file, whole, cut short or empty."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import probes
from probes.flight_recorder import FlightRecorder
from probes.flight_recorder_file import FILE_NAME
from probes.reading import RecordedSeries
from probes.record import ALL_LAYERS, Series, StepRecords
from probes.report import main, print_report, write_report
from probes.report_page import drawn, html, ranking_rows
from probes.reported_run import ReportedRun, load_runs, reported_run
from probes.sinks import JsonLinesSink, TensorBoardSink
from probes.sinks.sink import Sink
from stability.divergence import Alert

LAYERS = [f"blocks.{index}.attention" for index in range(12)]
SERIES = (
    *(Series(layer, "attention/entropy") for layer in LAYERS),
    *(Series(layer, "grad_norm") for layer in LAYERS),
    Series(ALL_LAYERS, "grad_norm"),
    Series(ALL_LAYERS, "loss"),
)
ALERT = Alert(
    60,
    "blocks.7.attention",
    "attention/entropy",
    "divergence",
    0.01,
    3.0,
    "entropy fell to 0.01 <nats>.",
    kind="entropy-collapse",
    onset_step=41,
    evidence=((50, 1.0), (60, 0.01)),
    spread=("blocks.8.attention",),
    remedies=("QK-norm (2302.05442).",),
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def feed(sink: Sink, steps: int, *, alert: bool = True, broken: int | None = 7) -> None:
    generator = np.random.default_rng(0)
    for step in range(steps):
        values = generator.lognormal(sigma=0.1, size=len(SERIES))
        if broken is not None and step > 40:
            values[broken] *= 0.7 ** (step - 40)
        sink.write(StepRecords(step, SERIES, values, np.full(len(SERIES), np.nan)))
    if alert:
        sink.write_alert(ALERT)
    sink.close()


def page_of(*directories: Path) -> str:
    """The page alone: drawing the pictures takes most of a report's time."""
    runs = load_runs(directories)
    return html(runs, drawn(runs))


def text_of(page: str) -> str:
    """Tags away, for what a reader reads."""
    without = re.sub(r"<style>.*?</style>|<title>.*?</title>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", without))


def headline(page: str) -> str:
    return re.search(r"<h1>(.*?)</h1>", page)[1]


def sinks(folder: Path) -> list[Sink]:
    return [
        JsonLinesSink(folder / "lines" / "run.jsonl"),
        TensorBoardSink(folder / "events"),
        FlightRecorder(folder / "recorder" / FILE_NAME, steps=128, values_per_step=64),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    feed(JsonLinesSink(folder / "softmax" / "run.jsonl"), 80)
    feed(JsonLinesSink(folder / "sigmoid" / "run.jsonl"), 100, alert=False, broken=None)
    feed(TensorBoardSink(folder / "events"), 80)
    feed(JsonLinesSink(folder / "unjudged" / "run.jsonl"), 80, alert=False)
    return folder


@pytest.mark.parametrize("kind", ["softmax", "events"])
def test_the_page_names_layer_step_and_fault_first(runs: Path, kind: str) -> None:
    page = page_of(runs / kind)
    assert headline(page) == f"{kind}: entropy collapse in blocks.7.attention"
    first = text_of(page).split("In numbers")[0]
    for words in ("began in blocks.7.attention", "step 41", "QK-norm (2302.05442)", "nats"):
        assert words in first


def test_without_alerts_the_page_tells_what_is_plain(runs: Path) -> None:
    page = page_of(runs / "unjudged")
    assert headline(page) == "unjudged: attention/entropy left its range in blocks.7.attention"
    assert headline(page_of(runs / "sigmoid")) == "sigmoid: Nothing stands out"


def test_the_page_needs_nothing_else_and_its_pictures_are_well_formed(runs: Path) -> None:
    text = page_of(runs / "softmax", runs / "sigmoid")
    addresses = re.findall(r'(?:src|href)="([^"]{0,30})|url\(([^)]*)\)|@import', text)
    assert addresses
    assert all(found[0].startswith("data:image/png;base64,") for found in addresses)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 4  # heat maps of entropy and gradients, curves of gradients and loss
    for svg in pictures:
        words = "".join(ElementTree.fromstring(svg).itertext())
        assert re.search(r"\((nats|loss per weight|as logged)\), (log|linear) scale", words)
        assert "step" in words
    assert "<script" not in text
    assert "entropy fell to 0.01 &lt;nats&gt;" in text
    assert "softmax" in text_of(text)
    assert "sigmoid" in text_of(text)


def test_every_picture_is_a_png_too(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "both.html"
    assert main([str(runs / "softmax"), "--compare", str(runs / "sigmoid"), "--out", str(page)]) == 0
    assert f"{page} and 4 pictures both-*.png" in capsys.readouterr().out
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        "both-attention-entropy.png",
        "both-grad_norm.png",
        "both-grad_norm-model.png",
        "both-loss-model.png",
    }
    assert all((tmp_path / name).read_bytes().startswith(PNG_SIGNATURE) for name in names)


def test_without_a_name_the_report_lies_in_the_run(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "softmax", tmp_path / "run")
    assert write_report(tmp_path / "run") == tmp_path / "run" / "report.html"
    assert write_report(tmp_path / "run" / "run.jsonl") == tmp_path / "run" / "run-report.html"


def test_an_incidents_series_leave_its_report_alone_and_say_where_alerts_are_not(tmp_path: Path) -> None:
    values, steps = np.ones(4), np.arange(4)
    (tmp_path / "report.html").write_text("the incident's")
    np.savez(tmp_path / "series.npz", tags=["grad_norm/a"], tag_indices=0 * steps, steps=steps, values=values)
    page = write_report(tmp_path / "series.npz")
    assert page == tmp_path / "series-report.html"
    assert (tmp_path / "report.html").read_text() == "the incident's"
    text = text_of(page.read_text())
    assert "Alerts are not in this file" in text
    assert "alerts not in this file" in text
    assert "No alert" not in text


def test_an_incident_folder_is_answered_with_its_series_alone(tmp_path: Path) -> None:
    (tmp_path / "series.npz").touch()
    with pytest.raises(FileNotFoundError, match=r"give its series: .*series\.npz\.$"):
        write_report(tmp_path)


def run_of(values: np.ndarray, *, alerts: Sequence[Alert] = (), skipped: Sequence[int] = ()) -> ReportedRun:
    """Gradient norms, float64 [layers, steps]; a GradScaler left the skipped steps' updates out."""
    steps = np.arange(values.shape[1])
    series = {
        f"grad_norm/layer.{row}": RecordedSeries(steps, of_layer) for row, of_layer in enumerate(values)
    }
    series["skipped_step/(all)"] = RecordedSeries(steps, np.isin(steps, skipped).astype(float))
    return reported_run("run", probes.RecordedRun(series, alerts))


def test_the_largest_value_is_finite_and_the_first_that_is_not_is_told_beside_it() -> None:
    values = np.ones((3, 40))
    values[1, 20], values[0, 31:], values[2, 30:] = 50.0, np.nan, np.inf
    assert run_of(values).facts["largest gradient norm of a layer"] == (
        "50 in `layer.1` at step 20; first not finite in `layer.2` at step 30"
    )
    assert run_of(np.full((1, 2), np.nan)).facts["largest gradient norm of a layer"] == (
        "first not finite in `layer.0` at step 0"
    )


def test_steps_that_a_grad_scaler_left_out_are_no_fault() -> None:
    values = np.ones((4, 40))
    values[:, [3, 30]] = np.inf
    run = run_of(values, skipped=(3, 30))
    assert run.story.title == "Nothing stands out"
    assert run.broken_step is None
    assert run.facts["largest gradient norm of a layer"] == "1 in `layer.0` at step 0"
    assert run.facts["of these, recorded without an update"].startswith("2,")
    assert np.isinf(run.view.groups["grad_norm"]["layer.0"].values[30])  # pictures show what was recorded
    assert run_of(values).story.what == "non finite"


def test_a_run_of_nothing_but_steps_left_out_is_told() -> None:
    run = run_of(np.full((1, 3), np.inf), skipped=(0, 1, 2))
    assert run.story.title == "Nothing to compare"
    assert "loss" not in str(run.facts)


def test_the_layer_of_the_alert_is_ranked_first_with_its_factor() -> None:
    values = np.ones((50, 40))
    values[:20, 30:] = np.geomspace(1e2, 1e21, 20)[:, None]  # of the first twenty layers
    values[:, 30:] *= 5.0  # which all did, and is not theirs
    rows = ranking_rows(run_of(values, alerts=(replace(ALERT, layer="layer.2"),)))
    assert [(row[0], row[4]) for row in rows[:2]] == [("`layer.2`", "×1e+04"), ("`layer.19`", "×1e+21")]
    assert len(rows) == 10


def test_the_terminal_gets_story_and_tables(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_runs([runs / "softmax", runs / "sigmoid"])
    print_report(loaded)
    rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_report(loaded)
    plain = capsys.readouterr().out
    for output in (rich, plain):
        assert "softmax: entropy collapse in blocks.7.attention" in output
        assert "sigmoid: Nothing stands out" in output
        assert "QK-norm" in output
        assert re.search(r"blocks\.7\.attention\W+attention/entropy", output)
    assert "┃" in rich
    assert "┃" not in plain


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_files_cut_short_are_told_as_far_as_they_go(tmp_path: Path, kind: int) -> None:
    sink = sinks(tmp_path)[kind]
    feed(sink, 60, alert=False)
    folder = tmp_path / ("lines", "events", "recorder")[kind]
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for size in (0, 10, 60, len(whole) // 3, len(whole) - 3):
        path.write_bytes(whole[:size])
        assert headline(page_of(folder))
    path.write_bytes(whole)
    assert "blocks.7.attention" in headline(page_of(folder))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_had_hardly_begun(tmp_path: Path, steps: int) -> None:
    feed(JsonLinesSink(tmp_path / "run.jsonl"), steps, alert=False)
    page = write_report(tmp_path).read_text()
    titles = ("Nothing was recorded", "Nothing to compare", "Nothing stands out")
    assert headline(page).endswith(titles[steps])
    assert page.count("<svg") == (4 if steps else 0)


def test_an_empty_run_beside_a_full_one(runs: Path, tmp_path: Path) -> None:
    feed(JsonLinesSink(tmp_path / "empty" / "run.jsonl"), 0, alert=False)
    assert "empty" in text_of(page_of(runs / "softmax", tmp_path / "empty"))
    page = write_report(tmp_path / "empty", runs / "softmax", out=tmp_path / "report.html").read_text()
    assert headline(page) == "empty: Nothing was recorded"


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(runs / "softmax", tmp_path / parent / "run")
    text = text_of(page_of(tmp_path / "a" / "run", tmp_path / "b" / "run"))
    assert "a/run" in text
    assert "b/run" in text


def test_a_directory_without_a_run_says_what_to_give(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "Give the `log_dir` of probes.attach." in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no run at" in capsys.readouterr().err
    assert main([str(runs)]) == 2
    error = capsys.readouterr().err
    assert f"There are runs in {runs / 'events'}, {runs / 'sigmoid'}" in error
    (tmp_path / "foreign.jsonl").write_text('{"x": 1}\n')
    assert main([str(tmp_path)]) == 2
    assert "must begin with the schema stability-probes" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(runs / "softmax"), "--out", str(tmp_path / "file" / "report.html")]) == 2


@pytest.mark.slow
def test_a_million_steps_of_200_layers_take_less_than_a_minute(tmp_path: Path) -> None:
    """As a thinned TensorBoard file holds them: 5,000 points a layer, one spike and one NaN among them."""
    layers = [f"blocks.{index // 10}.m{index % 10}" for index in range(200)]
    series = tuple(Series(layer, "grad_norm") for layer in layers)
    sink = TensorBoardSink(tmp_path)
    generator = np.random.default_rng(0)
    for step in range(0, 1_000_000, 200):
        values = generator.lognormal(sigma=0.2, size=200)
        if step == 600_000:
            values[77] = 1e6
        if step == 800_000:
            values[13] = np.nan
        sink.write(StepRecords(step, series, values, values))
    sink.close()
    started = time.monotonic()
    page = write_report(tmp_path).read_text()
    assert time.monotonic() - started < 60
    assert headline(page).endswith("non finite in blocks.1.m3")
    assert "before step 800000" in text_of(page)
    ranking = text_of(page).split("Layers that went farthest")[1]
    assert re.search(r"blocks\.7\.m7\s+grad_norm\s+[\d.]+\s+1e\+06\s+×\S+\s+600000", ranking)
    assert probes.read(tmp_path)
