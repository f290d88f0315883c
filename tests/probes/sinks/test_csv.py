"""Records and alerts as a CSV table."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probes.record import Series, StepRecords
from probes.sinks import CsvSink
from tests.probes.sinks.step_records import DIVERGENCE, RECORDS, step_records

HEADER = "step,layer,quantity,value,head,call,rank,kind,standard_error,reason"


def test_a_table_has_every_field_of_every_record(tmp_path: Path) -> None:
    sink = CsvSink(tmp_path / "new" / "run.csv")
    sink.write(step_records(7))
    sink.write_alert(DIVERGENCE)
    sink.close()
    lines = sink.path.read_text().splitlines()
    assert lines == [
        HEADER,
        "7,blocks.0,grad_norm,0.1,,0,,exact,,",
        "7,(all),loss,inf,,0,,exact,,",
        "7,blocks.1,attention/entropy,2.5,,0,,estimate,0.25,",
        "7,blocks.1,attention/entropy,2.25,1,0,,estimate,0.5,",
        "7,blocks.1,activation_rms,1.5,,0,,exact,,",
        "7,blocks.1,activation_rms,nan,,2,,exact,,",
        '7,blocks.0,alert/gradient-explosion,2.0,,0,,exact,,"its gradient, ""norm 9"", grew"',
    ]
    frame = pd.read_csv(sink.path)
    assert frame["value"].tolist() == pytest.approx([*RECORDS.values(), 2.0], nan_ok=True)
    assert math.isinf(frame["value"][1])


def test_each_step_is_on_disk_at_once(tmp_path: Path) -> None:
    sink = CsvSink(tmp_path / "run.csv")
    sink.write(step_records(0))
    assert len(sink.path.read_text().splitlines()) == 7
    sink.close()


WHOLE = "1,a,grad_norm,12.5,,0,,exact,,"


# A process that is killed, or a full disk, leaves half a row: half of 12.5 is 12, and an open quote would
# take in all that follows.
@pytest.mark.parametrize(
    ("half", "row"),
    [
        ("", []),
        ("1,a,grad", []),
        ("1,a,grad_norm,12", []),
        ('1,a,alert/dead,1.0,,0,,exact,,"it is dead, wh', []),
        ('1,"a\nb', []),
        (WHOLE, [WHOLE.split(",")]),
    ],
)
def test_a_table_is_continued(tmp_path: Path, half: str, row: list[list[str]]) -> None:
    path = tmp_path / "run.csv"
    first = CsvSink(path)
    first.write(step_records(0))
    first.close()
    with path.open("a") as file:
        file.write(half)
    second = CsvSink(path)
    second.write(step_records(1))
    second.close()
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[7:-6] == row
    assert [row[0] for row in rows[:7] + rows[-6:]] == ["step", *"000000", *"111111"]
    assert rows.count(HEADER.split(",")) == 1


def test_a_header_cut_short_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(HEADER[:20])
    sink = CsvSink(tmp_path / "run.csv")
    sink.close()
    assert sink.path.read_text() == f"{HEADER}\n"


def test_a_name_that_utf_8_cannot_hold(tmp_path: Path) -> None:
    sink = CsvSink(tmp_path / "run.csv")
    sink.write(StepRecords(0, (Series("caf\udce9", "grad_norm"),), np.ones(1), np.ones(1)))
    sink.close()
    assert "caf?,grad_norm,1.0" in sink.path.read_text()


def test_line_ends_within_a_name_or_a_reason_end_no_row(tmp_path: Path) -> None:
    sink = CsvSink(tmp_path / "run.csv")
    series = tuple(Series(layer, "grad_norm") for layer in ("a\rb", "c\nd", "\r\n", 'e"\r'))
    sink.write(StepRecords(0, series, np.ones(4), np.full(4, math.nan)))
    sink.write_alert(replace(DIVERGENCE, reason="it grew\r"))
    sink.close()
    CsvSink(sink.path).close()  # which looks for half a row
    with sink.path.open(newline="") as file:
        _, *rows = csv.reader(file)
    assert [row[1] for row in rows[:-1]] == [name.layer for name in series]
    assert rows[-1][-1] == "it grew\r"
    assert pd.read_csv(sink.path)["layer"].tolist()[:2] == ["a\rb", "c\nd"]
    assert sink.path.read_bytes().count(b"\r\n") == 1


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Choose a writable path"):
        CsvSink(tmp_path / "file" / "run.csv")
