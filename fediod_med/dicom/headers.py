"""Reads single values out of DICOM headers, classic or enhanced, and keeps identity out of every message.

pydicom is imported inside the functions: it is an extra, and nothing but this package needs it.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fediod_med.errors import InputError, SettingsError

_MAGIC_AT, _MAGIC = 128, b"DICM"
# Files without the 128-byte preamble start with an element of group 0002 or 0008.
_BARE_STARTS = (b"\x02\x00", b"\x08\x00")
_BARE_SUFFIXES = (".dcm", ".ima", ".dicom")
# Attributes that name a person or let one be found (PS3.15, Table E.1-1: those every MR image may carry).
IDENTITY = (
    *("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "OtherPatientNames", "PatientAddress"),
    *("PatientTelephoneNumbers", "PatientMotherBirthName", "MedicalRecordLocator", "IssuerOfPatientID"),
)


def load_pydicom() -> Any:
    """The pydicom package, told not to speak: its warnings quote header values, which may name the patient.

    Raises:
        SettingsError: the extra is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise SettingsError(
            "DICOM: expected pydicom and highdicom, found neither; pip install 'fediod-med[dicom]'"
        ) from error
    for package in ("pydicom", "highdicom"):
        logging.getLogger(package).setLevel(logging.CRITICAL)
    # pydicom warns on behalf of its caller, so the module is that of whoever touches an element.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(pydicom|highdicom|fediod_med\.dicom)(\..*)?$")
    return pydicom


def is_dicom(path: Path) -> bool:
    """Whether a file looks like DICOM, from its first bytes; files without a preamble need a DICOM suffix."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_MAGIC_AT + len(_MAGIC))
    except OSError:
        return False
    if start[_MAGIC_AT:] == _MAGIC:
        return True
    return path.suffix.lower() in _BARE_SUFFIXES and start[:2] in _BARE_STARTS


def holds_dicom(folder: Path) -> bool:
    """Whether a folder itself, not one below it, holds a DICOM file."""
    return any(is_dicom(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != ".")


def read_file(path: Path, *, pixels: bool) -> Any:
    """Dataset of one DICOM file, with or without pixel data.

    Raises:
        InputError: the file cannot be read or is cut short.
    """
    pydicom = load_pydicom()
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=not pixels, force=path.suffix.lower() in _BARE_SUFFIXES)
        known = "SOPClassUID" in dataset or "MediaStorageSOPClassUID" in dataset.file_meta
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, KeyError, struct.error) as error:
        # The text of the error may quote a header value.
        raise InputError(
            f"{path}: expected a DICOM file, could not read it ({type(error).__name__}); copy it again", code="E101"
        ) from None
    if not known:
        raise InputError(f"{path}: expected a DICOM file, found no SOP class in it; copy it again", code="E101")
    return dataset


def is_multiframe(header: Any) -> bool:
    """Whether one object holds a whole stack (enhanced MR), each frame with its own functional groups."""
    return "PerFrameFunctionalGroupsSequence" in header


def value(header: Any, keyword: str, *, group: str | None = None, frame: int = 0) -> Any:
    """A header value, or `None` where it is absent or empty.

    Args:
        header: dataset of a classic or enhanced image.
        keyword: attribute, by its DICOM keyword.
        group: functional group that holds it in an enhanced image; looked up for this frame, then for all frames.
        frame: index of the frame.
    """
    for holder in _holders(header, group, frame):
        try:
            found = holder.get(keyword)
        except (ValueError, TypeError, KeyError):  # pydicom converts on access: an impossible number is no number
            continue
        if found is not None and found != "" and not (hasattr(found, "__len__") and len(found) == 0):
            return found
    return None


def number(header: Any, keyword: str, *, group: str | None = None, frame: int = 0) -> float | None:
    """A header value as a float: the first one of several; `None` where it is absent or no number."""
    found = value(header, keyword, group=group, frame=frame)
    try:
        if found is None:
            return None
        return float(found[0] if hasattr(found, "__iter__") and not isinstance(found, str) else found)
    except (TypeError, ValueError):
        return None


def text(header: Any, *keywords: str) -> str:
    """Free text of some attributes, joined, without any part of the patient's name or id."""
    words = [str(found) for keyword in keywords if (found := value(header, keyword)) is not None]
    return without_identity(" ".join(dict.fromkeys(words)), header).strip()


def without_identity(words: str, header: Any) -> str:
    """A text with every part of the patient's name, id and birth date taken out."""
    names = [str(value(header, keyword) or "") for keyword in IDENTITY]
    parts = {part for name in names for part in re.split(r"[\s^=,;]+", name) if len(part) > 1}
    for part in sorted(parts, key=len, reverse=True):
        words = re.sub(rf"(?<![a-z0-9]){re.escape(part)}(?![a-z0-9])", "***", words, flags=re.IGNORECASE)
    return words


def _holders(header: Any, group: str | None, frame: int) -> Iterator[Any]:
    """Where a value may stand: the functional group of the frame, the shared one, the header itself."""
    if group is not None and is_multiframe(header):
        frames = header.PerFrameFunctionalGroupsSequence
        shared = header.get("SharedFunctionalGroupsSequence") or []
        for groups in ([frames[frame]] if frame < len(frames) else []), shared:
            yield from (item for holder in groups for item in (holder.get(group) or [])[:1])
    yield header
