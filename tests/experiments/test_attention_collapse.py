from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import probes
from experiments import attention_collapse
from experiments.attention_collapse import main, parse_arguments
from experiments.collapse_report import PairedRuns, conclusion
from probes.reading import RecordedSeries

SMALL = ["--embed-dim", "16", "--layers", "3", "--tokens", "16", "--steps", "24", "--fault-step", "8"]
FAULT = ["--block", "1", "--growth", "1.6"]  # as strong in few steps as 1.08 in many
ATTENTION = ("attention/entropy", "attention/max_logit", "attention/jacobian_frobenius")


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("collapse")
    assert main([*SMALL, *FAULT, "--log-dir", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def summary(log_dir):
    return json.loads((log_dir / "summary.json").read_text())


def test_both_runs_have_their_tensorboard_directory(log_dir):
    for name in ("clean", "faulty"):
        series = probes.read(log_dir / name)
        assert series["loss/(all)"].steps.tolist() == list(range(24))
        assert series["attention/entropy/blocks.1.attention"].steps.tolist() == list(range(0, 24, 2))


def test_only_the_faulty_layer_leaves_the_clean_run(summary):
    departures = summary["departures"]
    assert list(departures) == [f"blocks.{i}.attention" for i in range(3)]
    for quantity in ATTENTION:
        assert departures["blocks.1.attention"][quantity] >= 8
        assert departures["blocks.0.attention"][quantity] is None
        assert departures["blocks.2.attention"][quantity] is None


def test_the_runs_are_the_same_until_the_fault(summary):
    clean, faulty = summary["series"]["clean"], summary["series"]["faulty"]
    for tag, series in clean.items():
        before = np.array(series["steps"]) < 8
        assert before.any()
        values, others = np.array(series["values"]), np.array(faulty[tag]["values"])
        assert (values[before] == others[before]).all()
    assert clean["loss/(all)"]["values"][8:] != faulty["loss/(all)"]["values"][8:]


def test_the_loss_hides_the_fault(summary):
    loss = summary["loss"]
    assert abs(loss["faulty"] - loss["clean"]) < 0.05 * loss["clean"]


def test_summary_holds_what_is_needed_to_repeat_the_run(summary, log_dir):
    assert summary["schema_version"] == 1
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["command"] == (
        f"python -m experiments.attention_collapse {' '.join(SMALL + FAULT)} --log-dir {log_dir}"
    )
    assert summary["config"]["fault"] == {"step": 8, "block": 1, "growth": 1.6}
    assert summary["config"]["model"]["num_layers"] == 3


def test_figure_is_drawn(log_dir):
    assert (log_dir / "attention_collapse.png").read_bytes().startswith(b"\x89PNG")


def test_table_and_verdict_are_printed_and_old_events_replaced(tmp_path, capsys):
    for steps in ("10", "4"):
        arguments = [*SMALL, "--steps", steps, "--fault-step", "2", "--growth", "20", "--block", "0"]
        assert main([*arguments, "--log-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Attention layers of the faulty run" in printed
    assert "blocks.0.attention leaves the clean run (factor 2, to stay)" in printed
    assert len(probes.read(tmp_path / "clean")["loss/(all)"].steps) == 4


def series(values: list[float], step: int = 2) -> RecordedSeries:
    return RecordedSeries(np.arange(len(values)) * step, np.array(values))


@pytest.mark.parametrize(
    ("values", "departure"),
    [
        ([1, 1, 1, 1], None),
        ([1, 1, 0.5, 0.4], 4),
        ([1, 3, 1, 3], 6),  # the first excursion came back
        ([1, 1.9, 1.9, 1.9], None),
        ([1, 1, 1, 0], 6),
        ([4, 4, 4, 4], 0),
        ([1, 1, float("inf"), float("inf")], 4),
        ([1, 1, 1, float("nan")], None),  # nothing can be said
    ],
)
def test_departure_is_where_a_series_leaves_to_stay(values, departure):
    tag = "attention/entropy/blocks.0"
    pair = PairedRuns({tag: series([1, 1, 1, 1])}, {tag: series(values)}, 2, "blocks.0")
    assert pair.departure("attention/entropy", "blocks.0") == departure


def test_conclusion_of_two_equal_runs():
    run = {f"{quantity}/blocks.0": series([1, 1, 1]) for quantity in ATTENTION}
    run["loss/(all)"] = series([3, 2, 1, 2, 1], step=1)
    text = conclusion(PairedRuns(run, run, 2, "blocks.0"))
    assert "No attention layer leaves the clean run" in text
    # Successive differences ±1 of independent values have the variance 2σ².
    assert "never more than 0.000 from the clean run's, which scatters by 0.707" in text


def test_ctrl_c_ends_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(**arguments):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(attention_collapse, "chain_batches", interrupt)
    assert main([*SMALL, "--log-dir", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().out


def test_an_unwritable_log_directory_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main([*SMALL, "--log-dir", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "4"], "--block must name one of the 4 blocks, 0 to 3; got 4"),
        (["--block", "-1"], "got -1"),
        (["--fault-step", "160"], "--fault-step must come before the last of the 160 steps; got 160"),
        (["--embed-dim", "30"], "--embed-dim must be a multiple of the 4 heads; got 30"),
        (["--steps", "0"], "must be at least 1; got 0"),
        (["--growth", "inf"], "must be a positive number; got inf"),
    ],
)
def test_bad_flags(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err
