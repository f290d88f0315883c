"""Try to break the bounds on attention's row Jacobians, and print what was found.

    python -m experiments.verify_bounds                                     # half precisions: seconds
    python -m experiments.verify_bounds --dtype float16 bfloat16 float32    # 4.3 billion values: a minute
    python -m experiments.verify_bounds --dtype float32 --device cuda

The exit status is 0 if every bound held and 1 if one broke.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stability import bounds
from stability.bounds import Arithmetic, BoundCheck

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ARITHMETICS: tuple[Arithmetic, ...] = ("mathematics", "native")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks that the command line asks for.

    Args:
        argv: Arguments; `sys.argv` by default.

    Returns:
        The exit status: 0 if every bound held, else 1.
    """
    arguments = parse_arguments(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 130  # rich would fold a piped table at 80 columns
    start = time.perf_counter()
    checks = [bounds.verify_sigmoid_derivative_bound_on_reals()]
    for name in arguments.dtype:
        checks += check_sigmoid(DTYPES[name], arguments.device, console)
    for softmax_dtype in (torch.float64, torch.float32):
        with console.status(f"Searching softmax rows in {softmax_dtype}"):
            checks += bounds.verify_softmax_jacobian_bounds(
                dtype=softmax_dtype, device=arguments.device, seed=arguments.seed
            )
    print_table(checks, console)
    num_broken = sum(not check.holds for check in checks)
    verdict = "every bound holds" if num_broken == 0 else f"{num_broken} of {len(checks)} bounds BROKEN"
    console.print(f"{verdict}; {time.perf_counter() - start:.1f} s on {arguments.device}")
    return 0 if num_broken == 0 else 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a device that is not there is a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.verify_bounds", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        default=["float16", "bfloat16"],
        help="check σ′ at every finite value of these (default: float16 bfloat16)",
    )
    parser.add_argument("--device", default="cpu", help="where to evaluate, e.g. cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the search over softmax rows (default: 0)")
    arguments = parser.parse_args(argv)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        parser.error(f"--device {arguments.device} cannot be used here: {str(error).splitlines()[0]}")
    return arguments


def check_sigmoid(dtype: torch.dtype, device: str, console: Console) -> list[BoundCheck]:
    """Every finite value of one dtype in both arithmetics, under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    checks = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for arithmetic in ARITHMETICS:
            task = progress.add_task(f"{dtype}, {arithmetic}", total=bounds.num_finite_values(dtype))

            def advance(num_values: int, task: TaskID = task) -> None:
                progress.advance(task, num_values)

            checks.append(
                bounds.verify_sigmoid_derivative_bound(dtype, device, arithmetic=arithmetic, progress=advance)
            )
    return checks


def print_table(checks: Sequence[BoundCheck], console: Console) -> None:
    """One line for each check."""
    table = Table(title="Bounds on attention's row Jacobians", box=box.SIMPLE)
    for heading in ("quantity", "bound", "maximum", "excess", "at", "checked", "violations"):
        table.add_column(heading, justify="left" if heading == "quantity" else "right", overflow="fold")
    for check in checks:
        table.add_row(
            check.quantity,
            f"{check.bound:g}",
            f"{check.maximum:.8g}",
            f"{check.excess:.2g}",
            describe_argmax(check.argmax),
            f"{check.checked:,}",
            f"{check.violations:,}",
            style=None if check.holds else "bold red",
        )
    console.print(table)


def describe_argmax(argmax: float | tuple[float, ...]) -> str:
    """An input, a row of logits cut to its first three."""
    values = argmax if isinstance(argmax, tuple) else (argmax,)
    text = ", ".join(f"{value:.3g}" for value in values[:3])
    return text + (", …" if len(values) > 3 else "")


if __name__ == "__main__":
    # The chunks are cut to one core's cache. A second thread gains little, and on a busy machine waiting for
    # it at every operation costs a factor of ten and more.
    torch.set_num_threads(1)
    sys.exit(main())
