"""The report of a recorded run: ``python -m probes.report RUN_DIR [--compare OTHER ...] [--out FILE]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from probes.figures import write_figures
from probes.report_page import RANKING_HEAD, drawn, html, ranking_rows
from probes.reported_run import ReportedRun, load_runs


def write_report(run_dir: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run: one HTML page that needs nothing else, and its pictures as PNG beside it.

    Args:
        run_dir: The ``log_dir`` of a probe, finished, running or killed; or one file that
            :func:`probes.read` takes.
        *others: Runs to set beside it.
        out: The page; None: ``report.html`` in ``run_dir``, or beside a file, with the file's name before it.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If a file is not one of ours.
        OSError: If the report cannot be written.

    Example:
        >>> import tempfile, torch, probes
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as log_dir:
        ...     with probes.attach(model, optimizer, log_dir=log_dir) as probe:
        ...         for _ in range(3):
        ...             model(torch.ones(1, 2)).square().sum().backward()
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        ...     page = write_report(log_dir)
        ...     page.name, "<script" in page.read_text()
        ('report.html', False)
    """
    page = _out(Path(run_dir), out)
    _write(load_runs([Path(run_dir), *map(Path, others)]), page)
    return page


def _out(run_dir: Path, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    # Beside an incident's series.npz lies the incident's own report.html.
    return run_dir / "report.html" if run_dir.is_dir() else run_dir.with_name(f"{run_dir.stem}-report.html")


def _write(runs: Sequence[ReportedRun], page: Path) -> list[Path]:
    shown = drawn(runs)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html(runs, shown), encoding="utf-8", errors="replace")
    return write_figures(shown, page.parent, page.stem)


def print_report(runs: Sequence[ReportedRun]) -> None:
    """The story and the ranking of each run on the terminal; as plain text where rich is not installed."""
    for run in runs:
        title = f"{run.view.name}: {run.story.title}"
        ranking = [[cell.strip("`") for cell in row] for row in ranking_rows(run)]
        rows = [[name, text.replace("`", "")] for name, text in run.facts.items()]
        sentence = run.story.sentence.replace("`", "")
        if run.story.remedies:
            rows.insert(0, ["what usually helps", "\n".join(run.story.remedies)])
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            print(f"{title}\n\n{sentence}\n\n{_columns(rows)}\n")
            if ranking:
                print(_columns([list(RANKING_HEAD), *ranking]) + "\n")
            continue
        console = Console()
        if not console.is_terminal:  # a file has no width of its own, and rich would fold the table
            console = Console(width=150)
        console.print(Text(title, style="bold"))
        console.print(Text(sentence))
        for heading, head, body in (("", ("", ""), rows), ("Farthest layers", RANKING_HEAD, ranking)):
            if body:
                table = Table(title=heading, title_justify="left", show_header=any(head))
                for name in head:
                    is_number = name in ("usual", "farthest", "over peers", "at step", "away since step")
                    table.add_column(name, justify="right" if is_number else "left")
                for row in body:
                    table.add_row(*(Text(cell) for cell in row))
                console.print(table)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Texts in columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes and prints the report.

    Args:
        arguments: Command line without the program name; None reads ``sys.argv``.

    Returns:
        Exit status: 0, or 2 if there is no run or the report cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m probes.report",
        description="Tell what happened in a recorded run, where and when: on the terminal, as one HTML page "
        "and as PNG pictures.",
    )
    parser.add_argument("run_dir", type=Path, help="the log_dir of a probe, or one recorded file")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="OTHER", help="runs to set beside it"
    )
    parser.add_argument(
        "--out", type=Path, help="the page (default: report.html in RUN_DIR; of a file, FILE-report.html)"
    )
    options = parser.parse_args(arguments)
    try:
        runs = load_runs([options.run_dir, *options.compare])
        page = _out(options.run_dir, options.out)
        figures = _write(runs, page)
    except (OSError, ValueError) as error:
        print(f"probes.report: {error}", file=sys.stderr)
        return 2
    print_report(runs)
    print(f"Written: {page}" + (f" and {len(figures)} pictures {page.stem}-*.png" if figures else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
