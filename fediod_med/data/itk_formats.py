"""Reads scans in NRRD and MetaImage beside NIfTI, as volumes in RAS+ like any other.

ITK reads the values; what it lets through is checked here: a file that ends before its data do, a geometry that the
header does not state, and values that lie in another file outside the scan's own folder. Both formats know left and
right: ITK hands positions over in LPS, and x and y change their sign (NRRD format definition, section 5; the MetaIO
documentation, `AnatomicalOrientation`).
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fediod_med.data.layouts import Subject
from fediod_med.data.nifti.reading import read_scan
from fediod_med.data.scans import Scan, checked_scan
from fediod_med.errors import GeometryError, InputError
from fediod_med.labels import SEQUENCES

ITK_SUFFIXES = (".nrrd", ".mha", ".mhd")

# Flips x and y: from LPS, in which ITK and DICOM give positions, to RAS, and back.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_HEADER_LIMIT = 1 << 16
_ZLIB_OR_GZIP = 47  # window bits that tell zlib to recognise either wrapper
# Fields that must be there, each under any of its names.
_NRRD_GEOMETRY = (("space",), ("space directions",), ("space origin",))
_META_GEOMETRY = (("transformmatrix", "rotation", "orientation"), ("offset", "position", "origin"))
# Bytes per voxel by ITK's name of a scalar type; colours, vectors and complex numbers are not in it.
_BYTES: Mapping[str, int] = {
    **{f"{bits}-bit {sign} integer": bits // 8 for bits in (8, 16, 32, 64) for sign in ("signed", "unsigned")},
    "32-bit float": 4,
    "64-bit float": 8,
}


def is_itk_format(path: Path) -> bool:
    """Whether a name ends as one of `ITK_SUFFIXES`."""
    return path.name.lower().endswith(ITK_SUFFIXES)


def read_any_scan(path: Path, sequence: str, *, channel: int | None = None) -> Scan:
    """Read one sequence from NIfTI, NRRD or MetaImage.

    Args:
        path: `.nii`, `.nii.gz`, `.nrrd`, `.mha` or `.mhd` (with its data file beside it).
        sequence: its name, for messages.
        channel: index along the fourth axis of a 4-D NIfTI file, or none.

    Raises:
        InputError: the file is missing, incomplete, of another format or dimension, not finite or constant.
        GeometryError: no usable geometry.
    """
    if not is_itk_format(path):
        return read_scan(path, sequence, channel=channel)
    if channel is not None:
        raise InputError(
            f"{path}: expected one sequence per file, found a channel {channel}; split the file", code="E111"
        )
    array, affine = _read_itk(path)
    return checked_scan(array, affine, path, sequence)


def read_scans(subject: Subject) -> Mapping[str, Scan]:
    """The four sequences of a subject, each on its own grid, in the order of `SEQUENCES`.

    Raises:
        InputError: a sequence is missing, or a file is defective.
        GeometryError: a file has no usable geometry.
    """
    missing = [name for name in SEQUENCES if name not in subject.images]
    if missing:
        raise InputError(
            f"subject {subject.subject_id}: expected {', '.join(SEQUENCES)}, missing {', '.join(missing)}", code="E140"
        )
    channels = subject.channels or {}
    return {name: read_any_scan(subject.images[name], name, channel=channels.get(name)) for name in SEQUENCES}


def ras_affine(origin: tuple[float, ...], spacing: tuple[float, ...], direction: tuple[float, ...]) -> np.ndarray:
    """Voxel-to-mm matrix (4, 4) in RAS+ from ITK's origin (3), spacing (3) and direction (9, row by row) in LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(direction, dtype=float).reshape(3, 3) * np.array(spacing, dtype=float)
    affine[:3, 3] = origin
    return np.asarray(_LPS_TO_RAS @ affine)


