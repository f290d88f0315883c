from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest

from experiments import long_run, stress_queue, stress_test
from experiments.run_records import RecordTable, read_run, write_run
from experiments.stress_plan import estimated_seconds, planned_runs
from experiments.stress_queue import Queue, main, pack

PAIR = ["rate-1e-3-softmax-seed0", "rate-1e-3-sigmoid-seed0"]
LEAD = "lead-softmax-seed0"


def queue(work: Path, names: list[str], *, lease: float, minutes: float = 9.0) -> Queue:
    options = argparse.Namespace(work=work, minutes=minutes)
    runs = {name: planned_runs()[name] for name in names}
    return Queue(runs, options, num_slots=2, num_gpus=0, lease_ends=time.time() + lease)


def write_finished(work: Path, name: str, seconds: float) -> None:
    _, config = planned_runs()[name]
    write_run(work / f"{name}.npz", {"steps": config.steps, "seconds": seconds}, RecordTable().arrays())


def test_two_pieces_give_the_records_of_one(tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    name = PAIR[0]
    _, config = planned_runs("tiny")[name]
    piece = {"cells": tmp_path / "none", "device": "cpu"}
    assert long_run.train_piece(config, work=tmp_path / "straight", minutes=1, **piece)
    assert not long_run.train_piece(config, work=work, minutes=1e-9, **piece)
    assert (work / f"{name}.pt").exists()
    assert main(["--preset", "tiny", "--runs", name, "--work", str(work), "--out", str(out)]) == 0
    assert not (work / f"{name}.pt").exists()
    (archive,) = out.glob("*.zip")
    assert zipfile.ZipFile(archive).namelist() == [f"{name}.npz"]
    (row,) = json.loads((out / "ledger.json").read_text())["runs"]
    assert (row["steps"], row["is_finished"]) == (12, True)
    straight, pieces = (read_run(folder / f"{name}.npz") for folder in (tmp_path / "straight", work))
    assert straight.values("loss").tolist() == pieces.values("loss").tolist()
    assert "Left: nothing." in capsys.readouterr().out


def test_no_run_begins_that_the_lease_cannot_see_the_end_of(tmp_path):
    needed = stress_queue.START_SECONDS + estimated_seconds(planned_runs()[PAIR[0]][1])
    assert queue(tmp_path, PAIR, lease=needed + 20)._next() == PAIR[0]
    assert queue(tmp_path, PAIR, lease=needed - 20)._next() is None


def test_what_may_be_cut_begins_and_what_was_cut_goes_on(tmp_path):
    assert queue(tmp_path, [*PAIR, LEAD], lease=100)._next() == LEAD
    (tmp_path / f"{PAIR[1]}.pt").touch()
    assert queue(tmp_path, PAIR, lease=100)._next() == PAIR[1]


def test_nothing_begins_just_before_the_end_of_a_call(tmp_path):
    assert queue(tmp_path, [LEAD], lease=1000, minutes=0.3)._next() is None


def test_finished_runs_are_left_alone_and_set_the_pace(tmp_path):
    seconds = estimated_seconds(planned_runs()[PAIR[0]][1])
    write_finished(tmp_path, PAIR[0], 2 * seconds)
    waiting = queue(tmp_path, PAIR, lease=1.5 * seconds)
    assert waiting.waiting == [PAIR[1]]
    assert waiting.pace == pytest.approx(2.0)
    assert waiting._next() is None


def test_runs_that_fail_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    flags = ["--preset", "tiny", "--runs", *PAIR, "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    assert f"{PAIR[0]} ended (1)" in printed
    assert f"Left: {', '.join(PAIR)}." in printed


def test_archives_are_small_enough_to_be_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(stress_queue, "ARCHIVE_BYTES", 250)
    files = []
    for number, size in enumerate((100, 100, 100, 400, 10)):
        files.append(tmp_path / f"{number}.npz")
        files[-1].write_bytes(bytes(size))
    archives = pack(files, tmp_path, "now")
    assert [zipfile.ZipFile(archive).namelist() for archive in archives] == [
        ["0.npz", "1.npz"],
        ["2.npz"],
        ["3.npz"],
        ["4.npz"],
    ]
    assert archives[0].name == "runs-now-0.zip"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs", "lead-relu-seed0"], "the plan has no runs"),
        (["--session", "99"], r"the plan has no session \[99\]"),
        (["--cells", "nowhere.npz"], "there are no prepared cells at nowhere.npz"),
    ],
)
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert message.replace("\\", "") in capsys.readouterr().err


def test_the_stress_test_hands_its_long_runs_over(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stress_queue, "main", lambda flags: seen.append(flags) or 0)
    assert stress_test.main(["--preset", "tiny", "--resume", str(tmp_path)]) == 0
    folder = str(tmp_path)
    assert seen == [
        ["--preset", "tiny", "--device", "cpu", "--threads", "1", "--work", folder, "--out", folder]
    ]
