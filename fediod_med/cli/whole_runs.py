"""Commands that make a whole run: demo, phantoms, prior, distill."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fediod_med.cli.display import announce, print_result, progress_bars
from fediod_med.cli.options import (
    DataRoot,
    Device,
    Epochs,
    Out,
    Quiet,
    Resume,
    Roi,
    Seed,
    SitesDir,
    Spacing,
    overridden,
)
from fediod_med.errors import SettingsError, WorkerError
from fediod_med.resources import NOT_FOR_CLINICAL_USE

if TYPE_CHECKING:
    from fediod_med.parallel import Workers


def demo(
    out: Out = Path("runs/demo"),
    epsilon: Annotated[float, typer.Option(help="Privacy budget of each hospital; 0: NOT PRIVATE.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Three phantom hospitals from nothing to a segmented scan: teachers, distillation, comparison, bundle, figures."""
    from fediod_med.runs.demo import run_demo

    with progress_bars(quiet) as progress:
        result = run_demo(
            out=out,
            epsilon=epsilon,
            seed=seed,
            device=device,
            resume=resume,
            progress=progress,
            announce=announce,
        )
    print_result(result)
    typer.echo(f"Look at it in the review app: fediod review --run {out}")
    typer.echo(
        "Next, with your own data: `fediod segment -i CASE_FOLDER -o out`; "
        "to join as a hospital, read sites/template/README.md"
    )


def phantoms(
    out: Out, cases: Annotated[int, typer.Option(help="Cases per hospital.")] = 12, seed: Seed = 0, quiet: Quiet = False
) -> None:
    """Write the phantom hospitals alone: scans in a BraTS layout and their site files. No patient is in them."""
    from fediod_med.runs.demo import write_phantom_sites

    if out.is_dir() and any(out.iterdir()):
        raise SettingsError(f"{out}: expected a new or empty folder; choose another --out")
    with progress_bars(quiet) as progress:
        write_phantom_sites(out, seed=seed, cases=cases, progress=progress)
    typer.echo(f"Wrote {out}/hospitals and {out}/sites. Next: fediod distill --sites {out}/sites --out runs/phantoms")


def prior(
    out: Annotated[Path, typer.Option("--out", "-o", help="Weights file to write (.safetensors).")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2400,
    pool: Annotated[int, typer.Option(help="Phantoms per working grid.")] = 200,
    seed: Seed = 1,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train the public prior: the student's network on public phantoms only, on no patient."""
    from fediod_med.runs.prior import run_prior

    with progress_bars(quiet) as progress:
        path = run_prior(out=out, steps=steps, pool=pool, seed=seed, device=device, progress=progress)
    typer.echo(f"Wrote {path}. {NOT_FOR_CLINICAL_USE}")


def distill(
    sites: SitesDir,
    out: Out,
    data_root: DataRoot = None,
    spacing: Spacing = None,
    roi: Roi = None,
    epochs: Epochs = None,
    rounds: Annotated[int, typer.Option(help="Rounds of questions and answers.")] = 120,
    batch: Annotated[int, typer.Option(help="Synthetic volumes a round.")] = 2,
    student_batch: Annotated[int, typer.Option(help="Volumes a step of the student.")] = 2,
    mode: Annotated[str, typer.Option(help="conditional (label maps) or unconditional (paper).")] = "conditional",
    js_weight: Annotated[
        float | None, typer.Option(help="Weight of teacher divergence: > 0 seeks it, < 0 avoids it (published code).")
    ] = None,
    divergence: Annotated[str, typer.Option(help="jensen_shannon, or released (published code).")] = "jensen_shannon",
    teachers: Annotated[Path | None, typer.Option(help="Folder of trained teachers; else trained here.")] = None,
    compare: Annotated[bool, typer.Option(help="Also train the rows kd_phantoms and pooled.")] = True,
    pool: Annotated[int, typer.Option(help="Public phantoms the centre draws from.")] = 240,
    encoding: Annotated[str, typer.Option(help="Of replies: fp16, or compact (about a fifth of the bytes).")] = "fp16",
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Distil one central student from the hospitals' teachers; missing teachers are trained first.

    On several GPUs of this machine: `torchrun --standalone --nproc-per-node 2 -m fediod_med distill ...`. They share
    the work on the student and the generator; the result is that of one process up to rounding.
    """
    import dataclasses

    from fediod_med.distillation.settings import PAPER_OBJECTIVE, GeneratorObjective, Schedule
    from fediod_med.parallel import joined
    from fediod_med.runs.distill import run_distillation
    from fediod_med.sites import load_sites

    with joined(device) as (workers, own_device):
        if not workers.lead:
            _assist(workers, own_device)
            return
        hospitals = [overridden(site, spacing, roi, epochs) for site in load_sites(sites, data_root=data_root)]
        objective = GeneratorObjective() if mode == "conditional" else PAPER_OBJECTIVE
        js_weight = objective.unique if js_weight is None else js_weight
        objective = dataclasses.replace(objective, divergence=divergence, unique=js_weight)
        with progress_bars(quiet) as progress:
            result = run_distillation(
                hospitals,
                out=out,
                seed=seed,
                device=own_device,
                schedule=Schedule(rounds=rounds, batch=batch, student_batch=student_batch, encoding=encoding),
                mode=mode,
                objective=objective,
                pool=pool,
                teachers=teachers,
                compare=compare,
                resume=resume,
                progress=progress,
                announce=announce,
                workers=workers,
            )
    print_result(result)
    typer.echo(f"Next: fediod segment -i CASE_FOLDER -o out --model {out}")


def _assist(workers: Workers, device: str) -> None:
    """The part of every process but the first. It says nothing: the first has said why it stopped, if it did."""
    import logging

    from fediod_med.runs.distill import assist_distillation

    logging.disable(logging.WARNING)
    try:
        assist_distillation(workers, device=device)
    except WorkerError:
        raise typer.Exit(2) from None
