"""NIfTI files as header and values; refuses what nibabel lets through: a truncated stream, a pair, colours."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from fediod_med.errors import InputError

HEADERS: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
"""By the number of their bytes."""
_GZIP_MAGIC = b"\x1f\x8b"


def read_file(path: Path) -> tuple[Any, np.ndarray]:
    """Header and scaled values of a NIfTI file, after its whole stream has been read and checked.

    Returns:
        The header (nibabel, NIfTI-1 or NIfTI-2), and the array with trailing axes of length 1 beyond the third removed.

    Raises:
        InputError: the file is missing, truncated, empty, not NIfTI, or of the wrong dimension.
    """
    raw = _read_bytes(path)
    header = _parse_header(raw, path)
    shape = shape_of(header, path)
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


def read_header(path: Path) -> Any:
    """Header of a NIfTI file, of which only the first bytes are read; `InputError` when there is none."""
    return _parse_header(_read_bytes(path, limit=max(HEADERS)), path)


def shape_of(header: Any, path: Path) -> tuple[int, ...]:
    """Shape without trailing axes of length 1 beyond the third; `InputError` unless it has three or four axes."""
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise InputError(f"{path}: expected a 3-D volume, found shape {shape}", code="E112")
    return shape


def is_zipped(path: Path) -> bool:
    """Whether a name ends in `.nii.gz` (True) or `.nii` (False); `InputError` for anything else."""
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: expected a name ending in .nii or .nii.gz, found {path.name!r}")
    return name.endswith(".gz")


def _read_bytes(path: Path, limit: int = -1) -> bytes:
    """Content of a `.nii` or `.nii.gz` file, decompressed; without a limit the checksum of the stream is verified."""
    zipped = is_zipped(path)
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
    size = next((n for n in HEADERS for order in ("little", "big") if int.from_bytes(raw[:4], order) == n), None)
    if size is None or len(raw) < size:
        raise InputError(
            f"{path}: expected a NIfTI header, found other or too little data ({len(raw)} bytes)", code="E104"
        )
    with _as_input_error(path):
        header = HEADERS[size](raw[:size], check=True)
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
