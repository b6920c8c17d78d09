"""What commands print while they work and when they are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from fediod_med.resources import NOT_FOR_CLINICAL_USE

if TYPE_CHECKING:
    from fediod_med.progress import Progress


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """One rich bar per stage on standard error."""
    if quiet:
        yield lambda _stage, _done, _total, _detail: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, detail: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, detail=detail)
            bars.update(tasks[stage], completed=done, total=total, detail=detail)

        yield show


def announce(line: str) -> None:
    """One line about privacy on standard error."""
    typer.echo(f"privacy, {line}", err=True)


def print_result(result: Any) -> None:
    """The comparison of a `runs.distill.RunResult` as a table, its privacy and its folder."""
    from rich.console import Console

    from fediod_med.reporting.tables import results_table

    console = Console()
    console.print(results_table(result.summary))
    console.print(result.summary["privacy_statement"], style="bold red")
    console.print(f"{NOT_FOR_CLINICAL_USE} Scores: mean Dice on held-out {result.summary['data']}.")
    console.print(f"Run folder: {result.out} (summary.json, figures/, synthetic/, bundle/)")
