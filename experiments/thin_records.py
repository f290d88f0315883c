"""Thins the records of long runs to what the ledger and its figure need: small enough for the repository.

    python -m experiments.thin_records ARCHIVE.zip ... --out docs/results/stress-160m/2026-11-22.zip

Kept are numbers of the whole model (loss, gradient norm) at every step, and of whole layers at each tenth
step: all but `weight_norm`, with 11 of float32's 24 bits. Verdicts come from the former and from the last
attention statistics, so the ledger of thinned records has the same table but for the first layer to go.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.command_line import experiment_parser, fail, positive_int
from experiments.run_records import RecordedRun, write_run_to
from experiments.stress_ledger import read_runs
from probes.record import ALL_LAYERS


def thinned(run: RecordedRun, every: int) -> RecordedRun:
    """A run with the numbers that its judgement needs.

    Args:
        run: The run.
        every: Steps of layers that are multiples of it are kept.

    Returns:
        A run with the same facts and alerts, and fewer series and steps.
    """
    series = {}
    for name, (steps, values) in run.series.items():
        if name.layer == ALL_LAYERS:
            series[name] = steps, values
        elif name.head is None and name.quantity != "weight_norm":
            kept = steps % every == 0
            series[name] = steps[kept], rounded(values[kept])
    return RecordedRun(run.facts, run.alerts, series)


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zeros in the last 13 bits, which compress well."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one archive. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("thin_records", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="archives, files or folders of records")
    parser.add_argument("--out", type=Path, required=True, help="the .zip archive to write")
    parser.add_argument("--every", type=positive_int, default=10, help="steps kept (default each 10th)")
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.sources)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(options.out, "w", zipfile.ZIP_STORED) as archive:
            for name, run in runs.items():
                content = BytesIO()
                write_run_to(content, thinned(run, options.every))
                archive.writestr(zipfile.ZipInfo(f"{name}.npz"), content.getvalue())
    except (OSError, ValueError) as error:
        return fail("thin_records", error)
    print(f"Written: {options.out}, {len(runs)} runs, {options.out.stat().st_size / 1e6:.1f} MB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
