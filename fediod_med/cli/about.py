"""Commands about this installation."""

from __future__ import annotations

from typing import Annotated

import typer

from fediod_med import __version__
from fediod_med.resources import NOT_FOR_CLINICAL_USE


def info(json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Versions and what this installation can do."""
    import importlib.metadata
    import json

    names = ("torch", "monai", "nibabel", "numpy", "scipy", "SimpleITK", "nilearn", "safetensors")
    versions = {"fediod-med": __version__} | {name: importlib.metadata.version(name) for name in names}
    if json_:
        typer.echo(json.dumps({"notice": NOT_FOR_CLINICAL_USE, "versions": versions}, indent=2))
        return
    for name, version in versions.items():
        typer.echo(f"{name} {version}")
    typer.echo(NOT_FOR_CLINICAL_USE)
