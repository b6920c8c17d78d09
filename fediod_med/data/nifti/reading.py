"""Reads scans and label maps from NIfTI files.

Refused is what a network would silently misread: NaN, a missing or sheared geometry, sequences on different grids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fediod_med.data.grids import require_same_grid
from fediod_med.data.layouts import Subject
from fediod_med.data.nifti.files import read_file, read_header, shape_of
from fediod_med.data.nifti.headers import affine_of
from fediod_med.data.scans import Scan, Volume, checked_scan, require_signal
from fediod_med.errors import InputError
from fediod_med.labels import SEQUENCES, LabelScheme, to_classes


def read_scan(path: Path, sequence: str, *, channel: int | None = None) -> Scan:
    """Read one sequence, whatever the grid of the others.

    Args:
        path: `.nii` or `.nii.gz`.
        sequence: its name, for messages.
        channel: index along the fourth axis of a 4-D file, or none for a 3-D file.

    Raises:
        InputError: the file is missing, truncated, empty, not NIfTI, of the wrong dimension, not finite or constant.
        GeometryError: no usable geometry.
    """
    header, values = read_file(path)
    return checked_scan(
        _sequence(path, values, sequence, channel, channel is None), affine_of(header, path), path, sequence
    )


def read_subject(subject: Subject) -> Volume:
    """Read the four sequences of a subject and check that a network can be fed with them.

    Args:
        subject: from `fediod_med.data.layouts`, or built from explicit paths.

    Raises:
        InputError: a file is missing, truncated, empty, not NIfTI, of the wrong dimension, not finite or constant.
        GeometryError: no usable geometry, or sequences on different grids.
    """
    missing = [name for name in SEQUENCES if name not in subject.images]
    if missing:
        raise InputError(
            f"subject {subject.subject_id}: expected {', '.join(SEQUENCES)}, missing {', '.join(missing)}", code="E140"
        )
    reference = subject.images[SEQUENCES[0]]
    files = dict.fromkeys(subject.images[name] for name in SEQUENCES)
    if subject.channels is None and len(files) < len(SEQUENCES):
        raise InputError(
            f"subject {subject.subject_id}: expected four different files, found one file given for several sequences: "
            + ", ".join(f"{name} = {subject.images[name]}" for name in SEQUENCES),
            code="E141",
        )
    array: np.ndarray | None = None
    affine: np.ndarray | None = None
    for path in files:
        header, values = read_file(path)
        found = affine_of(header, path)
        volumes = _sequences_of(subject, path, values)
        if array is None or affine is None:
            affine = found
            array = np.empty((len(SEQUENCES), *values.shape[:3]), dtype=np.float32)
        require_same_grid(path, values.shape[:3], found, reference, array.shape[1:], affine)
        for name, volume in volumes.items():
            target = array[SEQUENCES.index(name)]
            with np.errstate(over="ignore"):
                target[...] = volume
            require_signal(target, path, name)
    assert array is not None, "a subject has at least one file"
    assert affine is not None, "set together with the array"
    return Volume(array, affine, reference)


def read_label(subject: Subject, scheme: LabelScheme) -> np.ndarray:
    """Read a subject's label map as classes.

    Args:
        subject: with a label map.
        scheme: label scheme that the site declared for its files.

    Returns:
        `(X, Y, Z)` uint8, classes 0 to 3, on the grid of the images.

    Raises:
        InputError: there is no label map, or its file is defective.
        GeometryError: it is not on the grid of the images.
        LabelError: a value is not in the scheme.
    """
    if subject.label is None:
        raise InputError(
            f"subject {subject.subject_id}: expected a label map, found none; add <id>_seg.nii.gz", code="E193"
        )
    path = subject.label
    header, values = read_file(path)
    if values.ndim != 3:
        raise InputError(f"{path}: expected a 3-D label map, found shape {values.shape}", code="E111")
    reference = subject.images[SEQUENCES[0]]
    image = read_header(reference)
    grid = affine_of(image, reference, warn=False)
    require_same_grid(path, values.shape, affine_of(header, path), reference, shape_of(image, reference)[:3], grid)
    return np.ascontiguousarray(to_classes(values, scheme, str(path)))


def _sequence(path: Path, values: np.ndarray, name: str, channel: int | None, alone: bool) -> np.ndarray:
    """The 3-D volume of a sequence in the values of its file: all of them when `alone`, else one channel."""
    if alone:
        if values.ndim != 3:
            raise InputError(
                f"{path}: expected a 3-D volume for {name}, found 4-D shape {values.shape}; give one volume per "
                f"file, or use layout msd for MSD Task01",
                code="E111",
            )
        return values
    if values.ndim != 4:
        raise InputError(f"{path}: expected a 4-D file holding {name}, found shape {values.shape}", code="E111")
    if channel is None or not 0 <= channel < values.shape[3]:
        raise InputError(
            f"{path}: expected channel {channel} to be {name}, found {values.shape[3]} channels", code="E111"
        )
    return values[..., channel]


def _sequences_of(subject: Subject, path: Path, values: np.ndarray) -> dict[str, np.ndarray]:
    """The 3-D volumes that a subject takes from one file, by sequence name."""
    channels, alone = subject.channels or {}, subject.channels is None
    names = [name for name in SEQUENCES if subject.images[name] == path]
    return {name: _sequence(path, values, name, channels.get(name), alone) for name in names}
