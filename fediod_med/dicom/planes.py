"""Where the slices of a DICOM object lie, and which of them belong together (PS3.3 C.7.6.2 and C.7.6.16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fediod_med.dicom.headers import is_multiframe, value

# Two direction cosines that differ by less are one orientation (0.03 degrees).
ORIENTATION_TOLERANCE = 5e-4


@dataclass(frozen=True)
class Plane:
    """Where one slice lies.

    Attributes:
        position: `ImagePositionPatient`, centre of its first pixel, mm in LPS+.
        orientation: `ImageOrientationPatient`, direction cosines of increasing column index, then of row index.
        spacing: `PixelSpacing`, mm between rows, then between columns.
        rows: number of rows.
        columns: number of columns.
        index: number of the frame in its file, from 0.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    rows: int
    columns: int
    index: int = 0

    @property
    def normal(self) -> np.ndarray:
        """Unit normal (3,) of the slice: row direction times column direction."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        return np.asarray(normal / np.linalg.norm(normal))


def planes_of(header: Any) -> list[Plane | None]:
    """The planes of one object, in the order of its frames; `None` for a frame without a place in the patient."""
    frames = len(header.PerFrameFunctionalGroupsSequence) if is_multiframe(header) else 1
    return [_plane(header, frame) for frame in range(frames)]


def _plane(header: Any, frame: int) -> Plane | None:
    position = value(header, "ImagePositionPatient", group="PlanePositionSequence", frame=frame)
    orientation = value(header, "ImageOrientationPatient", group="PlaneOrientationSequence", frame=frame)
    spacing = value(header, "PixelSpacing", group="PixelMeasuresSequence", frame=frame)
    try:
        found = [tuple(float(number) for number in numbers) for numbers in (position, orientation, spacing)]
    except (TypeError, ValueError):
        return None
    if [len(numbers) for numbers in found] != [3, 6, 2] or not all(np.isfinite(numbers).all() for numbers in found):
        return None
    along = np.reshape(found[1], (2, 3))
    orthonormal = np.allclose(along @ along.T, np.eye(2), atol=1e-3)
    if not orthonormal or min(found[2]) <= 0:
        return None
    return Plane(found[0], found[1], found[2], int(header.Rows), int(header.Columns), frame)


def grids_of(planes: Sequence[Plane]) -> list[tuple[tuple[int, int, str], int]]:
    """The different grids of slices with the number of slices of each: rows, columns and view."""
    kinds: list[tuple[Plane, int]] = []
    for plane in planes:
        for i, (known, count) in enumerate(kinds):
            if _alike(plane, known):
                kinds[i] = (known, count + 1)
                break
        else:
            kinds.append((plane, 1))
    return [((plane.rows, plane.columns, view_of(plane)), count) for plane, count in kinds]


def _alike(one: Plane, other: Plane) -> bool:
    return (
        (one.rows, one.columns) == (other.rows, other.columns)
        and np.allclose(one.orientation, other.orientation, rtol=0, atol=ORIENTATION_TOLERANCE)
        and np.allclose(one.spacing, other.spacing, rtol=1e-4, atol=0)
    )


def view_of(plane: Plane) -> str:
    """Axial, coronal or sagittal, whichever a slice is closest to, with the angle where it is oblique."""
    normal = np.abs(plane.normal)
    axis = int(np.argmax(normal))
    angle = float(np.degrees(np.arccos(min(1.0, normal[axis]))))
    name = ("sagittal", "coronal", "axial")[axis]
    return name if angle < 1 else f"{name}, {angle:.0f} degrees oblique"


def heights_of(planes: Sequence[Plane]) -> np.ndarray:
    """Distance (N,) of each slice from the origin along the normal of the first, mm."""
    return np.asarray([np.dot(plane.position, planes[0].normal) for plane in planes])


def repeats(heights: np.ndarray) -> list[bool]:
    """For ascending heights (N,): whether each lies where the one before it does."""
    steps = np.diff(heights)
    wide = steps[steps > 1e-3]
    limit = 0.1 * float(np.median(wide)) if wide.size else 1e-3
    return [False, *(bool(step <= limit) for step in steps)]
