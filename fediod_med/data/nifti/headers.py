"""Where a NIfTI header says that voxels lie: sform before qform, in millimetres; refuses what cannot be trusted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError

from fediod_med.data.grids import GEOMETRY_TOLERANCE_MM, corner_distance, require_usable
from fediod_med.data.nifti.files import shape_of
from fediod_med.errors import GeometryError

# How far the vector part of a unit quaternion may be from length 1 and still mean a half turn.
_HALF_TURN_TOLERANCE = 1e-6
# Values of the spatial unit that mean or are taken as millimetres: unknown, mm (NIfTI-1 standard, xyzt_units).
_MILLIMETRES = (0, 2)

_LOG = logging.getLogger(__package__)  # one name for what is said about any NIfTI file


def affine_of(header: Any, path: Path, *, warn: bool = True) -> np.ndarray:
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
    require_usable(affine, path)
    if warn and codes["sform"] and qform is not None:
        distance = corner_distance(shape_of(header, path), affine, qform)
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


def best_affine(header: Any) -> np.ndarray:
    """What `header.get_best_affine` gives, with a half turn of the qform tolerated."""
    if int(header["qform_code"]) and not int(header["sform_code"]):
        return qform_of(header)
    return np.asarray(header.get_best_affine(), dtype=np.float64)
