"""Where a row of a cell lies, and how it gets there whole: a folder appears under its name only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fediod_med.checkpoints import Provenance, save_weights
from fediod_med.comparison.cells import Cell
from fediod_med.data.sampler import PublicSampler
from fediod_med.durable import write_atomically
from fediod_med.evaluation import SubjectScore, read_scores, write_scores
from fediod_med.records import write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE

DONE, FAILED = "done", "failed"
NOT_PRIVATE = "NOT PRIVATE"


@dataclass(frozen=True)
class StoredRow:
    """A row of a cell as it lies on disk.

    Attributes:
        key: of the row.
        cell: of the row.
        record: content of `record.json`.
        scores: three per held-out subject; empty when the row failed.
    """

    key: str
    cell: Cell
    record: Mapping[str, Any]
    scores: tuple[SubjectScore, ...]

    @property
    def done(self) -> bool:
        """Whether the row was computed."""
        return bool(self.record.get("status") == DONE)


def row_folder(out: Path, cell: Cell, key: str) -> Path:
    """`cells/fold-0-seed-0/<row>`, a colon written as a dash."""
    return cell.folder(out) / key.replace(":", "-")


def write_row(
    out: Path,
    cell: Cell,
    key: str,
    *,
    scores: Sequence[SubjectScore],
    record: Mapping[str, Any],
    network: nn.Module | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Write `scores.csv`, `record.json` and, with a network, `weights.safetensors`; all of it or nothing appears."""
    folder = row_folder(out, cell, key)
    hidden = _hidden(folder)
    hidden.mkdir(parents=True)
    try:
        write_scores(hidden / "scores.csv", scores, privacy=NOT_PRIVATE, seed=cell.seed)
        if network is not None and provenance is not None:
            save_weights(hidden / "weights.safetensors", network.state_dict(), provenance)
        write_json(hidden / "record.json", _with_place(record, cell, key, DONE))
        shutil.rmtree(folder, ignore_errors=True)  # an earlier failure
        hidden.replace(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def write_failure(out: Path, cell: Cell, key: str, reason: str) -> None:
    """Record that a row could not be computed; a row that is there already stays."""
    folder = row_folder(out, cell, key)
    if not is_done(out, cell, key):
        write_json(folder / "record.json", _with_place({"reason": reason}, cell, key, FAILED))


def clear_leftovers(out: Path) -> None:
    """Remove what rows were writing when their process was killed."""
    for leftover in (out / "cells").glob("*/.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


def is_done(out: Path, cell: Cell, key: str) -> bool:
    """Whether a row lies there complete; a failed one does not count and is computed again."""
    return _record(row_folder(out, cell, key)).get("status") == DONE


def read_row(out: Path, cell: Cell, key: str) -> StoredRow | None:
    """A row as it lies on disk, or `None` where there is none yet."""
    folder = row_folder(out, cell, key)
    record = _record(folder)
    if not record:
        return None
    scores = tuple(read_scores(folder / "scores.csv")) if record.get("status") == DONE else ()
    return StoredRow(key, cell, record, scores)


def pool_paths(out: Path, seed: int, parts: int) -> tuple[Path, ...]:
    """Where the public phantoms of a seed lie: one file, or one for each of several parts."""
    folder = out / "pools"
    if parts == 1:
        return (folder / f"seed-{seed}.safetensors",)
    return tuple(folder / f"seed-{seed}-part-{part}-of-{parts}.safetensors" for part in range(parts))


def write_pool(path: Path, sampler: PublicSampler) -> None:
    """Keep phantoms, a whole pool or a part of it, for all rows of their seed."""
    images, tissues = sampler.pool()
    write_atomically(path, lambda temporary: save_file({"images": images, "tissues": tissues}, temporary))


def read_pool(paths: Sequence[Path]) -> tuple[list[Tensor], list[Tensor]]:
    """Images `(4, D, H, W)` float16 and tissues `(D, H, W)` uint8 of all phantoms, part after part.

    They are maps of the files, not copies: the processes of a run hold one pool in memory, however many they are.
    """
    images: list[Tensor] = []
    tissues: list[Tensor] = []
    for path in paths:
        with safe_open(path, framework="pt") as handle:
            images.extend(handle.get_tensor("images"))
            tissues.extend(handle.get_tensor("tissues"))
    return images, tissues


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.part")


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _with_place(record: Mapping[str, Any], cell: Cell, key: str, status: str) -> dict[str, Any]:
    return {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy": NOT_PRIVATE,
        "row": key,
        "fold": cell.fold,
        "folds": cell.folds,
        "seed": cell.seed,
        "status": status,
        **record,
    }