@dataclass(frozen=True)
class _Header:
    """The text header of a file, and where its data are.

    Attributes:
        fields: value by lower-case name.
        data: file with the values.
        offset: where they begin in it.
        local: whether it is the header's own file.
    """

    fields: Mapping[str, str]
    data: Path
    offset: int
    local: bool


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values (X, Y, Z) and affine (4, 4) RAS+ of an NRRD or MetaImage file."""
    import SimpleITK

    header = _read_header(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if _is_nrrd(path) else "MetaImageIO")
    try:
        reader.ReadImageInformation()
        full, pixel = reader.GetSize(), SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
        size = full[:3]
        if len(size) < 3 or any(n != 1 for n in full[3:]):
            raise InputError(f"{path}: expected a 3-D volume, found size {full}", code="E112")
        width = _BYTES.get(pixel)
        if reader.GetNumberOfComponents() != 1 or width is None:
            raise InputError(
                f"{path}: expected one real number per voxel, found {pixel}; convert the file", code="E113"
            )
        _require_stated_geometry(path, header.fields)
        _require_whole(header, width * math.prod(size))
        reader.SetExtractSize([*size, *[0] * (len(full) - 3)])
        image = reader.Execute()
    except RuntimeError as error:
        _require_stated_geometry(path, header.fields)  # ITK's own word on a missing one is obscure
        raise InputError(
            f"{path}: expected a complete scan, ITK could not read it ({_reason(error)})", code="E101"
        ) from error
    array = np.transpose(SimpleITK.GetArrayViewFromImage(image))
    return np.array(array), ras_affine(image.GetOrigin(), image.GetSpacing(), image.GetDirection())


def _read_header(path: Path) -> _Header:
    """The text header; `InputError` for another kind of file, and for data outside the header's own folder."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_HEADER_LIMIT)
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a scan, found nothing; check the path", code="E105") from error
    except OSError as error:
        raise InputError(f"{path}: could not be read ({error})", code="E105") from error
    if not raw:
        raise InputError(f"{path}: expected a scan, found an empty file; copy it again", code="E103")
    # NRRD ends its header with an empty line, or with the file; MetaImage with the field ElementDataFile.
    kind, end, separator, names = (
        ("NRRD", rb"\r?\n\r?\n|\Z", ":", ("data file", "datafile"))
        if _is_nrrd(path)
        else ("MetaImage", rb"(?im)^\s*ElementDataFile\s*=[^\n]*(?:\n|\Z)", "=", ("elementdatafile",))
    )
    last = re.search(end, raw)
    if last is None or (_is_nrrd(path) and not raw.startswith(b"NRRD")):
        raise InputError(
            f"{path}: the name does not fit the content, found no {kind} header; export the scan again", code="E102"
        )
    lines = [line for line in raw[: last.end()].decode("latin-1").splitlines() if not line.startswith("#")]
    pairs = [line.split(separator, 1) for line in lines if separator in line]
    fields = {name.strip().lower(): value.removeprefix("=").strip() for name, value in pairs}
    where = next((fields[name] for name in names if name in fields), "")
    if where.lower() in ("", "local"):
        return _Header(fields, path, last.end(), local=True)
    # ITK would follow any path, and the other ways to name several files.
    if Path(where).name != where or "\\" in where or "%" in where or where.split()[0] == "LIST":
        raise InputError(
            f"{path}: expected the data in one file of the same folder, found {where!r}; export it again", code="E107"
        )
    if not (path.parent / where).is_file():
        raise InputError(
            f"{path}: expected its data file {where!r} beside it, found nothing; copy both files", code="E107"
        )
    return _Header(fields, path.parent / where, 0, local=False)


def _require_stated_geometry(path: Path, fields: Mapping[str, str]) -> None:
    """Refuse a header without orientation or position (ITK would invent them), or in another unit than mm."""
    needed = _NRRD_GEOMETRY if _is_nrrd(path) else _META_GEOMETRY
    absent = [f"'{names[0]}'" for names in needed if not any(name in fields for name in names)]
    if absent:
        raise GeometryError(
            f"{path}: expected a position and orientation, found no {' and no '.join(absent)} in the header; convert "
            f"the scan again from its source, left and right cannot be told from this file",
            code="E120",
        )
    units = re.findall(r'"([^"]*)"', fields.get("space units", ""))
    if any(unit.strip() not in ("mm", "") for unit in units):
        raise GeometryError(
            f"{path}: expected millimetres, found the units {', '.join(units)}; correct the header", code="E123"
        )


def _require_whole(header: _Header, expected: int) -> None:
    """Refuse data that are not `expected` bytes: ITK reads a damaged MetaImage stream as half a scan without an error.

    Compressed data are unpacked here, so that their checksum is verified. Text encodings are left to ITK.
    """
    encoding = header.fields.get("encoding", "raw").lower()
    packed = header.fields.get("compresseddata", "").lower() == "true" or encoding in ("gz", "gzip")
    if encoding not in ("raw", "gz", "gzip"):
        return
    with header.data.open("rb") as stream:
        found = stream.seek(0, io.SEEK_END) - header.offset
        if packed:
            stream.seek(header.offset)
            unpacking = zlib.decompressobj(wbits=_ZLIB_OR_GZIP)
            try:
                found = len(unpacking.decompress(stream.read(), expected + 1))
            except zlib.error as error:
                raise InputError(
                    f"{header.data}: expected a complete compressed stream, found a defect ({error}); copy it again",
                    code="E101",
                ) from error
    if found < expected or (packed and not unpacking.eof):
        raise InputError(
            f"{header.data}: expected {expected} bytes of voxels, found {found} or no end of the compressed stream; "
            f"the file is damaged, copy it again",
            code="E101",
        )


def _is_nrrd(path: Path) -> bool:
    return path.suffix.lower() == ".nrrd"


def _reason(error: RuntimeError) -> str:
    """The last line of an ITK error, which says what is wrong, without the addresses and source lines before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
