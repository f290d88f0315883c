"""TensorBoard runs from the records of long runs, thinned.

    python -m experiments.records_to_tensorboard ARCHIVE.zip ... --out runs/stress-160m

Whole layers, each tenth step unless said otherwise, under the tags that the probes use themselves, and the
alerts. `make tensorboard-demo` does it with the published runs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.command_line import experiment_parser, fail, positive_int
from experiments.run_records import RecordedRun
from experiments.stress_ledger import read_runs
from probes.record import Series, StepRecords
from probes.sinks import TensorBoardSink
from stability.divergence import Alert


def write_events(run: RecordedRun, log_dir: Path, every: int) -> None:
    """Write one run.

    Args:
        run: The run.
        log_dir: Its directory; it is made.
        every: Steps that are multiples of it are kept.

    Raises:
        OSError: The directory cannot be written.
    """
    steps: defaultdict[int, list[tuple[Series, float]]] = defaultdict(list)
    for series, (at, values) in run.series.items():
        if series.head is None:
            kept = at % every == 0
            for step, value in zip(at[kept].tolist(), values[kept].tolist(), strict=True):
                steps[step].append((series, value))
    sink = TensorBoardSink(log_dir)
    for step, records in sorted(steps.items()):
        names, numbers = zip(*records, strict=True)
        sink.write(StepRecords(step, names, np.array(numbers), np.full(len(numbers), np.nan)))
    for alert in run.alerts:
        sink.write_alert(Alert(**alert))
    sink.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the runs side by side. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("records_to_tensorboard", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="archives, files or folders of records")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one directory per run")
    parser.add_argument("--every", type=positive_int, default=10, help="steps kept (default each 10th)")
    options = parser.parse_args(arguments)
    try:
        for name, run in read_runs(options.sources).items():
            write_events(run, options.out / name, options.every)
    except (OSError, ValueError) as error:
        return fail("records_to_tensorboard", error)
    print(f"Written: {options.out}. make tensorboard RUNS={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
