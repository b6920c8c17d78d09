"""Writes label maps and volumes as NIfTI files, each verified from the file before that file gets its name.

Writing copies the geometry fields of the reference header bit by bit and carries over nothing else of it (no
description, no extension: they may name the patient).
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from fediod_med.data.grids import GEOMETRY_TOLERANCE_MM, corner_distance, require_same_grid, require_usable
from fediod_med.data.nifti.files import HEADERS, is_zipped, read_file, read_header, shape_of
from fediod_med.data.nifti.headers import affine_of, best_affine
from fediod_med.durable import write_verified
from fediod_med.errors import GeometryError, InputError, LabelError
from fediod_med.labels import CLASSES, LabelScheme, from_classes
from fediod_med.resources import NOT_FOR_CLINICAL_USE

_IMAGES: dict[int, Any] = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}
_GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
# Zeros dominate label maps and float noise does not compress: higher levels cost time and gain little.
_GZIP_LEVEL = 4


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
    source = read_header(reference)
    shape = shape_of(source, reference)[:3]
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
        found, read_back = read_file(written)
        _require_written(path, read_back, values)
        changed = [name for name in _GEOMETRY_FIELDS if not np.array_equal(found[name], source[name])]
        affines_equal = np.array_equal(best_affine(found), best_affine(source))
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
    require_usable(matrix, path)
    values = from_classes(classes, scheme)

    def verify(written: Path) -> None:
        found, read_back = read_file(written)
        _require_written(path, read_back, values)
        require_same_grid(path, read_back.shape, affine_of(found, written), path, classes.shape, matrix)

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
    require_usable(matrix, path)
    header = _header_of(values.shape, matrix)
    _write(path, values, header, lambda written: _require_written(path, read_file(written)[1], values))


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


def _header_of(shape: tuple[int, ...], affine: np.ndarray) -> Any:
    """NIfTI-1 header with an affine (4, 4) in the sform, and in the qform where that is precise enough."""
    header = HEADERS[348]()
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
    ending = ".nii.gz" if is_zipped(path) else ".nii"
    header.set_data_shape(values.shape)
    header.set_data_dtype(values.dtype)
    header["descrip"] = NOT_FOR_CLINICAL_USE.encode()
    # Without an affine nibabel leaves the geometry fields of the header as they are.
    content = _IMAGES[int(header["sizeof_hdr"])](values, None, header).to_bytes()
    if ending == ".nii.gz":
        content = gzip.compress(content, _GZIP_LEVEL, mtime=0)
    write_verified(path, lambda stream: stream.write(content), verify, ending=ending)
