"""What the runs of the representation experiment say: tables, figures, JSON and the sentences on the claims.

    python -m experiments.representations_report runs/representations/results --out runs/report
    python -m experiments.representations_report archives/*.zip --out docs/results/representations

Reads runs, archives and folders of them. Everything is computed from the runs: metrics of the held-out cells'
embeddings, differences paired by seed, and each sentence from its interval. Writes `representations.md`,
`representations.json`, `differences.png` and `embeddings.png`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.command_line import experiment_parser, fail, run_facts, write_json
from experiments.paired_comparison import overall
from experiments.representation_bootstrap import cell_intervals
from experiments.representation_figures import draw_differences, draw_embeddings
from experiments.representation_findings import (
    LOSSES,
    PRIMARY,
    attention_relations,
    compare_all,
    counted,
    verdicts,
)
from experiments.representation_results import judge, read_raw
from experiments.representation_scope import check_runs, scope_of, selections
from experiments.representation_tables import markdown

# Of a run's facts what stays in the raw files: the loss at every look, and the versions, which are alike.
_ONLY_RAW = ("validation", "versions")


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the runs and write the report. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("representations_report", __doc__)
    parser.add_argument("raw", nargs="+", type=Path, help="runs, archives, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    started = time.time()
    try:
        runs = read_raw(options.raw)
        check_runs(runs)
        judged = [each for run in runs for each in judge(run)]
        if not any(each.method in ("softmax", "sigmoid") for each in judged):
            raise ValueError("Expected finished runs with embeddings; these have only tried learning rates.")
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return fail("representations_report", error)
    scope, cells = scope_of(runs), cell_intervals(runs)
    comparisons = compare_all(judged, scope)
    page = markdown(judged, runs, comparisons, cells, scope)
    (options.out / "representations.md").write_text(page, encoding="utf-8")
    families = {metric: counted(found, scope) for metric, found in comparisons.items()}
    write_json(
        options.out / "representations.json",
        {
            "schema_version": 1,
            **run_facts("representations_report", arguments, started),
            "primary": list(PRIMARY),
            "scope": asdict(scope) | {"controls": sorted(scope.controls)},
            "verdicts": verdicts(comparisons, scope),
            "comparisons": {m: [asdict(each) for each in found] for m, found in comparisons.items()},
            "intervals_over_cells": {
                metric: {dataset: asdict(interval) for dataset, interval in found.items()}
                for metric, found in cells.items()
            },
            "overall": {m: asdict(overall(found)) for m, found in families.items() if found},
            "selections": [
                {**row, "validation_losses": {f"{k:g}": v for k, v in row["validation_losses"].items()}}
                for row in selections(runs)
            ],
            "attention": attention_relations(judged, scope),
            "judged": [asdict(each) for each in judged],
            "runs": [
                {key: value for key, value in run.facts.items() if key not in _ONLY_RAW} for run in runs
            ],
        },
    )
    panels = {
        title + ", nats: lower is better" * (metric in LOSSES): comparisons[metric]
        for metric, title in PRIMARY.items()
    }
    draw_differences(options.out / "differences.png", panels, scope)
    draw_embeddings(options.out / "embeddings.png", runs)
    print(page)
    print(f"{len(runs)} runs. Written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
