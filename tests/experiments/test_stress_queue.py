from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from experiments import long_run, side_by_side, stress_archives, stress_queue, stress_test
from experiments.run_records import RecordTable, read_facts, read_run, write_run
from experiments.stress_archives import Archives
from experiments.stress_plan import estimated_seconds, planned_runs
from experiments.stress_queue import Queue, main
from probes.record import ALL_LAYERS, Series, StepRecords

PAIR = ["rate-1e-3-softmax-seed0", "rate-1e-3-sigmoid-seed0"]
TINY_PAIR = [f"tiny-{name}" for name in PAIR]
LEAD = "lead-softmax-seed0"


def queue(
    work: Path, names: list[str], *, lease: float = math.inf, minutes: float = 9.0, num_gpus: int = 0
) -> Queue:
    options = argparse.Namespace(
        work=work,
        out=work,
        minutes=minutes,
        side_by_side=2,
        preset="160m",
        device="cpu",
        cells=work,
        threads=1,
    )
    runs = {name: planned_runs()[name] for name in names}
    archives = Archives(work, "now", work / "carried.json")
    return Queue(runs, options, archives, num_gpus=num_gpus, lease_ends=time.time() + lease)


def write_records(work: Path, name: str, seconds: float = 100.0, **changes: Any) -> None:
    _, config = planned_runs()[name]
    table = RecordTable()
    names = (Series(ALL_LAYERS, "loss"), Series(ALL_LAYERS, "grad_norm"), Series("a", "grad_norm"))
    for step in range(3):
        table.write(StepRecords(step, names, np.ones(3), np.full(3, math.nan)))
    facts = {
        "config": asdict(config),
        "steps": config.steps,
        "seconds": seconds,
        "is_finished": True,
        "metric": "cross-entropy, nats",
        "reference": 9.2,
        "without_attention": 9.1,
        "validation": [(config.steps, 9.0)],
    }
    write_run(work / f"{name}.npz", facts | changes, table.arrays())


class FakeProcess:
    """A run that ends, with records, when it was polled so often; `started` holds all of them."""

    started: ClassVar[list[FakeProcess]] = []

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        self.name, self.environment = command[3], env
        self.work = Path(command[command.index("--work") + 1])
        self.polls = 12 if self.name.startswith("lead") else 3
        self.beside = [run for run in self.started if run.polls > 0]
        self.started.append(self)

    @property
    def gpu(self) -> str:
        return self.environment["CUDA_VISIBLE_DEVICES"]

    def poll(self) -> int | None:
        self.polls -= 1
        if self.polls > 0:
            return None
        write_records(self.work, self.name)
        self.returncode = 0
        return self.returncode


@pytest.fixture
def fake_processes(monkeypatch) -> list[FakeProcess]:
    started: ClassVar[list[FakeProcess]] = []
    monkeypatch.setattr(FakeProcess, "started", started)
    monkeypatch.setattr(subprocess, "Popen", FakeProcess)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return started


def test_four_gpus_are_filled_in_the_order_of_the_plan(tmp_path, fake_processes):
    names = [name for name, (question, _) in planned_runs().items() if question.session == 1]
    work = queue(tmp_path, names, num_gpus=4)
    work.work()
    assert [run.name for run in fake_processes] == names
    placed = {run.name: run.gpu for run in fake_processes}
    assert [(run.name, run.gpu) for run in fake_processes[:6]] == [
        ("lead-softmax-seed0", "0"),
        ("lead-sigmoid-seed0", "1"),
        ("healthy-ranks-softmax-seed0", "2"),
        ("healthy-ranks-sigmoid-seed0", "2"),
        ("healthy-ranks-softmax-seed1", "3"),
        ("healthy-ranks-sigmoid-seed1", "3"),
    ]
    assert set(placed.values()) == {"0", "1", "2", "3"}  # the lead's GPUs, too, once it ended
    for run in fake_processes:
        on_gpu = [other for other in run.beside if other.gpu == run.gpu]
        assert len(on_gpu) <= (0 if run.name.startswith("lead") else 1)
        assert not any(other.name.startswith("lead") for other in on_gpu)
        assert all(run.environment[variable] == "1" for variable in side_by_side.THREAD_VARIABLES)
    assert work.finished.keys() == set(names)
    (archive,) = work.archives.paths
    assert sorted(zipfile.ZipFile(archive).namelist()) == sorted(f"{name}.npz" for name in names)


