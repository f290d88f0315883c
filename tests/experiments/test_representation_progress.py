from __future__ import annotations

import json
import math
import zipfile
from dataclasses import asdict, replace

import pytest

from experiments.representation_plan import NUM_SEEDS, SCALES, further_rates, run_config, selection_runs
from experiments.representation_progress import Plan, Progress
from experiments.run_records import RecordTable, write_run

PLAN = Plan("full", {"gut": "digest"}, num_seeds=2)


def losses(optimum, unfinished=()):
    """Lowest loss at a mechanism's optimum."""

    def loss_of(config):
        if config.purpose == "final" or config.learning_rate in unfinished:
            return None
        return abs(math.log(config.learning_rate / optimum[config.mechanism]))

    return loss_of  # fmt: skip


def known(optimum, unfinished=()):
    runs = list(PLAN.known(losses(optimum, unfinished)))
    tried = {(config.mechanism, config.learning_rate) for config in runs if config.purpose == "selection"}
    return tried, {config.mechanism: config.learning_rate for config in runs if config.purpose == "final"}


def test_every_mechanism_tries_the_same_rates_with_the_same_seeds():
    for scale, settings in SCALES.items():
        assert set(settings.first_rates) <= set(settings.rates)
        assert tuple(sorted(settings.rates)) == settings.rates
        softmax, sigmoid = (selection_runs(scale, "gut", name, 1e-3, "d") for name in ("softmax", "sigmoid"))
        assert len(softmax) == settings.selection_seeds
        assert [replace(run, mechanism="softmax", name="") for run in sigmoid] == [
            replace(run, name="") for run in softmax
        ]
        first = settings.first_seed
        assert not {run.seed for run in softmax} & set(range(first, first + NUM_SEEDS))
    assert SCALES["full"].selection_seeds == 3


def test_a_best_rate_inside_ends_the_trials():
    tried, chosen = known({"softmax": 1e-3, "sigmoid": 1e-3})
    assert {rate for _, rate in tried} == {3e-4, 1e-3, 3e-3}
    assert chosen == {"softmax": 1e-3, "sigmoid": 1e-3}
    assert PLAN.size(losses({"softmax": 1e-3, "sigmoid": 1e-3})) == 2 * 3 * 3 + 2 * 2


def test_final_runs_go_on_where_trials_end_with_seeds_that_no_pilot_had():
    runs = list(PLAN.known(losses({"softmax": 1e-3, "sigmoid": 1e-3})))
    assert {(run.purpose, run.steps) for run in runs} == {("selection", 1500), ("final", 6000)}
    assert {run.seed for run in runs if run.purpose == "final"} == {10, 11}


def test_a_best_rate_at_an_edge_makes_both_mechanisms_try_the_next():
    optimum = {"softmax": 1e-3, "sigmoid": 1e-2}
    tried, chosen = known(optimum, unfinished=(1e-2,))
    assert {rate for mechanism, rate in tried if mechanism == "softmax"} == {3e-4, 1e-3, 3e-3, 1e-2}
    assert chosen == {}
    tried, chosen = known(optimum)
    assert {rate for mechanism, rate in tried if mechanism == "softmax"} == {3e-4, 1e-3, 3e-3, 1e-2, 3e-2}
    assert chosen == optimum


def test_the_end_of_the_ladder_ends_the_trials():
    tried, chosen = known({"softmax": 1e-9, "sigmoid": 1.0})
    assert {rate for _, rate in tried} == set(SCALES["full"].rates)
    assert chosen == {"softmax": 1e-4, "sigmoid": 3e-2}
    assert further_rates((1, 2), (1, 2), (1, 2)) == []


def test_no_finite_loss_leaves_no_final_runs():
    runs = list(PLAN.known(lambda config: math.nan))
    assert {config.purpose for config in runs} == {"selection"}


CONFIG = run_config("tiny", "gut", "sigmoid", "selection", seed=1000, learning_rate=1e-2)


def finished(work, config=CONFIG, loss=4.0):
    facts = {"config": asdict(config), "is_finished": True, "validation_loss": loss}
    write_run(work / f"{config.name}.npz", facts, RecordTable().arrays())


def test_what_one_machine_finished_the_next_knows(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for work in (first, second, third):
        work.mkdir()
    other = replace(CONFIG, name="other")
    finished(first)
    finished(first, other, loss=math.nan)
    progress = Progress(first)
    assert progress.validation_loss(CONFIG) == 4.0
    assert math.isnan(progress.validation_loss(other))
    progress.write(tmp_path / "done.json", [CONFIG.name])  # the other had no room in the archives
    progress = Progress(second, [tmp_path / "done.json"])
    assert progress.validation_loss(CONFIG) == 4.0
    assert progress.validation_loss(other) is None
    finished(second, other, loss=3.0)
    assert progress.validation_loss(other) == 3.0
    progress.write(tmp_path / "done2.json", [other.name])
    assert json.loads((tmp_path / "done2.json").read_text()).keys() == {CONFIG.name, "other"}


def test_runs_of_archives_are_known_too(tmp_path):
    finished(tmp_path)
    write_run(tmp_path / "pca.npz", {"config": {"name": "pca"}}, RecordTable().arrays())  # a baseline
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        for path in tmp_path.glob("*.npz"):
            archive.write(path, path.name)
    (tmp_path / "done.json").write_text("{}")
    progress = Progress(tmp_path / "empty", [tmp_path / "runs.zip", tmp_path / "done.json"])
    assert progress.validation_loss(CONFIG) == 4.0


def test_a_run_of_other_cells_before_is_no_run_of_ours(tmp_path, capsys):
    finished(tmp_path)
    progress = Progress(tmp_path)
    progress.validation_loss(CONFIG)
    progress.write(tmp_path / "done.json", [CONFIG.name])
    later = Progress(tmp_path / "empty", [tmp_path / "done.json"])
    assert later.validation_loss(replace(CONFIG, data_digest="other")) is None
    assert "another configuration" in later.unusable[CONFIG.name]
    assert capsys.readouterr().out.startswith(CONFIG.name)


@pytest.mark.parametrize("content", [b"", b"PK not an archive"])
def test_a_file_that_is_broken_is_told_of_once(tmp_path, capsys, content):
    (tmp_path / f"{CONFIG.name}.npz").write_bytes(content)
    progress = Progress(tmp_path)
    assert progress.validation_loss(CONFIG) is None
    assert progress.validation_loss(CONFIG) is None
    assert capsys.readouterr().out.count("cannot be used") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"config": {}}}'])
def test_files_that_name_no_finished_runs(tmp_path, content):
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(ValueError, match="as an earlier call wrote them"):
        Progress(tmp_path, [tmp_path / "done.json"])
