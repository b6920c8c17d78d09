"""Checks of one header: geometry that contradicts itself, inverted intensities, text that may name a patient."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from fediod_med.data.grids import GEOMETRY_TOLERANCE_MM, corner_distance
from fediod_med.data.itk_formats import is_itk_format
from fediod_med.data.nifti.headers import qform_of
from fediod_med.findings import Finding, finding
from fediod_med.resources import NOT_FOR_CLINICAL_USE

# Fields of free text in a NIfTI-1 or NIfTI-2 header.
_TEXT_FIELDS = ("descrip", "aux_file", "intent_name", "db_name")
# What converters and this package write there; anything else might be a name.
_HARMLESS = ("", "none", "fsl", "mrtrix", "spm", "ants", "simpleitk", "itk", "nibabel", "freesurfer", "time=")
# Keys of DICOM attributes ("0010|0010", "DICOM_0010_0010") and names by which tools keep them.
_NAMES_SOMEONE = re.compile(r"(?i)^(dicom[_:.]?)?(0008|0010|0020|0040)[|_,][0-9a-f]{4}|patient|birth|subject|accession")
_HEADER_BYTES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}


def header_findings(path: Path, *, case: str) -> Iterator[Finding]:
    """Warnings and privacy findings of a header that was found readable.

    Args:
        path: NIfTI, NRRD or MetaImage; other formats give nothing here.
        case: id of the case.
    """
    if is_itk_format(path):
        yield from _private_fields(path, case)
        return
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        start = stream.read(544)
    size = next((n for n in _HEADER_BYTES for order in ("little", "big") if int.from_bytes(start[:4], order) == n), 0)
    if not size:
        return
    header = _HEADER_BYTES[size](start[:size], check=True)  # mended as for the reader: `pixdim[0]` may be 0
    yield from _two_geometries(header, path, case)
    slope = float(header["scl_slope"])
    if slope < 0 and math.isfinite(slope):
        message = f"expected brighter tissue to have larger values, found a negative scale (scl_slope {slope:g})"
        yield finding("W173", case=case, where=path, message=message, value=slope)
    yield from _private_text(header, start, path, case)


def _two_geometries(header: Any, path: Path, case: str) -> Iterator[Finding]:
    codes = int(header["sform_code"]), int(header["qform_code"])
    if not all(codes):
        return
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            qform = qform_of(header)
        usable = bool(np.isfinite(qform).all())
    except (HeaderDataError, ValueError):
        usable = False
    if not usable:
        yield finding("W121", case=case, where=path, message="expected a rotation in the qform, found none")
        return
    shape = tuple(int(n) for n in header.get_data_shape()[:3])
    distance = corner_distance(shape, np.asarray(header.get_sform(), dtype=np.float64), qform)
    if not distance <= GEOMETRY_TOLERANCE_MM:
        message = (
            f"expected sform and qform to agree, found corners {distance:.2f} mm apart (codes {codes[0]}, {codes[1]})"
        )
        yield finding("W121", case=case, where=path, message=message, value=round(distance, 2))


def _private_text(header: Any, start: bytes, path: Path, case: str) -> Iterator[Finding]:
    """Text is never repeated in a finding: it might be the name."""
    filled = []
    for field in _TEXT_FIELDS:
        if field in header.keys():  # noqa: SIM118 (a header is no mapping)
            text = bytes(header[field]).split(b"\0")[0].decode("latin-1").strip()
            known = text.lower().startswith(_HARMLESS[1:]) or text in ("", NOT_FOR_CLINICAL_USE)
            if not known:
                filled.append(field)
    end = int(header["sizeof_hdr"])
    if len(start) > end and start[end] == 1:
        filled.append("an extension")
    if filled:
        yield _text_finding(filled, path, case)


def _private_fields(path: Path, case: str) -> Iterator[Finding]:
    """Fields of NRRD and MetaImage that converters take over from DICOM, or name after the patient."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # the reader of values says what is wrong with it
        return
    named = [key for key in reader.GetMetaDataKeys() if _NAMES_SOMEONE.search(key) and reader.GetMetaData(key).strip()]
    if named:
        yield _text_finding([f"{len(named)} fields"], path, case)


def _text_finding(filled: list[str], path: Path, case: str) -> Finding:
    message = f"expected no free text, found some in {', '.join(filled)}; it is not copied to any output"
    return finding("P200", case=case, where=path, message=message, value=len(filled))
