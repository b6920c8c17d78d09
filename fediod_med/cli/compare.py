"""`fediod compare`: every row of the comparison on the same patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fediod_med.cli.display import progress_bars
from fediod_med.cli.options import DataRoot, Device, Epochs, Out, Quiet, Resume, Roi, Spacing
from fediod_med.errors import SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE


def compare(
    out: Out,
    sites: Annotated[
        Path | None, typer.Option("--sites", help="Folder with one folder per hospital; profile smoke makes its own.")
    ] = None,
    data_root: DataRoot = None,
    profile: Annotated[str, typer.Option(help="cpu (4 mm), gpu (1 mm) or smoke (phantoms, meaningless).")] = "cpu",
    folds: Annotated[int, typer.Option(min=2, help="Each patient is tested once per seed.")] = 3,
    seeds: Annotated[str, typer.Option(help="Repetitions, such as '0 1 2'.")] = "0 1 2",
    rows: Annotated[
        str,
        typer.Option(
            help="Rows or patterns, such as 'ours* fedavg site:*'; all but ours_with_*, *_generations if empty."
        ),
    ] = "",
    teachers: Annotated[str, typer.Option(help="shared (one network everywhere) or as-sites (their own).")] = "shared",
    data_name: Annotated[str, typer.Option(help="patients or phantoms; beside every score.")] = "patients",
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes; 0: one per GPU, or per core.")] = 0,
    spacing: Spacing = None,
    roi: Roi = None,
    epochs: Epochs = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each distillation.")] = None,
    pool: Annotated[int | None, typer.Option(min=1, help="Public phantoms the centre draws from.")] = None,
    device: Device = "auto",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Compare hospitals alone, ensembles, pooled, FedAvg, FedProx, rivals, ours, and ours minus each part."""
    import dataclasses

    from fediod_med.comparison.profiles import get_profile
    from fediod_med.comparison.run import make_plan, run_comparison
    from fediod_med.comparison.smoke import write_smoke_sites
    from fediod_med.comparison.tables import target_lines
    from fediod_med.sites import load_sites

    if data_name not in ("patients", "phantoms"):
        raise SettingsError(f"--data-name: expected patients or phantoms, found {data_name!r}")
    given: dict[str, Any] = {"spacing": spacing, "roi": roi, "epochs": epochs, "rounds": rounds, "pool": pool}
    size = dataclasses.replace(
        get_profile(profile), **{key: value for key, value in given.items() if value is not None}
    )
    if sites is None:
        if size.name != "smoke":
            raise SettingsError(
                "--sites: expected a folder with one folder per hospital; only profile smoke needs none"
            )
        made = out.with_name(f"{out.name}-phantoms")
        sites = made / "sites" if (made / "sites").is_dir() else write_smoke_sites(made)
        data_name = "phantoms"
    plan = make_plan(
        load_sites(sites, data_root=data_root),
        out=out,
        profile=size,
        folds=folds,
        seeds=_numbers(seeds),
        rows=rows.replace(",", " ").split(),
        teachers=teachers,
        data_name=data_name,
    )
    typer.echo("NOT PRIVATE: a comparison pools scans and moves weights.", err=True)
    with progress_bars(quiet) as progress:
        result = run_comparison(
            plan,
            device=device,
            jobs=jobs,
            resume=resume,
            progress=progress,
            announce=lambda line: typer.echo(line, err=True),
        )
    typer.echo((out / "table.md").read_text(encoding="utf-8"))
    for line in target_lines(result.results):
        typer.echo(f"target, {line}")
    for key, reason in result.failed.items():
        typer.echo(f"failed: {key}: {reason}", err=True)
    typer.echo(f"{out}: results.json, table.md, table.tex, plots/, cells/. NOT PRIVATE. {NOT_FOR_CLINICAL_USE}")
    if result.failed:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise SettingsError(f"--seeds: expected whole numbers such as '0 1 2', found {text!r}") from None
