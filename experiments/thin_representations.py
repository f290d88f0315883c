"""Thins runs of the representation experiment to what its report needs: small enough for the repository.

    python -m experiments.thin_representations results/*.zip --out docs/results/representations/2026-11-24.zip

Embeddings are turned onto the principal axes of the held-out cells about the training cells' mean, which
changes no distance, and rounded to whole units so small that this adds a hundred-thousandth to the squared
distances. Most axes need few bits then, and no metric depends on the unit. Records keep 11 of float32's 24
bits. Everything else stays as it was. Final runs of a seed that is not whole are left out: see
docs/representations.md.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from io import BytesIO
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.cell_transformer import MECHANISMS
from experiments.command_line import experiment_parser, fail
from experiments.representation_results import RawRun, read_raw
from experiments.run_records import RecordedRun, write_run_to
from experiments.thin_records import rounded

ADDED = 1e-5


def of_whole_seeds(runs: Sequence[RawRun]) -> list[RawRun]:
    """Leaves out final runs from the first seed on of which not all have ended, on all data sets.

    A lease that ends cuts long runs rather than short ones: to keep the others of that seed would favour
    these.

    Args:
        runs: Of one lease, baselines among them.

    Returns:
        The runs that count, in the same order.
    """
    datasets = {run.config["dataset"] for run in runs}
    ended = {
        (run.config["seed"], run.config["dataset"], run.config["mechanism"])
        for run in runs
        if run.config["purpose"] == "final"
    }
    seeds = sorted({seed for seed, *_ in ended})
    whole = takewhile(lambda seed: ended.issuperset(product([seed], datasets, MECHANISMS)), seeds)
    counting = set(whole)
    return [run for run in runs if run.config["purpose"] != "final" or run.config["seed"] in counting]


def on_principal_axes(embeddings: NDArray[Any], centre: NDArray[Any]) -> NDArray[np.int32]:
    """Embeddings about a centre in whole units, without the axes on which nothing is left.

    Args:
        embeddings: [cells, dimensions] floating point.
        centre: [dimensions].

    Returns:
        [cells, axes] int32, the axes one after the other in memory; their centre is the origin.

    Example:
        >>> line = np.arange(6.0)[:, None] * [3.0, 4.0]
        >>> on_principal_axes(line, np.zeros(2)).shape
        (6, 1)
    """
    about = embeddings.astype(np.float64) - centre
    left, sizes, _ = np.linalg.svd(about, full_matrices=False)
    # A rounding to units adds unit² / 12 on average on each axis.
    unit = np.sqrt(12 * ADDED * np.square(about).sum(axis=1).mean() / len(sizes))
    units = np.rint(left * sizes / unit).astype(np.int32)
    return np.asfortranarray(units[:, units.any(axis=0)])


def write_thinned(run: RawRun) -> bytes:
    """The thinned run as a file.

    Args:
        run: Of `read_raw`.

    Returns:
        What `read_raw` reads.
    """
    series = {name: (steps, rounded(values)) for name, (steps, values) in run.records.series.items()}
    arrays = dict(run.arrays)
    for name in ("embeddings", "untrained"):
        if name in arrays:
            arrays[name] = on_principal_axes(arrays[name], arrays[f"{name}_centre"])
            arrays[f"{name}_centre"] = np.zeros(arrays[name].shape[1], np.float32)
    file = BytesIO()
    write_run_to(file, RecordedRun(run.facts, run.records.alerts, series), **arrays)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one archive. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("thin_representations", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="archives, files or folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the .zip archive to write")
    options = parser.parse_args(arguments)
    try:
        found = read_raw(options.sources)
        runs = of_whole_seeds(found)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(options.out, "w", zipfile.ZIP_STORED) as archive:
            for run in runs:
                archive.writestr(zipfile.ZipInfo(f"{run.config['name']}.npz"), write_thinned(run))
    except (OSError, ValueError) as error:
        return fail("thin_representations", error)
    print(f"Written: {options.out}, {len(runs)} runs, {options.out.stat().st_size / 1e6:.1f} MB.")
    kept = {run.config["name"] for run in runs}
    if left_out := [name for name in (run.config["name"] for run in found) if name not in kept]:
        print(f"Left out, as their seed is not whole: {', '.join(left_out)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
