"""The published trials of learning rates are those of the plan, and choose the rates of its final runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.prepare_representations import prepare
from experiments.representation_data import DATASETS, FOLDER
from experiments.representation_plan import NUM_SEEDS
from experiments.representation_progress import Plan
from experiments.representation_results import read_raw
from experiments.representation_scope import selections

REPOSITORY = Path(__file__).parents[2]
TRIALS = REPOSITORY / "docs/results/representations/2026-11-22-selection.zip"
PAGE = REPOSITORY / "docs/results/2026-11-22-representations-pilot.md"


def test_they_are_all_that_the_plan_asks_for():
    trials = {run.config["name"]: run for run in read_raw([TRIALS])}
    digests = {run.config["dataset"]: run.config["data_digest"] for run in trials.values()}
    losses = {name: run.facts["validation_loss"] for name, run in trials.items()}
    planned = list(Plan("full", digests, NUM_SEEDS).known(lambda config: losses.get(config.name)))
    asked = {config.name: config for config in planned if config.purpose == "selection"}
    assert asked.keys() == trials.keys()
    for name, config in asked.items():
        assert trials[name].config == json.loads(json.dumps(asdict(config)))
    assert len(planned) - len(asked) == 7 * 2 * NUM_SEEDS


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the cells of ../shared are not on this machine")
@pytest.mark.parametrize("name", ["cortexculture_human_fetal_brain", "endocrinogenesis_mouse_pancreas"])
def test_they_are_of_the_cells_that_are_prepared_today(name):
    digests = {run.config["data_digest"] for run in read_raw([TRIALS]) if run.config["dataset"] == name}
    assert digests == {prepare(DATASETS[name]).digest}


def test_the_page_has_their_means_and_what_they_chose():
    page = PAGE.read_text(encoding="utf-8")
    rows = selections(read_raw([TRIALS]))
    assert len(rows) == 14
    for row in rows:
        assert not row["is_edge"]
        for rate, losses in row["validation_losses"].items():
            mean = f"{sum(losses) / len(losses):.3f}"
            assert (f"**{mean}**" if rate == row["chosen"] else f" {mean} ") in page
