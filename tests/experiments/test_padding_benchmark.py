"""The padding benchmark runs, and counts the pairs that a mask leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.attention_contenders import Case
from experiments.padding_benchmark import DENSE, TIMED, main, masked_calls


def test_every_call_is_timed_against_the_dense_one(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--preset", "tiny", "--rounds", "2", "--turn-ms", "0.5"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    costs = json.loads((tmp_path / "padding.json").read_text())["costs"]
    case = Case(2, 2, 64, 16)
    assert [(c["call"], c["which"]) for c in costs] == [(n, w) for n in masked_calls(case) for w in TIMED]
    dense = {c["which"]: c["milliseconds"] for c in costs if c["call"] == DENSE}
    for cost in costs:
        expected = cost["milliseconds"] / (cost["share"] * dense[cost["which"]])
        assert cost["ratio"] == pytest.approx(expected)


def test_the_share_is_that_of_valid_queries_with_valid_keys() -> None:
    calls = masked_calls(Case(4, 2, 64, 16))
    for lengths, is_causal, share in calls.values():
        of_lengths = 1.0 if lengths is None else sum(n * n for n in lengths) / (4 * 64 * 64)
        assert share == (0.5 if is_causal else pytest.approx(of_lengths))
    assert calls["lengths, nothing padded"][0] == [64] * 4
    assert calls["drawn lengths"][0] != calls["drawn lengths, again"][0]


def test_an_unwritable_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--device", "cpu", "--preset", "tiny", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
