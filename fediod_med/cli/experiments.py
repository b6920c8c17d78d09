"""`fediod experiment`: the experiments behind docs/experiments.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fediod_med.cli.display import progress_bars
from fediod_med.cli.options import Out, Quiet, Resume
from fediod_med.errors import SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE

_NAMES = ("digits", "cifar", "backbones", "divergence", "scaling")


def experiment(
    name: Annotated[str, typer.Argument(help=", ".join(_NAMES) + ".")],
    out: Out,
    profile: Annotated[
        str, typer.Option(help="full, smoke (seconds, meaningless scores) or tune (digits, cifar).")
    ] = "full",
    images: Annotated[Path | None, typer.Option("--images", help="Folder with CIFAR; for cifar alone.")] = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment of docs/experiments.md: classification, or one of the paper's open questions on phantoms."""
    if name not in _NAMES:
        raise SettingsError(f"experiment: expected {', '.join(_NAMES)}, found {name!r}")
    if (name == "cifar") != (images is not None):
        raise SettingsError("experiment: expected --images with cifar, and with no other; nothing is downloaded")
    typer.echo("NOT PRIVATE: an experiment holds every site's data in one process.", err=True)
    with progress_bars(quiet) as progress:
        if name == "digits":
            from fediod_med.experiments.digits import run_digits

            table = run_digits(out, profile, resume=resume, progress=progress)
        elif images is not None:
            from fediod_med.experiments.digits import run_cifar

            table = run_cifar(out, images, profile, resume=resume, progress=progress)
        else:
            from fediod_med.experiments.questions import run_question

            table = run_question(name, out, profile, resume=resume, progress=progress)
    typer.echo(table)
    typer.echo(f"{out}: results.json, table.md, rows/. NOT PRIVATE. {NOT_FOR_CLINICAL_USE}")
