"""Scans in memory with their place in the patient, checked so that a network can be fed with them; of any format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fediod_med.data.grids import require_same_grid, require_usable
from fediod_med.errors import InputError
from fediod_med.labels import SEQUENCES


@dataclass(frozen=True, eq=False)
class Volume:
    """The four sequences of one subject on their common native grid.

    Attributes:
        array: `(4, X, Y, Z)` float32 in the order of `SEQUENCES`; axes are those of the NIfTI files.
        affine: `(4, 4)` float64, voxel index to mm in RAS+ world coordinates.
        path: file whose header is the geometry reference (the T1c image).
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path


@dataclass(frozen=True, eq=False)
class Scan:
    """One sequence on its own grid, which need not be that of the other sequences.

    Attributes:
        array: `(X, Y, Z)` float32, finite and not constant; axes are those of the file.
        affine: `(4, 4)` float64, voxel index to mm in RAS+ world coordinates.
        path: where it was read from.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path


def checked_scan(array: np.ndarray, affine: np.ndarray, path: Path, sequence: str) -> Scan:
    """A scan from values `(X, Y, Z)` and affine `(4, 4)` of any reader, checked as those of a NIfTI file are.

    Raises:
        InputError: NaN, Inf, or one value everywhere.
        GeometryError: the affine is not finite, singular or sheared.
    """
    require_usable(affine, path)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, and is refused
        values = np.ascontiguousarray(array, dtype=np.float32)
    require_signal(values, path, sequence)
    return Scan(values, np.asarray(affine, dtype=np.float64), path)


def on_one_grid(scans: Mapping[str, Scan]) -> Volume:
    """Four scans, by sequence name, as one volume.

    Raises:
        InputError: a sequence is missing.
        GeometryError: they are not on the grid of the T1c scan.
    """
    missing = [name for name in SEQUENCES if name not in scans]
    if missing:
        raise InputError(f"expected scans for {', '.join(SEQUENCES)}, found none for {', '.join(missing)}")
    reference = scans[SEQUENCES[0]]
    for name in SEQUENCES[1:]:
        scan = scans[name]
        require_same_grid(
            *(scan.path, scan.array.shape, scan.affine),
            *(reference.path, reference.array.shape, reference.affine),
        )
    return Volume(np.stack([scans[name].array for name in SEQUENCES]), reference.affine, reference.path)


def require_signal(volume: np.ndarray, path: Path, name: str) -> None:
    """Refuse a volume (X, Y, Z) with NaN or Inf, or with one value everywhere; `InputError`."""
    low, high = float(volume.min()), float(volume.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(volume.size - np.isfinite(volume).sum())
        raise InputError(
            f"{path}: expected finite {name} values, found NaN or Inf in {count} voxels ({count / volume.size:.2%}); "
            f"set them to 0 if they are background",
            code="E110",
        )
    if low == high:
        raise InputError(
            f"{path}: expected a {name} image, found {low:g} in every voxel; export the sequence again", code="E161"
        )
