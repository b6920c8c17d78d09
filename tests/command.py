"""The command line, in process, for tests."""

from __future__ import annotations

from typer.testing import CliRunner

from fediod_med.cli.main import command_line
from fediod_med.errors import FediodError


def run(*words: object) -> tuple[int, str]:
    """Exit code and output of `fediod WORDS`, with known errors handled as `main` handles them."""
    result = CliRunner().invoke(command_line(), [str(word) for word in words], catch_exceptions=True)
    if isinstance(result.exception, FediodError):
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output
