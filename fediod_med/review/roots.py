"""The folders that a reviewer may look into: every path is resolved inside them, or refused.

Paths come from a browser, so they are not trusted: `..`, absolute paths elsewhere and links that lead out are refused
before anything is opened. Nothing below a root is ever written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from fediod_med.errors import InputError, SettingsError

Kind = Literal["run", "cases"]

_MAX_DEPTH = 4
_MAX_FOLDERS = 4000
_RUN_FILES = ("summary.json", "run.json")
_LARGEST_JSON = 64 * 2**20


@dataclass(frozen=True)
class Found:
    """A folder that the app can open.

    Attributes:
        kind: `run` (a distillation run) or `cases` (segmented scans).
        path: resolved, inside a root.
        name: root and path below it, as shown and as used in addresses; the same on every call.
        cases: number of segmented cases; 0 for a run.
    """

    kind: Kind
    path: Path
    name: str
    cases: int = 0


class Roots:
    """The folders that may be read, and what can be opened below them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Allow `folders` and what lies below them.

        Raises:
            SettingsError: none given, or one is not a folder.
        """
        if not folders:
            raise SettingsError("review: expected at least one folder to look into, found none; name a run folder")
        resolved = []
        for folder in folders:
            if not folder.is_dir():
                raise SettingsError(f"review: expected a folder to look into, found none at {folder}; check the path")
            resolved.append(folder.resolve())
        self.folders: tuple[Path, ...] = tuple(dict.fromkeys(resolved))

    def resolve(self, path: str | PurePath) -> Path:
        """The real path of something inside the roots; it need not exist.

        Args:
            path: absolute, or relative to a root; with several roots the first one that has it is meant.

        Raises:
            SettingsError: it has `..` or a null byte, or it lies outside, directly or by a link.
        """
        text = os.fspath(path)
        if "\0" in text or ".." in text.replace("\\", "/").split("/"):
            raise SettingsError(f"{text!r}: expected a plain path inside the chosen folders, found one with '..'")
        given = Path(text)
        if given.is_absolute():
            return self._inside(given)
        candidates = [root / given for root in self.folders]
        return self._inside(next((c for c in candidates if os.path.lexists(c)), candidates[0]))

    def file(self, path: str | PurePath) -> Path:
        """As `resolve`, for a regular file that exists; `InputError` where it does not."""
        found = self.resolve(path)
        if not found.is_file():
            raise InputError(f"{path}: expected a file inside the chosen folders, found none; it may have been moved")
        return found

    def folder(self, path: str | PurePath) -> Path:
        """As `resolve`, for a folder that exists; `InputError` where it does not."""
        found = self.resolve(path)
        if not found.is_dir():
            raise InputError(f"{path}: expected a folder inside the chosen folders, found none; it may have been moved")
        return found

    def contains(self, path: str | PurePath) -> bool:
        """Whether `resolve` would accept the path."""
        try:
            self.resolve(path)
        except SettingsError:
            return False
        return True

    def name_of(self, path: Path) -> str:
        """Root and path below it, for people: no part of the path above the root is told.

        Raises:
            SettingsError: outside the roots.
        """
        real = self.resolve(path)
        # the innermost root, where one root lies in another
        root = max((r for r in self.folders if real.is_relative_to(r)), key=lambda r: len(r.parts))
        same = [other for other in self.folders if other.name == root.name]
        label = root.name if len(same) == 1 else f"{root.name} ({same.index(root) + 1})"
        return PurePath(label, real.relative_to(root)).as_posix()

    def folders_below(self, path: str | PurePath) -> tuple[Path, ...]:
        """Folders directly below one, sorted, for a picker; hidden ones and links that lead out are left out."""
        folder = self.folder(path)
        found = [entry for entry in _entries(folder) if not entry.name.startswith(".") and self.contains(entry)]
        return tuple(entry for entry in found if entry.is_dir())

    def require_links_inside(self, folder: Path) -> None:
        """Refuse a folder in which, at any depth, a link leads out of the roots; what reads it later follows links.

        Raises:
            SettingsError: there is one.
        """
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files):
                if os.path.islink(os.path.join(place, name)):  # noqa: PTH114, PTH118 (a study has thousands of files)
                    self.resolve(Path(place, name))

    def find(self) -> tuple[Found, ...]:
        """Every run folder and every folder of segmented cases below the roots, runs first, sorted by name.

        The search goes four folders deep, does not follow links, and looks only at a run's own `segmented` folder once
        it has found a run.
        """
        found: dict[Path, Found] = {}
        left = _MAX_FOLDERS
        for root in self.folders:
            for folder in _walk(root, _MAX_DEPTH):
                left -= 1
                if left < 0:
                    break
                kind = kind_of(folder)
                if kind is not None and folder not in found:
                    count = count_cases(folder) if kind == "cases" else 0
                    found[folder] = Found(kind, folder, self.name_of(folder), count)
        return tuple(sorted(found.values(), key=lambda f: (f.kind != "run", f.name)))

    def runs(self) -> tuple[Found, ...]:
        """The run folders of `find`."""
        return tuple(found for found in self.find() if found.kind == "run")

    def segmentations(self) -> tuple[Found, ...]:
        """The folders of segmented cases of `find`."""
        return tuple(found for found in self.find() if found.kind == "cases")

    def _inside(self, path: Path) -> Path:
        try:
            real = path.resolve()
            # `resolve` leaves a loop of links as it is on some versions of Python; `stat` does not
            if real.is_symlink():
                raise RuntimeError("a loop of links")
        except (OSError, RuntimeError, ValueError) as error:
            raise SettingsError(f"{path}: expected a path inside the chosen folders, could not follow it") from error
        if not any(real.is_relative_to(root) for root in self.folders):
            raise SettingsError(
                f"{path}: expected a path inside the chosen folders, found one outside; start the app with its folder"
            )
        return real


def kind_of(folder: Path) -> Kind | None:
    """What a folder is, by the files it holds; `None` for any other folder.

    A distillation run has `summary.json` and `run.json`; segmented cases have `records/*.json`, or at least one
    `<case>_seg.nii.gz` with its `<case>_stats.json`.
    """
    if all((folder / name).is_file() for name in _RUN_FILES):
        return "run"
    return "cases" if count_cases(folder) else None


def count_cases(folder: Path) -> int:
    """Number of segmented cases in a folder; see `kind_of`."""
    records = folder / "records"
    if records.is_dir():
        recorded = sum(1 for entry in _entries(records) if entry.suffix == ".json" and not entry.name.startswith("."))
        if recorded:
            return recorded
    return sum(1 for entry in _entries(folder) if _is_case(entry))


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file that was found in a folder really lies there, rather than behind a link that leads out."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return False


def read_json(path: Path, *, within: Path) -> Any:
    """Content of a JSON file of a folder.

    Args:
        path: of the file.
        within: folder that it must lie in, links followed.

    Raises:
        InputError: absent, not JSON, behind a link that leads out, or so large that it is none of ours.
    """
    if not lies_in(path, within):
        raise InputError(f"{path.name}: expected a file of its folder, found a link that leads out")
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path.name}: expected at most {_LARGEST_JSON >> 20} MiB of JSON, found more")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.name}: not there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: expected JSON, could not read it ({error})") from error


def _is_case(entry: Path) -> bool:
    ending = "_seg.nii.gz"
    if not entry.name.endswith(ending) or entry.name.startswith("."):
        return False
    return entry.with_name(f"{entry.name.removesuffix(ending)}_stats.json").is_file()


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    inner = [folder / "segmented"] if kind_of(folder) == "run" else _entries(folder)
    for entry in inner:
        if depth and not entry.name.startswith(".") and not entry.is_symlink() and entry.is_dir():
            yield from _walk(entry, depth - 1)


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; empty where it may not be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
