"""Runs read back from disk, whole and cut short."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import probes
from probes.record import Series, StepRecords
from probes.sinks import JsonLinesSink, MemorySink, TensorBoardSink
from probes.sinks.sink import Sink
from stability.divergence import Alert

SERIES = (Series("a", "grad_norm"), Series("a", "attention/entropy", head=2, kind="estimate"))

ALERT = Alert(
    step=2,
    layer="a",
    quantity="grad_norm",
    severity="divergence",
    value=math.inf,
    reference=None,
    reason="its gradient --> holds inf ---.",
    kind="non-finite",
    onset_step=1,
    evidence=((0, 0.1), (2, math.inf)),
    spread=("b", "c"),
    remedies=("clip",),
)


def write_three_steps(sink: Sink) -> None:
    for step, value in enumerate((0.1, math.nan, math.inf)):
        sink.write(StepRecords(step, SERIES, np.array([value, 2.0]), np.array([math.nan, 0.25])))
    sink.write_alert(ALERT)
    sink.close()


def test_json_lines_keep_every_record_in_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    write_three_steps(JsonLinesSink(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"schema": "stability-probes", "schema_version": 1}
    assert lines[1] == {"type": "record", "step": 0, "layer": "a", "quantity": "grad_norm", "value": 0.1}
    assert lines[2]["standard_error"] == 0.25
    assert lines[3]["value"] == "NaN"
    assert lines[-1]["type"] == "alert"
    series = probes.read(path)
    assert set(series) == {"grad_norm/a", "attention/entropy/a/head_2"}
    assert series["grad_norm/a"].values[0] == 0.1
    assert math.isnan(series["grad_norm/a"].values[1])
    assert series["grad_norm/a"].values[2] == math.inf


def test_a_second_run_continues_a_json_lines_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for step in (0, 1):
        sink = JsonLinesSink(path)
        sink.write(StepRecords(step, SERIES, np.ones(2), np.ones(2)))
        sink.close()
    assert path.read_text().count("schema_version") == 1
    assert probes.read(tmp_path)["grad_norm/a"].steps.tolist() == [0, 1]


@pytest.mark.parametrize("sink_type", [JsonLinesSink, TensorBoardSink])
def test_alerts_come_back_in_full(tmp_path: Path, sink_type: type) -> None:
    write_three_steps(sink_type(tmp_path / "run.jsonl" if sink_type is JsonLinesSink else tmp_path))
    assert probes.read(tmp_path).alerts == [ALERT]


@pytest.mark.parametrize("sink_type", [JsonLinesSink, TensorBoardSink])
def test_alerts_of_layers_with_odd_names_come_back(tmp_path: Path, sink_type: type) -> None:
    alerts = [replace(ALERT, layer=f"a\n{text}\n") for text in ("<!-- {} -->", "-->", "`</script>|*", "/")]
    sink = sink_type(tmp_path / "run.jsonl" if sink_type is JsonLinesSink else tmp_path)
    for alert in alerts:
        sink.write_alert(alert)
    sink.close()
    assert probes.read(tmp_path).alerts == alerts


def test_alerts_of_an_older_file_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    JsonLinesSink(path).close()
    fields = {"step": 3, "layer": "a", "quantity": "loss", "severity": "warning", "value": "NaN"}
    line = json.dumps({"type": "alert", **fields, "reference": 1.0, "reason": "it rose."})
    path.write_text(path.read_text() + line + "\n")
    (alert,) = probes.read(path).alerts
    assert (alert.step, alert.reference, alert.kind, alert.evidence) == (3, 1.0, "", ())
    assert math.isnan(alert.value)


def test_an_alert_in_tensorboard_is_text_with_evidence_and_remedies(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_three_steps(TensorBoardSink(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("alerts/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    for words in ("**divergence** in `a`", "grad_norm: 0.1 at 0, inf at 2", "spread to `b`, `c`", "* clip"):
        assert words in text


@pytest.mark.parametrize("cut", ["", "{", '{"schema": "stability-pro'])
def test_a_json_lines_file_killed_at_its_first_line_is_begun_anew(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(cut)
    assert probes.read(path) == {}
    write_three_steps(JsonLinesSink(path))
    assert probes.read(path)["grad_norm/a"].steps.tolist() == [0, 1, 2]


def test_a_file_of_another_program_is_not_emptied(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"lr": 0.1}')
    with pytest.raises(OSError, match="it holds something else.*Choose a writable path"):
        JsonLinesSink(path)
    assert path.read_text() == '{"lr": 0.1}'


def test_half_a_line_is_ended_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_three_steps(JsonLinesSink(path))
    path.write_bytes(path.read_bytes()[:-5])
    sink = JsonLinesSink(path)
    sink.write(StepRecords(3, SERIES, np.ones(2), np.ones(2)))
    sink.close()
    assert probes.read(path)["grad_norm/a"].steps.tolist() == [0, 1, 2, 3]
    assert probes.read(path).alerts == []


def test_tensorboard_has_layers_and_leaves_out_heads(tmp_path: Path) -> None:
    write_three_steps(TensorBoardSink(tmp_path))
    series = probes.read(tmp_path)
    assert set(series) == {"grad_norm/a", "alert/non-finite/a"}
    assert series["alert/non-finite/a"].steps.tolist() == [2]
    assert series["alert/non-finite/a"].values.tolist() == [2.0]
    assert series["grad_norm/a"].steps.tolist() == [0, 1, 2]
    assert math.isnan(series["grad_norm/a"].values[1])


@pytest.mark.parametrize("sink_type", [JsonLinesSink, TensorBoardSink])
def test_a_file_cut_short_is_read_as_far_as_it_goes(tmp_path: Path, sink_type: type) -> None:
    write_three_steps(sink_type(tmp_path / "run.jsonl" if sink_type is JsonLinesSink else tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        series = probes.read(tmp_path)
        steps = series["grad_norm/a"].steps.tolist() if "grad_norm/a" in series else []
        assert steps == list(range(len(steps)))


def test_a_writer_of_the_scripts_own_does_not_enter(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("grad_norm/a", 7.0, 5)
    assert set(probes.read(tmp_path)) == {"grad_norm/a"}
    write_three_steps(TensorBoardSink(tmp_path))
    assert probes.read(tmp_path)["grad_norm/a"].steps.tolist() == [0, 1, 2]


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        probes.read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no TensorBoard events"):
        probes.read(tmp_path)
    (tmp_path / "series.npz").touch()
    with pytest.raises(FileNotFoundError, match=r"is an incident folder; give its series: .*series\.npz"):
        probes.read(tmp_path)


def test_a_series_that_was_not_recorded(tmp_path: Path) -> None:
    write_three_steps(JsonLinesSink(tmp_path / "run.jsonl"))
    run = probes.read(tmp_path)
    with pytest.raises(KeyError, match="no series 'gradnorm/a' was recorded; near it are grad_norm/a"):
        run["gradnorm/a"]
    with pytest.raises(KeyError, match=r"no series 'x' was recorded; list\(run\) gives all tags"):
        run["x"]
    assert run.get("gradnorm/a") is None


def test_reading_foreign_or_newer_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for header in ('{"x": 1}', '{"schema": "stability-probes", "schema_version": 99}', "no json"):
        path.write_text(header + "\n")
        with pytest.raises(ValueError, match="version 1 or older"):
            probes.read(path)


def test_json_lines_of_another_program_are_passed_over(tmp_path: Path) -> None:
    write_three_steps(TensorBoardSink(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert probes.read(tmp_path)["grad_norm/a"].steps.tolist() == [0, 1, 2]
    write_three_steps(JsonLinesSink(tmp_path / "run.jsonl"))
    assert "attention/entropy/a/head_2" in probes.read(tmp_path)


def test_memory_is_bounded_and_keeps_the_newest() -> None:
    sink = MemorySink(max_values=5)
    for step in range(10):
        sink.write(StepRecords(step, SERIES, np.ones(2), np.ones(2)))
    assert [record.step for record in sink] == [8, 8, 9, 9]
    assert len(sink) == 4
    with pytest.raises(ValueError, match="at least 1"):
        MemorySink(max_values=0)


def test_an_unwritable_json_lines_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Choose a writable path"):
        JsonLinesSink(tmp_path / "file" / "run.jsonl")
