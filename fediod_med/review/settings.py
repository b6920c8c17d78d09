"""What the review app is started with, and the command that starts it: on this machine only, telling nobody."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fediod_med.errors import SettingsError
from fediod_med.review.roots import Roots

ADDRESS = "127.0.0.1"
"""The only address that the app listens on; from other machines it is reached through a tunnel, never directly."""
MAX_UPLOAD_MB = 64
DEFAULT_PORT = 8501


@dataclass(frozen=True)
class ReviewSettings:
    """Settings of one app.

    Attributes:
        roots: folders that may be looked into, read only.
        reviews: file of the store.
        work: folder that the page Segment writes to; readable like a root once it exists.
    """

    roots: tuple[Path, ...]
    reviews: Path
    work: Path

    def arguments(self) -> list[str]:
        """The same as arguments of the app's script."""
        named = [part for root in self.roots for part in ("--root", str(root))]
        return [*named, "--reviews", str(self.reviews), "--work", str(self.work)]

    def open_roots(self) -> Roots:
        """The folders as `Roots`, with the work folder, which is made when absent.

        Raises:
            SettingsError: a root is not a folder, or the work folder cannot be made or lies inside a run.
        """
        inside = next((root for root in (self.work, *self.work.parents) if (root / "summary.json").is_file()), None)
        if inside is not None:
            raise SettingsError(f"review: expected a work folder outside runs, found it in {inside}; choose another")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"review: could not make the work folder {self.work} ({error.strerror})") from error
        return Roots([*self.roots, self.work])


def data_home() -> Path:
    """Where reviews and new segmentations of this user are kept: `$XDG_DATA_HOME/fediod-med`, else below home."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "share") / "fediod-med"


def review_settings(roots: Sequence[Path], *, reviews: Path | None = None, work: Path | None = None) -> ReviewSettings:
    """Settings with defaults filled in; paths become absolute.

    Args:
        roots: folders to look into; `runs` in the current folder, or else the current folder, when none is given.
        reviews: file of the store; `reviews.sqlite` in `data_home` when omitted.
        work: for new segmentations; `segmented` in `data_home` when omitted.
    """
    if not roots:
        roots = [Path("runs") if Path("runs").is_dir() else Path()]
    home = data_home()
    return ReviewSettings(
        roots=tuple(root.resolve() for root in roots),
        reviews=(reviews or home / "reviews.sqlite").resolve(),
        work=(work or home / "segmented").resolve(),
    )


def parse_arguments(arguments: Sequence[str]) -> ReviewSettings:
    """Settings from the arguments of `streamlit run apps/review.py -- ...`.

    Raises:
        SettingsError: an unknown argument.
    """
    parser = _Parser(prog="review", add_help=False)
    parser.add_argument("--root", type=Path, action="append", default=[])
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--work", type=Path)
    found = parser.parse_args(list(arguments))
    return review_settings(found.root, reviews=found.reviews, work=found.work)


def app_script() -> Path:
    """The app's script, in the source tree or in the installed package."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "apps", package / "apps"):
        if (folder / "review.py").is_file():
            return folder / "review.py"
    raise SettingsError(f"review: expected the app beside the package in {package.parent}; reinstall fediod-med")


def server_command(settings: ReviewSettings, *, port: int = DEFAULT_PORT) -> list[str]:
    """Command that serves the app on loopback.

    No usage statistics, no watching of files, no details of errors in the browser, uploads bounded, and requests for
    any other host name refused.

    Raises:
        SettingsError: a port outside 1024 to 65535.
    """
    if not 1024 <= port <= 65535:
        raise SettingsError(f"review: expected a port from 1024 to 65535, found {port}")
    options = {
        "server.address": ADDRESS,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "server.maxUploadSize": str(MAX_UPLOAD_MB),
        "server.enableStaticServing": "false",
        "server.enableXsrfProtection": "true",
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": ADDRESS,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
        "theme.base": "light",
        "theme.primaryColor": "#0B5CAD",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(app_script()), *flags, "--", *settings.arguments()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"review: {message}; expected --root DIR, --reviews FILE and --work DIR")
