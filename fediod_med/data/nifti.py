"""Reads and writes NIfTI volumes without ever changing where a voxel lies in the patient.

Reading refuses what nibabel lets through and a network would silently misread: a truncated stream, NaN, a missing or
sheared geometry, sequences that are not on one grid. Writing copies the geometry fields of the reference header bit by
bit, carries over nothing else of it (no description, no extension: they may name the patient), and is verified from the
file before that file gets its name.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from fediod_med.data.layouts import Subject
from fediod_med.durable import write_verified
from fediod_med.errors import GeometryError, InputError, LabelError
from fediod_med.labels import CLASSES, SEQUENCES, LabelScheme, from_classes, to_classes
from fediod_med.resources import NOT_FOR_CLINICAL_USE

# Grids whose corners lie closer than this are one grid: float32 headers of different tools differ by about 1e-4 mm.
GEOMETRY_TOLERANCE_MM = 0.05
# Cosine between two voxel axes above which a grid counts as sheared (0.06 degrees).
SHEAR_TOLERANCE = 1e-3
# How far the vector part of a unit quaternion may be from length 1 and still mean a half turn.
_HALF_TURN_TOLERANCE = 1e-6

_LOG = logging.getLogger(__name__)
_HEADERS: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_IMAGES: dict[int, Any] = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}
_GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
# Values of the spatial unit that mean or are taken as millimetres: unknown, mm (NIfTI-1 standard, xyzt_units).
_MILLIMETRES = (0, 2)
_GZIP_MAGIC = b"\x1f\x8b"
# Zeros dominate label maps and float noise does not compress: higher levels cost time and gain little.
_GZIP_LEVEL = 4


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
    header, values = _read(path)
    return checked_scan(
        _sequence(path, values, sequence, channel, channel is None), _affine(header, path), path, sequence
    )


def checked_scan(array: np.ndarray, affine: np.ndarray, path: Path, sequence: str) -> Scan:
    """A scan from values `(X, Y, Z)` and affine `(4, 4)` of any reader, checked as those of a NIfTI file are.

    Raises:
        InputError: NaN, Inf, or one value everywhere.
        GeometryError: the affine is not finite, singular or sheared.
    """
    _require_usable(affine, path)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, and is refused
        values = np.ascontiguousarray(array, dtype=np.float32)
    _require_signal(values, path, sequence)
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
        _require_same_grid(
            *(scan.path, scan.array.shape, scan.affine),
            *(reference.path, reference.array.shape, reference.affine),
        )
    return Volume(np.stack([scans[name].array for name in SEQUENCES]), reference.affine, reference.path)


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
        header, values = _read(path)
        found = _affine(header, path)
        volumes = _sequences_of(subject, path, values)
        if array is None or affine is None:
            affine = found
            array = np.empty((len(SEQUENCES), *values.shape[:3]), dtype=np.float32)
        _require_same_grid(path, values.shape[:3], found, reference, array.shape[1:], affine)
        for name, volume in volumes.items():
            target = array[SEQUENCES.index(name)]
            with np.errstate(over="ignore"):
                target[...] = volume
            _require_signal(target, path, name)
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
    header, values = _read(path)
    if values.ndim != 3:
        raise InputError(f"{path}: expected a 3-D label map, found shape {values.shape}", code="E111")
    reference = subject.images[SEQUENCES[0]]
    image = _read_header(reference)
    grid = _affine(image, reference, warn=False)
    _require_same_grid(path, values.shape, _affine(header, path), reference, _shape(image, reference)[:3], grid)
    return np.ascontiguousarray(to_classes(values, scheme, str(path)))


def write_segmentation(path: Path, classes: np.ndarray, *, reference: Path, scheme: LabelScheme) -> None:
    """Write a class map as a uint8 label map that lies exactly on the grid of its reference image.

    The file is written beside its destination, synced, read back and compared, and only then renamed, so `path` holds
    either the old content or a verified new one. Intensity scaling, description and extensions of the reference are
    not taken over. Missing parent folders are made.

    Args:
        path: `.nii` or `.nii.gz`.
        classes: `(X, Y, Z)` integers 0 to 3 on the grid of `reference`.
        reference: NIfTI image (3-D, or 4-D with `X Y Z` first) whose geometry is copied.
        scheme: label scheme to write.

    Raises:
        InputError: wrong file ending, unusable reference, `path` is the reference, or the written file differs.
        GeometryError: `classes` does not have the shape of the reference, or the written geometry differs.
        LabelError: `classes` holds anything but 0 to 3.
    """
    _require_classes(path, classes)
    source = _read_header(reference)
    shape = _shape(source, reference)[:3]
    if classes.shape != shape:
        raise GeometryError(
            f"{path}: expected shape {shape} of the reference {reference}, found {classes.shape}; resample to the "
            f"native grid first"
        )
    if path.exists() and path.samefile(reference):
        raise InputError(f"{path}: expected an output other than the reference image, found the same file")
    header = type(source)()
    for name in _GEOMETRY_FIELDS:
        header[name] = source[name]
    header["pixdim"][:4] = source["pixdim"][:4]
    values = from_classes(classes, scheme)

    def verify(written: Path) -> None:
        found, read_back = _read(written)
        _require_written(path, read_back, values)
        changed = [name for name in _GEOMETRY_FIELDS if not np.array_equal(found[name], source[name])]
        affines_equal = np.array_equal(_best_affine(found), _best_affine(source))
        if changed or not affines_equal or not np.array_equal(found["pixdim"][:4], source["pixdim"][:4]):
            raise GeometryError(
                f"{path}: expected the geometry of {reference}, found a difference after writing "
                f"({', '.join(changed) or 'affine or spacing'}); the file was not kept"
            )

    _write(path, values, header, verify)


def write_label_map(path: Path, classes: np.ndarray, affine: np.ndarray, scheme: LabelScheme) -> None:
    """Write a class map for scans that have no NIfTI file to copy the geometry from; as safe as `write_segmentation`.

    Args:
        path: `.nii` or `.nii.gz`; missing parent folders are made.
        classes: `(X, Y, Z)` integers 0 to 3.
        affine: `(4, 4)`, voxel index to mm in RAS+; a NIfTI header holds it as float32.
        scheme: label scheme to write.

    Raises:
        InputError: wrong file ending or dimension, or the written file differs.
        GeometryError: the affine is singular, sheared or not finite, or was changed by writing.
        LabelError: `classes` holds anything but 0 to 3.
    """
    _require_classes(path, classes)
    if classes.ndim != 3 or classes.size == 0:
        raise InputError(f"{path}: expected classes (X, Y, Z), found shape {classes.shape}")
    matrix = np.asarray(affine, dtype=np.float64)
    _require_usable(matrix, path)
    values = from_classes(classes, scheme)

    def verify(written: Path) -> None:
        found, read_back = _read(written)
        _require_written(path, read_back, values)
        _require_same_grid(path, read_back.shape, _affine(found, written), path, classes.shape, matrix)

    _write(path, values, _header_of(classes.shape, matrix), verify)


def write_volumes(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write one volume or a stack of sequences as float32 NIfTI (phantoms and synthetic volumes), atomically.

    Args:
        path: `.nii` or `.nii.gz`; missing parent folders are made.
        array: `(X, Y, Z)`, or `(C, X, Y, Z)` which becomes a 4-D file with C last.
        affine: `(4, 4)`, voxel index to mm in RAS+; stored as float32 in the sform, and in the qform
            where that is precise enough.

    Raises:
        InputError: wrong file ending or dimension, values not finite, or the written file differs.
        GeometryError: the affine is singular, sheared or not finite.
    """
    if array.ndim not in (3, 4) or array.size == 0:
        raise InputError(f"{path}: expected an array (X, Y, Z) or (C, X, Y, Z), found shape {array.shape}")
    with np.errstate(over="ignore"):
        values = np.asarray(np.moveaxis(array, 0, -1) if array.ndim == 4 else array, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: expected finite float32 values, found NaN or Inf; nothing was written")
    matrix = np.asarray(affine, dtype=np.float64)
    _require_usable(matrix, path)
    header = _header_of(values.shape, matrix)
    _write(path, values, header, lambda written: _require_written(path, _read(written)[1], values))


def corner_distance(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> float:
    """Largest distance in mm between the same corner voxel of a grid of `shape` (X, Y, Z) under two affines."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape[:3]))], dtype=float)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())


# ---------------------------------------------------------------- reading


def _read(path: Path) -> tuple[Any, np.ndarray]:
    """Header and scaled values of a NIfTI file, after its whole stream has been read and checked.

    Returns:
        The header (nibabel, NIfTI-1 or NIfTI-2), and the array with trailing axes of length 1 beyond the third removed.
    """
    raw = _read_bytes(path)
    header = _parse_header(raw, path)
    shape = _shape(header, path)
    with _as_input_error(path):
        expected = int(header["vox_offset"]) + int(header.get_data_dtype().itemsize) * math.prod(shape)
    if len(raw) < expected:
        raise InputError(
            f"{path}: expected {expected} bytes for shape {shape}, found {len(raw)}; the file is "
            f"truncated, copy it again",
            code="E101",
        )
    with _as_input_error(path), np.errstate(over="ignore", invalid="ignore"):  # absurd scaling: found as Inf or NaN
        values = np.asarray(header.data_from_fileobj(io.BytesIO(raw)))
    return header, values.reshape(shape)


def _read_header(path: Path) -> Any:
    """Header of a NIfTI file; only its first bytes are read."""
    return _parse_header(_read_bytes(path, limit=max(_HEADERS)), path)


def _read_bytes(path: Path, limit: int = -1) -> bytes:
    """Content of a `.nii` or `.nii.gz` file, decompressed; without a limit the checksum of the stream is verified."""
    zipped = _is_zipped(path)
    with _as_input_error(path), path.open("rb") as stream:
        start = stream.read(2)
        if not start:
            raise InputError(f"{path}: expected a NIfTI file, found an empty file; copy it again", code="E103")
        if zipped != (start == _GZIP_MAGIC):
            is_what, name = ("not gzip data", ".nii") if zipped else ("gzip data", ".nii.gz")
            raise InputError(
                f"{path}: the name does not fit the content, found {is_what}; rename it to {name} if valid", code="E102"
            )
        stream.seek(0)
        if not zipped:
            return stream.read(limit)
        if limit < 0:
            return gzip.decompress(stream.read())
        with gzip.GzipFile(fileobj=stream) as unzipped:
            return unzipped.read(limit)


def _parse_header(raw: bytes, path: Path) -> Any:
    """The single-file NIfTI-1 or NIfTI-2 header at the start of `raw`, with a real scalar data type."""
    size = next((n for n in _HEADERS for order in ("little", "big") if int.from_bytes(raw[:4], order) == n), None)
    if size is None or len(raw) < size:
        raise InputError(
            f"{path}: expected a NIfTI header, found other or too little data ({len(raw)} bytes)", code="E104"
        )
    with _as_input_error(path):
        header = _HEADERS[size](raw[:size], check=True)
        dtype = header.get_data_dtype()
    if not bytes(header["magic"]).startswith(b"n+"):
        raise InputError(
            f"{path}: expected a single-file NIfTI, found the header of a .hdr/.img pair; convert it", code="E106"
        )
    if dtype.kind not in "uif":
        raise InputError(
            f"{path}: expected real numbers, found data type {dtype} (complex or colour); convert the file", code="E113"
        )
    return header


def _shape(header: Any, path: Path) -> tuple[int, ...]:
    """Shape without trailing axes of length 1 beyond the third; `InputError` unless it has three or four axes."""
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise InputError(f"{path}: expected a 3-D volume, found shape {shape}", code="E112")
    return shape


def _affine(header: Any, path: Path, *, warn: bool = True) -> np.ndarray:
    """Voxel-to-mm matrix (4, 4) float64: the sform where it has a code, else the qform; `GeometryError` if unusable."""
    codes = {"sform": int(header["sform_code"]), "qform": int(header["qform_code"])}
    if not any(codes.values()):
        raise GeometryError(
            f"{path}: expected a position and orientation, found sform code 0 and qform code 0 (no geometry); convert "
            f"the scan again from its source, left and right cannot be told from this file",
            code="E120",
        )
    unit = int(header["xyzt_units"]) & 7  # the spatial part; nibabel raises a bare KeyError for codes it does not know
    if unit not in _MILLIMETRES:
        name = {1: "metre", 3: "micron"}.get(unit, f"code {unit}")
        raise GeometryError(f"{path}: expected millimetres, found the unit {name}; correct the header", code="E123")
    qform = None
    if codes["qform"]:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # absurd voxel sizes: refused below
                qform = qform_of(header)
        except (HeaderDataError, ValueError) as error:
            if not codes["sform"]:
                raise GeometryError(
                    f"{path}: expected a rotation in the qform, found none ({error})", code="E121"
                ) from error
            _LOG.warning("%s: the qform is not a rotation (%s); the sform is used", path, error)
    affine = np.asarray(header.get_sform(), dtype=np.float64) if codes["sform"] else qform
    assert affine is not None, "one code is set, and an unusable qform alone has been refused"
    _require_usable(affine, path)
    if warn and codes["sform"] and qform is not None:
        distance = corner_distance(_shape(header, path), affine, qform)
        if not distance <= GEOMETRY_TOLERANCE_MM:
            _LOG.warning(
                "%s: sform (code %d) and qform (code %d) differ by up to %.2f mm; the sform is used",
                *(path, codes["sform"], codes["qform"], distance),
            )
    return affine


def qform_of(header: Any) -> np.ndarray:
    """The qform (4, 4) float64; as `header.get_qform`, but a half turn may be off by rounding.

    Of a unit quaternion only b, c, d are stored. At a half turn a = 0, and b2 + c2 + d2 may round to a little over 1:
    nibabel allows three units in the last place, a float64 header of another tool needs more.

    Raises:
        HeaderDataError: `pixdim[0]` is neither 1 nor -1; a header parsed with checks has it set to 1.
        ValueError: b, c, d are no part of a unit quaternion.
    """
    try:
        return np.asarray(header.get_qform(), dtype=np.float64)
    except ValueError:
        vector = np.array([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
        length = float(np.linalg.norm(vector))
        if not abs(length - 1) <= _HALF_TURN_TOLERANCE:
            raise
        rounded = header.copy()
        for axis, value in zip("bcd", vector / length, strict=True):
            rounded[f"quatern_{axis}"] = np.nextafter(header["quatern_b"].dtype.type(value), 0)
        return np.asarray(rounded.get_qform(), dtype=np.float64)


def _best_affine(header: Any) -> np.ndarray:
    """What `header.get_best_affine` gives, with a half turn of the qform tolerated."""
    if int(header["qform_code"]) and not int(header["sform_code"]):
        return qform_of(header)
    return np.asarray(header.get_best_affine(), dtype=np.float64)


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


# ---------------------------------------------------------------- checks


def _require_usable(affine: np.ndarray, path: Path) -> None:
    """Refuse an affine (4, 4) that is not finite, singular or sheared."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise GeometryError(
            f"{path}: expected a finite 4x4 affine, found {affine.tolist()}; correct the header", code="E121"
        )
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise GeometryError(
            f"{path}: expected positive voxel sizes, found {spacing.tolist()}; correct the header", code="E121"
        )
    axes = affine[:3, :3] / spacing
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if not shear <= SHEAR_TOLERANCE:
        raise GeometryError(
            f"{path}: expected voxel axes at right angles, found a sheared grid (cosine {shear:.4f}); resample the "
            f"scan to a rectangular grid",
            code="E122",
        )


def _require_same_grid(
    path: Path,
    shape: tuple[int, ...],
    affine: np.ndarray,
    reference: Path,
    reference_shape: tuple[int, ...],
    reference_affine: np.ndarray,
) -> None:
    """Refuse two files whose voxels do not coincide; shapes are (X, Y, Z), affines (4, 4)."""
    if shape != reference_shape:
        raise GeometryError(
            f"{path}: expected shape {reference_shape} of {reference}, found {shape}; co-register and resample the "
            f"files to one grid",
            code="E150",
        )
    distance = corner_distance(shape, affine, reference_affine)
    if not distance <= GEOMETRY_TOLERANCE_MM:
        raise GeometryError(
            f"{path}: expected the grid of {reference}, found corners up to {distance:.2f} mm apart (tolerance "
            f"{GEOMETRY_TOLERANCE_MM} mm); co-register and resample the files to one grid",
            code="E150",
        )


def _require_signal(volume: np.ndarray, path: Path, name: str) -> None:
    """Refuse a volume (X, Y, Z) with NaN or Inf, or with one value everywhere."""
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


def _require_classes(path: Path, classes: np.ndarray) -> None:
    """Refuse an array that is not of integers 0 to 3."""
    if classes.dtype.kind not in "ui":
        raise LabelError(f"{path}: expected classes as integers, found {classes.dtype}; take the argmax first")
    if classes.size and not (classes.min() >= 0 and classes.max() < len(CLASSES)):
        raise LabelError(f"{path}: expected classes 0 to {len(CLASSES) - 1}, found {np.unique(classes)[:8].tolist()}")


def _require_written(path: Path, found: np.ndarray, expected: np.ndarray) -> None:
    """Refuse a written file whose type or values are not those that were meant."""
    expected = expected.reshape(found.shape) if found.size == expected.size else expected
    if found.dtype != expected.dtype or not np.array_equal(found, expected):
        raise InputError(f"{path}: expected to read back what was written, found other values; the file was not kept")


# ---------------------------------------------------------------- writing


def _header_of(shape: tuple[int, ...], affine: np.ndarray) -> Any:
    """NIfTI-1 header with an affine (4, 4) in the sform, and in the qform where that is precise enough."""
    header = _HEADERS[348]()
    header.set_data_shape(shape)
    header.set_sform(affine, code="aligned")
    header.set_qform(affine, code="aligned", strip_shears=True)
    if corner_distance(shape, affine, header.get_qform()) > GEOMETRY_TOLERANCE_MM:
        # Near a half turn a float32 quaternion is off by up to 0.1 degrees: no second form is better than a wrong one.
        header.set_qform(affine, code="unknown", strip_shears=True)
    header.set_xyzt_units("mm")
    return header


def _write(path: Path, values: np.ndarray, header: Any, verify: Callable[[Path], None]) -> None:
    """Write values in their own type with the header's geometry: temporary file, sync, verification, rename."""
    ending = ".nii.gz" if _is_zipped(path) else ".nii"
    header.set_data_shape(values.shape)
    header.set_data_dtype(values.dtype)
    header["descrip"] = NOT_FOR_CLINICAL_USE.encode()
    # Without an affine nibabel leaves the geometry fields of the header as they are.
    content = _IMAGES[int(header["sizeof_hdr"])](values, None, header).to_bytes()
    if ending == ".nii.gz":
        content = gzip.compress(content, _GZIP_LEVEL, mtime=0)
    write_verified(path, lambda stream: stream.write(content), verify, ending=ending)


def _is_zipped(path: Path) -> bool:
    """Whether a name ends in `.nii.gz` (True) or `.nii` (False); `InputError` for anything else."""
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: expected a name ending in .nii or .nii.gz, found {path.name!r}")
    return name.endswith(".gz")


@contextlib.contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    """Turn what gzip, the file system and nibabel raise about a defective file into an `InputError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a NIfTI file, found nothing; check the path", code="E105") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: expected a complete gzip stream, found a defect ({error}); copy it again", code="E101"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: could not be read ({error})", code="E105") from error
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected a valid NIfTI header, found a defect ({error})", code="E104") from error
