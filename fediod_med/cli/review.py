"""`fediod review`: opens the review app in a browser on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from fediod_med.errors import SettingsError


def review(
    run: Annotated[Path | None, typer.Option(help="Run folder to look into; as --root.")] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder to look into, and all below it; repeat for several.")
    ] = None,
    reviews: Annotated[Path | None, typer.Option(help="File that reviews are kept in.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for new segmentations.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8501,
) -> None:
    """Open the review app: runs, synthetic volumes, cases, ratings and privacy, on this machine only."""
    from importlib.util import find_spec

    from fediod_med.review.settings import ADDRESS, review_settings, server_command

    if find_spec("streamlit") is None:
        raise SettingsError("review: the app needs streamlit, which is not installed; pip install 'fediod-med[app]'")
    folders = [*(root or []), *([run] if run is not None else [])]
    settings = review_settings(folders, reviews=reviews, work=work)
    settings.open_roots()  # a wrong folder is said here, not in the browser
    command = server_command(settings, port=port)
    typer.echo(f"Review app on http://{ADDRESS}:{port} (this machine only); stop it with Ctrl-C.")
    typer.echo(f"Reviews are kept in {settings.reviews}")
    with subprocess.Popen(command) as server:
        try:
            code = server.wait()
        except KeyboardInterrupt:
            server.terminate()
            code = 0
    if code:
        raise typer.Exit(code)
