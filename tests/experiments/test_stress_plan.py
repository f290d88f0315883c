from __future__ import annotations

from collections import Counter

import pytest
import torch

from experiments.cell_transformer import CellTransformer, CellTransformerConfig
from experiments.gene_ranks import RankTransformer
from experiments.prepare_cells import NUM_GENES
from experiments.stress_plan import (
    LEASE_MINUTES,
    NUM_GPUS,
    START_SECONDS,
    estimated_seconds,
    expected_minutes,
    main,
    planned_runs,
)
from experiments.stress_questions import QUESTIONS


def test_the_plan_is_large_enough():
    runs = [config for _, config in planned_runs().values()]
    assert len(runs) == sum(2 * len(question.seeds) for question in QUESTIONS)
    counts = Counter(config.mechanism for config in runs)
    assert min(counts["softmax"], counts["sigmoid"]) >= 12
    assert all(config.steps >= 1500 for config in runs)


def test_both_mechanisms_get_the_same():
    runs = planned_runs()
    for name, (question, config) in runs.items():
        other = runs[name.replace("softmax", "sigmoid")][1]
        assert {**vars(config), "name": "", "mechanism": ""} == {**vars(other), "name": "", "mechanism": ""}
        assert question.hypothesis
        assert question.prediction


def test_every_session_fits_a_lease_of_the_machine_it_is_made_for():
    for session in (1, 2):
        questions = [question for question in QUESTIONS if question.session == session]
        assert 0.75 * LEASE_MINUTES < expected_minutes(questions, NUM_GPUS) < LEASE_MINUTES
    assert {question.session for question in QUESTIONS} == {1, 2, 3, 4}
    assert [question.session for question in QUESTIONS] == sorted(question.session for question in QUESTIONS)


def test_a_run_alone_takes_half_as_long_where_the_gpu_sets_the_pace():
    _, lead = planned_runs()["lead-softmax-seed0"]
    assert estimated_seconds(lead, 1) == pytest.approx(6000 * 0.22)
    assert estimated_seconds(lead, 2) == pytest.approx(6000 * 0.44)


def test_minutes_on_machines_of_several_sizes():
    (lead,) = (question for question in QUESTIONS if question.name == "lead")
    (rate,) = (question for question in QUESTIONS if question.name == "rate-1e-3")
    alone, shared = START_SECONDS + 6000 * 0.22, START_SECONDS + 6000 * 0.44
    assert expected_minutes([lead], 1) == pytest.approx(shared / 60)
    assert expected_minutes([lead], 2) == pytest.approx(alone / 60)
    assert expected_minutes([lead], 4) == pytest.approx(alone / 60)
    of_six = START_SECONDS + 1500 * 0.11
    assert expected_minutes([rate], 1) == pytest.approx(3 * of_six / 60)
    assert expected_minutes([rate], 4) == pytest.approx(of_six / 60)
    assert expected_minutes([lead, rate], 4) == pytest.approx(alone / 60)


def test_every_model_has_between_154_and_162_million_parameters():
    models = {(config.task, str(config.model)): config for _, config in planned_runs().values()}
    assert len(models) > 3
    for config in models.values():
        sizes = CellTransformerConfig.preset("160m", num_genes=NUM_GENES, **config.model)
        with torch.device("meta"):
            model = (RankTransformer if config.task == "ranks" else CellTransformer)(sizes)
        assert 154e6 < model.parameter_counts()["total"] < 162e6, config.name


def test_a_small_preset_changes_sizes_and_keeps_the_question():
    runs = planned_runs("tiny")
    assert list(runs) == [f"tiny-{name}" for name in planned_runs()]
    assert all(config.name == name for name, (_, config) in runs.items())
    _, deep = runs["tiny-deep-softmax-seed0"]
    assert (deep.preset, deep.data, deep.tokens, deep.model) == ("tiny", "synthetic", 64, {})
    _, post = runs["tiny-post-ln-sigmoid-seed0"]
    assert post.model == {"norm_position": "post"}
    assert runs["tiny-bfloat16-weights-softmax-seed0"][1].precision == "bfloat16"


def test_the_plan_is_printed_with_its_predictions(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for question in QUESTIONS:
        assert question.hypothesis in printed
        assert question.prediction in printed


def test_the_cost_is_of_the_machine_asked_for(capsys):
    assert main(["--gpus", "1"]) == 0
    (lead,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Session 1"))
    assert lead.startswith("Session 1: 20 runs, 88 minutes expected on 1 GPUs")
    with pytest.raises(SystemExit, match="2"):
        main(["--gpus", "0"])
