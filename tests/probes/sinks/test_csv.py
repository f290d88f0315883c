"""Records and alerts as a CSV table."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pandas as pd
import pytest

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


@pytest.mark.parametrize("is_cut_short", [True, False])
def test_a_table_is_continued(tmp_path: Path, is_cut_short: bool) -> None:
    path = tmp_path / "run.csv"
    first = CsvSink(path)
    first.write(step_records(0))
    first.close()
    if is_cut_short:  # a killed process was writing a line
        with path.open("a") as file:
            file.write("1,blocks.0,grad")
    second = CsvSink(path)
    second.write(step_records(1))
    second.close()
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["step", *"000000", *(["1"] if is_cut_short else []), *"111111"]
    assert rows.count(HEADER.split(",")) == 1


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Choose a writable path"):
        CsvSink(tmp_path / "file" / "run.csv")
