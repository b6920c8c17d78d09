"""The command line: reads settings, calls one procedure, prints. The only place that prints or exits.

Exit codes: 0 done, 1 some cases failed, 2 wrong use or input. Heavy packages are imported inside the commands, so that
`fediod --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import typer

from fediod_med.cli import about, compare, experiments, federation, privacy, review, scans, site, whole_runs
from fediod_med.errors import FediodError, SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE


def command_line() -> typer.Typer:
    """All commands of `fediod`."""
    purpose = "One 3D brain-tumour segmenter from hospitals that share neither scans nor weights."
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help=f"{purpose} {NOT_FOR_CLINICAL_USE}",
    )
    _add(app, whole_runs.demo, whole_runs.phantoms, whole_runs.prior, whole_runs.distill, compare.compare)
    _add(app, experiments.experiment)
    _add(app, scans.segment, scans.check, scans.evaluate, review.review, about.info)
    hospital = typer.Typer(no_args_is_help=True, help="One hospital: its settings, its teacher, its own evaluation.")
    _add(hospital, site.init, site.verify, site.train, site.evaluate)
    app.add_typer(hospital, name="site")
    promises = typer.Typer(no_args_is_help=True, help="What a run or a hospital promises, checked and attacked.")
    _add(promises, privacy.report, privacy.verify, privacy.audit)
    app.add_typer(promises, name="privacy")
    engine = typer.Typer(no_args_is_help=True, help="Hospitals on machines of their own, over NVIDIA FLARE.")
    _add(engine, federation.provision, federation.server, federation.site)
    _add(engine, federation.submit, federation.status, federation.stop)
    app.add_typer(engine, name="federation")
    return app


def main() -> None:
    """Entry point `fediod`: a known error becomes one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        check_processes(sys.argv[1:], os.environ)
        command_line()()
    except FediodError as error:
        typer.echo(f"fediod: {error}", err=True)
        sys.exit(2)


def check_processes(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse what `torchrun` would do several times over in one folder.

    Raises:
        SettingsError: one of several processes of `torchrun`, and not of `fediod distill`.
    """
    several = "TORCHELASTIC_RUN_ID" in environment and environment.get("WORLD_SIZE", "1") != "1"
    if several and list(arguments[:1]) != ["distill"]:
        found = " ".join(arguments[:1]) or "no command"
        raise SettingsError(
            f"torchrun: expected the command distill, which shares its work, found {found}; start it alone"
        )


def _add(app: typer.Typer, *commands: Callable[..., None]) -> None:
    for command in commands:
        app.command()(command)


if __name__ == "__main__":
    main()
