"""Options that several commands share, under one name and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fediod_med.sites import Site

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; new or empty unless --resume.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same folder.")]
SitesDir = Annotated[Path, typer.Option("--sites", help="Folder with one folder per hospital.")]
DataRoot = Annotated[Path | None, typer.Option(help="Root of the scans; overrides dataset_dir of the site files.")]
Spacing = Annotated[float | None, typer.Option(help="Working grid in mm; overrides the site files.")]
Roi = Annotated[int | None, typer.Option(help="Crop in voxels a side, a multiple of 8; overrides the site files.")]
Canaries = Annotated[
    int, typer.Option(min=0, help="Mislabelled phantoms for a throw-away private teacher of each dp-sgd site; 0: off.")
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of a teacher; overrides the site files.")]


def overridden(site: Site, spacing: float | None, roi: int | None, epochs: int | None) -> Site:
    """The site with what the command line overrides."""
    import dataclasses

    return dataclasses.replace(
        site,
        spacing=site.spacing if spacing is None else spacing,
        roi=site.roi if roi is None else roi,
        epochs=site.epochs if epochs is None else epochs,
    )
