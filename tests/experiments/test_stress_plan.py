from __future__ import annotations

from collections import Counter

import torch

from experiments.cell_transformer import CellTransformer, CellTransformerConfig
from experiments.gene_ranks import RankTransformer
from experiments.prepare_cells import NUM_GENES
from experiments.stress_plan import (
    LEASE_MINUTES,
    QUESTIONS,
    START_SECONDS,
    estimated_seconds,
    main,
    planned_runs,
)


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


def test_every_run_but_the_lead_fits_a_session_of_two_side_by_side():
    for session in range(1, 7):
        of_session = [
            START_SECONDS + estimated_seconds(config)
            for question, config in planned_runs().values()
            if question.session == session and not question.may_be_cut
        ]
        assert sum(of_session) / 2 <= 60 * LEASE_MINUTES, session


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
    assert runs.keys() == planned_runs().keys()
    _, deep = runs["deep-softmax-seed0"]
    assert (deep.preset, deep.data, deep.tokens, deep.model) == ("tiny", "synthetic", 64, {})
    _, post = runs["post-ln-sigmoid-seed0"]
    assert post.model == {"norm_position": "post"}
    assert runs["bfloat16-weights-softmax-seed0"][1].precision == "bfloat16"


def test_the_plan_is_printed_with_its_predictions(capsys):
    assert main() == 0
    printed = capsys.readouterr().out
    for question in QUESTIONS:
        assert question.hypothesis in printed
        assert question.prediction in printed
