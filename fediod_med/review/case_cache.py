"""Folders of segmented cases, read once and kept until something in them changes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fediod_med.review.case_folder import CaseFolder, read_cases, scans_beside
from fediod_med.review.roots import Roots

_DEPTH = 3
"""Folders below the folder of scans that are watched: `cohort/grade/case`."""


class CaseFolders:
    """What `read_cases` gives, by its arguments and the state of what it reads; safe for several threads."""

    def __init__(self, folders: int = 8) -> None:
        """Keep the `folders` used last."""
        self.folders = folders
        self._held: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], CaseFolder]] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, folder: Path, roots: Roots, *, images: Path | None = None, models: Mapping[str, Path] | None = None
    ) -> CaseFolder:
        """As `read_cases`; records, statistics and label maps count by name, time and size, scans by their folders.

        Raises:
            InputError, SettingsError: as `read_cases`.
        """
        models = dict(models or {})
        key = (folder, roots.folders, images, *sorted(models.items()))
        state = tuple(_states(folder, images or scans_beside(folder), models))
        with self._lock:
            held = self._held.get(key)
            if held is not None and held[0] == state:
                self._held.move_to_end(key)
                return held[1]
        found = read_cases(folder, roots, images=images, models=models)
        with self._lock:
            self._held[key] = state, found
            self._held.move_to_end(key)
            while len(self._held) > self.folders:
                self._held.popitem(last=False)
        return found


def _states(folder: Path, images: Path | None, models: Mapping[str, Path]) -> Iterator[Any]:
    for place in (folder, folder / "records", *models.values()):
        yield tuple(_files(place))
    if images is not None:
        yield from _folders(images, _DEPTH)


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    for entry in _entries(folder):
        try:
            state = entry.stat()
        except OSError:
            continue
        yield entry.name, state.st_mtime_ns, state.st_size


def _folders(folder: Path, depth: int) -> Iterator[tuple[str, int]]:
    """Every folder with the time at which a file last came or went."""
    try:
        yield str(folder), folder.stat().st_mtime_ns
    except OSError:
        return
    if depth:
        for entry in _entries(folder):
            if entry.is_dir(follow_symlinks=False):
                yield from _folders(Path(entry.path), depth - 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError:
        return []
