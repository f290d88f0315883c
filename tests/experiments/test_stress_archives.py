from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from experiments import stress_archives
from experiments.stress_archives import Archives


@pytest.fixture
def archives(tmp_path, monkeypatch) -> Archives:
    monkeypatch.setattr(stress_archives, "ARCHIVE_BYTES", 1000)
    monkeypatch.setattr(stress_archives, "MOST_ARCHIVES", 2)
    monkeypatch.setattr(stress_archives, "_ENTRY_BYTES", 0)
    return Archives(tmp_path, "now", tmp_path / "carried.json")


def file(folder: Path, name: str, size: int) -> Path:
    path = folder / f"{name}.npz"
    path.write_bytes(bytes(size))
    return path


def contents(archives: Archives) -> list[list[str]]:
    names = [zipfile.ZipFile(path).namelist() for path in archives.paths]
    return [[name.removesuffix(".npz") for name in archive] for archive in names]


def test_files_fill_few_archives(tmp_path, archives):
    for name, size in {"a": 600, "b": 600, "c": 300, "d": 300}.items():
        archives.add(file(tmp_path, name, size), steps=10)
    assert contents(archives) == [["a", "c"], ["b", "d"]]
    assert [path.name for path in archives.paths] == ["runs-now-0.zip", "runs-now-1.zip"]
    assert archives.left_out == []
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".npz"] * 4, *[".zip"] * 2]


def test_every_archive_is_whole_at_any_time(tmp_path, archives):
    for name in "abc":
        archives.add(file(tmp_path, name, 100), steps=10)
        (path,) = archives.paths
        assert zipfile.ZipFile(path).testzip() is None
        assert contents(archives)[0][-1] == name


def test_what_has_no_room_is_told_and_carried_by_the_next_call(tmp_path, archives):
    files = [
        file(tmp_path, name, size) for name, size in {"a": 900, "b": 900, "c": 900, "huge": 1001}.items()
    ]
    for path in files:
        archives.add(path, steps=10)
    assert contents(archives) == [["a"], ["b"]]
    assert archives.left_out == files[2:]
    after = Archives(tmp_path, "later", tmp_path / "carried.json")
    for path in files:
        after.add(path, steps=10)
    assert contents(after) == [["c"]]


def test_records_are_carried_again_when_they_tell_of_more_steps(tmp_path, archives):
    path = file(tmp_path, "a", 100)
    archives.add(path, steps=10)
    after = Archives(tmp_path, "later", tmp_path / "carried.json")
    after.add(path, steps=10)
    assert after.paths == []
    after.add(path, steps=20)
    assert contents(after) == [["a"]]


def test_a_full_call_fits_a_transfer():
    assert stress_archives.MOST_ARCHIVES * stress_archives.ARCHIVE_BYTES <= 60 * 2**20
    assert stress_archives.ARCHIVE_BYTES < 16 * 2**20
    assert stress_archives.MOST_ARCHIVES + len(["ledger.md", "ledger.json", "gradient_norms.png", "log"]) <= 8


def test_a_call_that_is_killed_while_it_remembers_stops_no_other(tmp_path, archives, monkeypatch):
    """SIGKILL may come between any two bytes: what was remembered before must stay whole."""
    archives.add(file(tmp_path, "a", 100), steps=10)

    def half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            archives.add(file(tmp_path, "b", 100), steps=10)
    after = Archives(tmp_path, "later", tmp_path / "carried.json")
    for name in "ab":
        after.add(tmp_path / f"{name}.npz", steps=10)
    assert contents(after) == [["b"]]  # twice rather than never