def test_gpus_that_this_process_may_use_are_shared_out(tmp_path, monkeypatch, fake_processes):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    names = [name for name in planned_runs() if name.startswith("rate-1e-3")][:4]
    queue(tmp_path, names, num_gpus=2).work()
    assert [run.gpu for run in fake_processes] == ["5", "5", "7", "7"]


def test_on_one_gpu_the_lead_goes_side_by_side(tmp_path, fake_processes):
    queue(tmp_path, [LEAD, "lead-sigmoid-seed0"], num_gpus=1).work()
    assert [len(run.beside) for run in fake_processes] == [0, 1]


def test_runs_that_end_at_once_are_all_carried(tmp_path, fake_processes):
    work = queue(tmp_path, PAIR, num_gpus=1)
    work.work()
    assert Counter(run.polls for run in fake_processes) == {0: 2}
    (archive,) = work.archives.paths
    assert zipfile.ZipFile(archive).namelist() == [f"{name}.npz" for name in PAIR]


def test_two_pieces_give_the_records_of_one(tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    name = TINY_PAIR[0]
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
    assert queue(tmp_path, PAIR, lease=needed + 20)._next() == (PAIR[0], [0])
    assert queue(tmp_path, PAIR, lease=needed - 20)._next() is None


def test_what_may_be_cut_begins_and_what_was_cut_goes_on(tmp_path):
    assert queue(tmp_path, [*PAIR, LEAD], lease=100)._next() == (LEAD, [0])
    (tmp_path / f"{PAIR[1]}.pt").touch()
    assert queue(tmp_path, PAIR, lease=100)._next() == (PAIR[1], [0])


def test_nothing_begins_just_before_the_end_of_a_call(tmp_path):
    assert queue(tmp_path, [LEAD], lease=1000, minutes=0.3)._next() is None


def test_finished_runs_are_left_alone_and_set_the_pace(tmp_path):
    seconds = estimated_seconds(planned_runs()[PAIR[0]][1])
    write_records(tmp_path, PAIR[0], 2 * seconds)
    waiting = queue(tmp_path, PAIR, lease=1.5 * seconds)
    assert waiting.waiting == [PAIR[1]]
    assert waiting._measured_pace() == pytest.approx(2.0)
    assert waiting._next() is None


def test_runs_that_fail_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    flags = [
        "--preset",
        "tiny",
        "--runs",
        *TINY_PAIR,
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    assert f"{TINY_PAIR[0]} ended (1)" in printed
    assert f"Left: {', '.join(TINY_PAIR)}." in printed


def test_records_of_a_run_that_is_not_finished_are_no_end(tmp_path):
    write_records(tmp_path, PAIR[0], is_finished=False)
    assert queue(tmp_path, PAIR).waiting == PAIR


def test_what_was_cut_goes_first(tmp_path):
    (tmp_path / f"{PAIR[1]}.pt").touch()
    assert queue(tmp_path, PAIR).waiting == PAIR[::-1]


def test_a_tiny_run_is_not_taken_for_one_of_160_million(tmp_path):
    name = TINY_PAIR[0]
    assert long_run.main([name, "--preset", "tiny", "--work", str(tmp_path)]) == 0
    assert read_facts(tmp_path / f"{name}.npz")["is_finished"]
    assert queue(tmp_path, PAIR).waiting == PAIR


def test_records_of_another_plan_are_refused(tmp_path, capsys):
    _, config = planned_runs()[PAIR[0]]
    write_records(tmp_path, PAIR[0], config=asdict(config) | {"learning_rate": 0.5})
    with pytest.raises(ValueError, match="another configuration than the plan's. Remove it"):
        queue(tmp_path, PAIR)


def test_records_of_runs_that_were_cut_are_carried(tmp_path):
    write_records(tmp_path, PAIR[1], is_finished=False, steps=700)
    work = queue(tmp_path, PAIR, minutes=0.1)
    work.work()
    (archive,) = work.archives.paths
    assert zipfile.ZipFile(archive).namelist() == [f"{PAIR[1]}.npz"]


def test_a_finished_run_that_had_no_room_goes_with_the_next_call(tmp_path, fake_processes, monkeypatch):
    monkeypatch.setattr(stress_archives, "MOST_ARCHIVES", 0)
    full = queue(tmp_path, PAIR, num_gpus=1)
    full.work()
    assert full.archives.paths == []
    assert [file.stem for file in full.archives.left_out] == PAIR
    monkeypatch.undo()
    after = queue(tmp_path, PAIR, num_gpus=1)
    after.work()
    (archive,) = after.archives.paths
    assert zipfile.ZipFile(archive).namelist() == [f"{name}.npz" for name in PAIR]


def test_a_lease_that_is_over_is_told(tmp_path, capsys):
    (tmp_path / "lease").touch()
    os.utime(tmp_path / "lease", (0, 0))
    flags = ["--preset", "tiny", "--runs", *TINY_PAIR, "--work", str(tmp_path), "--out", str(tmp_path)]
    assert main([*flags, "--lease-minutes", "26"]) == 0
    printed = capsys.readouterr().out
    assert "The lease of 26 minutes is over since" in printed
    assert f"Left: {', '.join(TINY_PAIR)}." in printed


def test_a_run_that_is_killed_has_failed_unless_its_records_are_finished(
    tmp_path, fake_processes, monkeypatch
):
    poll = FakeProcess.poll

    def killed_at_its_end(run: FakeProcess) -> int | None:
        if poll(run) is None:
            return None
        if run.name == PAIR[1]:
            (run.work / f"{run.name}.npz").unlink()
        run.returncode = -9
        return run.returncode

    monkeypatch.setattr(FakeProcess, "poll", killed_at_its_end)
    for name in PAIR:
        (tmp_path / f"{name}.log").write_text(f"last words of {name}")
    work = queue(tmp_path, PAIR, num_gpus=1)
    work.work()
    assert (list(work.finished), work.failed) == (PAIR[:1], PAIR[1:])


def test_a_run_that_hangs_is_ended_after_the_call(tmp_path, monkeypatch):
    monkeypatch.setattr(stress_queue, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(stress_queue, "START_SECONDS", 0.0)
    deaf = tmp_path / "deaf"
    deaf.write_text("#!/bin/sh\ntrap '' TERM\nwhile true; do sleep 0.1; done\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(deaf))
    started = time.monotonic()
    work = queue(tmp_path, [LEAD], minutes=0.01)
    work.work()
    assert time.monotonic() - started < 10
    assert (work.places.running, work.failed) == ([], [])


def test_without_lease_minutes_there_is_no_lease(tmp_path):
    flags = ["--preset", "tiny", "--runs", *TINY_PAIR, "--work", str(tmp_path), "--minutes", "0.01"]
    assert main([*flags, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "lease").exists()


def test_two_queues_do_not_work_in_one_folder(tmp_path, capsys):
    flags = ["--preset", "tiny", "--runs", *TINY_PAIR, "--work", str(tmp_path), "--out", str(tmp_path)]
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(flags) == 2
    assert "another queue works in" in capsys.readouterr().err


def test_sigterm_ends_a_call_with_its_ledger(tmp_path, monkeypatch, capsys):
    write_records(tmp_path, PAIR[0])
    cells = tmp_path / "cells.npz"
    cells.touch()
    sleeper = tmp_path / "sleep"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    flags = ["--runs", *PAIR, "--work", str(tmp_path), "--out", str(tmp_path / "out"), "--cells", str(cells)]
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit, match="143"):
        main(flags)
    timer.join()
    printed = capsys.readouterr().out
    assert f"{PAIR[1]} ended (-15)" in printed
    assert "Failed" not in printed
    assert f"Left: {PAIR[1]}." in printed
    assert PAIR[0] in (tmp_path / "out" / "ledger.md").read_text()


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
