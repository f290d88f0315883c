from __future__ import annotations

import numpy as np
import pytest

from experiments.embedding_metrics import METRICS
from experiments.paired_comparison import compare
from experiments.representation_figures import draw_differences, draw_embeddings, type_colours
from experiments.representation_findings import LOSSES, PRIMARY, compare_all
from experiments.representation_results import Judged, RawRun
from experiments.representation_scope import Scope
from experiments.representation_tables import markdown
from experiments.run_records import RecordedRun


def judged(method: str, seed: int | None, silhouette: float, dataset: str = "gut") -> Judged:
    return Judged(dataset, method, seed, dict.fromkeys((*METRICS, *LOSSES), silhouette))


def test_all_metrics_are_of_the_seeds_that_are_compared():
    """Otherwise a page tells two means of the same runs, and ± those of seeds that count nowhere."""
    found = [judged("PCA", None, 0.5), judged("softmax untrained", 1, 0.1)]
    found += [judged("softmax", seed, 0.2) for seed in (1, 2)]
    found += [judged("sigmoid", seed, 0.3 if seed < 3 else 0.9) for seed in (1, 2, 3)]
    found += [judged("PCA", None, 0.5, "blood"), judged("sigmoid", 1, 0.3, "blood")]
    scope = Scope(frozenset(), ("gut", "blood"), missing=("blood",))
    page = markdown(
        found, [], compare_all([e for e in found if e.dataset == "gut"], scope), Everywhere(), scope
    )
    rows = [line for line in page.split("## All metrics")[1].splitlines() if line.startswith("| gut")]
    assert [row.split(" | ")[1:3] for row in rows] == [
        ["PCA", "0.500"],
        ["softmax untrained", "0.100"],
        ["softmax", "0.200 ± 0.000"],
        ["sigmoid", "0.300 ± 0.000"],
    ]
    assert "| blood | PCA" in page
    assert "| blood | sigmoid" not in page


def test_controls_are_named_and_come_last_in_the_table_of_all_metrics():
    found = [judged(method, seed, 0.2, name) for name in ("a", "gut") for method in ("softmax", "sigmoid")
             for seed in (1, 2)]  # fmt: skip
    scope = Scope(frozenset({"a"}), ("gut",))
    comparisons = {metric: [] for metric in (*METRICS, *LOSSES)}
    page = markdown(found, [], comparisons, Everywhere(), scope)
    rows = [line.split(" | ")[0] for line in page.split("## All metrics")[1].splitlines() if " | 0.2" in line]
    assert rows == ["| gut", "| gut", "| a (control)", "| a (control)"]


class Everywhere(dict):
    """An interval over cells for each metric and data set."""

    def __missing__(self, key):
        from experiments.representation_bootstrap import CellInterval

        return CellInterval(0.0, 1.0, "cells", 5) if key == "gut" else Everywhere()


@pytest.mark.parametrize("count", [20, 22, 40, 50])
def test_no_two_types_have_one_colour(count):
    """The gut has 22 types."""
    assert len(set(type_colours(count))) == count


def test_the_figure_tells_controls_and_what_does_not_count(tmp_path):
    values = np.array([0.0, 1.0, 2.0]), np.array([0.1, 1.2, 2.3])
    comparisons = compare(dict.fromkeys(("gut", "blood", "lines"), values))
    scope = Scope(frozenset({"lines"}), ("gut", "blood"), unlearned=("blood",))
    draw_differences(tmp_path / "differences.svg", dict.fromkeys(PRIMARY.values(), comparisons), scope)
    drawn = (tmp_path / "differences.svg").read_text()  # each text is a comment there
    assert "lines (control)" in drawn
    assert "blood (attention learned nothing here)" in drawn


def test_what_decides_is_told_apart_from_what_does_not():
    found = [judged(method, seed, 0.2) for method in ("softmax", "sigmoid") for seed in (1, 2)]
    scope = Scope(frozenset({"lines"}), ("gut", *"abcde"))
    page = markdown(found, [], compare_all(found, scope), Everywhere(), scope)
    primary, others = page.split("## ")[0].split("They decide nothing:")
    assert [line.split(":")[0] for line in primary.splitlines() if line.startswith("* ")] == [
        "* Separation (silhouette)",
        "* Cohesion (within-type cosine similarity)",
        "* Loss on held-out cells",
    ]
    assert others.count("\n* ") == 4
    assert "intervals are at 99.17 % (a control's at 95 %)" in primary


def test_an_interval_without_numbers_says_why():
    found = [judged("softmax", 1, 0.2), judged("softmax", 2, float("nan"))]
    found += [judged("sigmoid", seed, 0.2) for seed in (1, 2)]
    scope = Scope(frozenset(), ("gut",))
    page = markdown(found, [], compare_all(found, scope), Everywhere(), scope)
    assert "– (no finite number)" in page
    assert "one seed" not in page


def test_the_figures_tell_levels_and_controls(tmp_path):
    comparisons = compare({"gut": (np.array([0.0, 1.0, 2.0]), np.array([0.1, 1.2, 2.3]))})
    scope = Scope(frozenset({"lines"}), ("gut", *"abcde"))
    draw_differences(tmp_path / "differences.svg", dict.fromkeys(PRIMARY.values(), comparisons), scope)
    assert "at 99.17 % (a control's at 95 %)" in (tmp_path / "differences.svg").read_text()
    points = np.random.default_rng(0).normal(size=(12, 3))
    runs = []
    for mechanism in ("softmax", "sigmoid"):
        config = {"dataset": "lines", "mechanism": mechanism, "purpose": "final", "seed": 10}
        facts = {"config": config, "is_control": True}
        arrays = {"embeddings": points, "labels": np.repeat(["a", "b"], 6)}
        runs.append(RawRun(facts, RecordedRun(facts, [], {}), arrays))
    draw_embeddings(tmp_path / "embeddings.svg", runs)
    drawn = (tmp_path / "embeddings.svg").read_text()
    assert "lines (control), PCA" in drawn
    assert "softmax untrained" in drawn


def test_the_training_table_tells_valid_tokens_a_second():
    facts = {
        "config": {"purpose": "final", "dataset": "gut", "mechanism": "softmax"},
        "is_stopped_by_patience": True,
        "is_diverged": False,
        **dict.fromkeys(
            ("steps", "best_step", "padding", "reference", "without_attention", "validation_loss"), 0.5
        ),
    }
    records = RecordedRun(facts, [], {})
    runs = [RawRun(facts | {"tokens_per_second": each}, records, {}) for each in (1e4, 3e4, 9e4)]
    comparisons = {metric: [] for metric in (*METRICS, *LOSSES)}
    page = markdown([], runs, comparisons, Everywhere(), Scope(frozenset(), ("gut",)))
    table = page.split("## Training")[1].split("##")[0]
    header, _, row = (line.split(" | ") for line in table.splitlines() if line.startswith("|"))
    assert dict(zip(header, row, strict=True))["valid tokens a second"] == "30,000"
