"""Finds the image series below a folder and says what is wrong with the stack of slices that each should be.

A series is usable when its slices share size, spacing and orientation, lie one above the other at right angles, and
are evenly spaced with one slice per position (PS3.3 C.7.6.2: Image Position and Image Orientation, Patient). Readers
that only sort the slices turn a gap into a distorted head; here it is a finding that names the positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.dicom.headers import is_dicom, is_multiframe, number, read_file, text, value
from fediod_med.dicom.planes import Plane, grids_of, heights_of, planes_of, repeats
from fediod_med.errors import InputError
from fediod_med.findings import Finding, Severity, finding

# Slice spacing may vary by this share, or by this many mm: positions are often rounded to 0.01 mm.
SPACING_TOLERANCE, SPACING_TOLERANCE_MM = 0.01, 0.021
# Cosine between the stacking direction and the slice plane above which the stack is sheared (0.06 degrees).
SHEAR_TOLERANCE = 1e-3
_NO_IMAGE = frozenset({"SEG", "PR", "KO", "SR", "RTSTRUCT", "RTDOSE", "RTPLAN", "REG", "RWV", "DOC", "FID", "M3D"})
_SHOWN = 6


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One image series: its files, headers and the stack its slices make.

    Attributes:
        uid: SeriesInstanceUID.
        number: SeriesNumber, or 0.
        description: SeriesDescription without any part of the patient's name or id.
        folder: of its first file.
        paths: one file per slice in the order of `planes`, or the one file of a multi-frame object.
        headers: dataset of each file, without pixel data.
        planes: one per slice, from the highest position along the slice normal to the lowest.
        findings: about the stack; with an error among them it cannot become a volume.
    """

    uid: str
    number: int
    description: str
    folder: Path
    paths: tuple[Path, ...]
    headers: tuple[Any, ...]
    planes: tuple[Plane, ...]
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        """How messages call it: number and description."""
        described = f" ({self.description})" if self.description else ""
        return f"series {self.number or self.uid[-12:]}{described}"

    @property
    def usable(self) -> bool:
        """Whether it can become a volume."""
        return not any(found.severity is Severity.ERROR for found in self.findings)

    @property
    def spacing_between_slices(self) -> float:
        """Mean distance of neighbouring slices in mm."""
        heights = heights_of(self.planes)
        return float(abs(heights[-1] - heights[0]) / (len(heights) - 1))


def find_series(root: Path, *, case: str) -> tuple[tuple[DicomSeries, ...], tuple[Finding, ...]]:
    """Every image series in or below a folder, by series number, and findings that belong to none of them.

    Files that are not DICOM are passed over; DICOM objects without an image, or with a colour image, become one note.

    Args:
        root: folder of a study or of one series.
        case: id, for findings.

    Raises:
        InputError: not a folder, or no DICOM file below it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: expected a folder with DICOM files, found none; check the path", code="E105")
    groups: dict[str, list[tuple[Path, Any]]] = {}
    findings: list[Finding] = []
    passed: Counter[str] = Counter()
    for path in _files(root):
        try:
            header = read_file(path, pixels=False)
        except InputError as error:
            findings.append(finding("E101", case=case, where=path, message=str(error)))
            continue
        if is_directory(header):
            continue
        if not is_image(header):
            passed[_kind(header)] += 1
            continue
        groups.setdefault(str(value(header, "SeriesInstanceUID") or path.parent), []).append((path, header))
    if not groups and not findings and not passed:
        raise InputError(f"{root}: expected DICOM files, found none in or below it; check the folder", code="E105")
    if passed:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(passed.items()))
        findings.append(
            finding("N139", case=case, where=root, message=f"passed over: {kinds}", value=sum(passed.values()))
        )
    series = [_series(uid, files, case) for uid, files in groups.items()]
    return tuple(sorted(series, key=lambda one: (one.number, one.uid))), tuple(findings)


def is_directory(header: Any) -> bool:
    """Whether a dataset is the directory of a medium (DICOMDIR)."""
    return "DirectoryRecordSequence" in header


def is_image(header: Any) -> bool:
    """Whether a dataset is an image with one grey value per pixel."""
    grey = value(header, "Rows") and value(header, "Columns") and (value(header, "SamplesPerPixel") or 1) == 1
    return bool(grey) and str(value(header, "Modality") or "") not in _NO_IMAGE


def _kind(header: Any) -> str:
    """Name of the SOP class of an object."""
    uid = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    colour = " (colour)" if (value(header, "SamplesPerPixel") or 1) != 1 else ""
    return f"{getattr(uid, 'name', 'unknown object')}{colour}"


def _files(root: Path) -> Iterator[Path]:
    """DICOM files in or below a folder, sorted; hidden files and folders are passed over."""
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_file() and (is_dicom(path) or path.suffix.lower() == ".dcm"):
            yield path


def _series(uid: str, files: Sequence[tuple[Path, Any]], case: str) -> DicomSeries:
    """One series from its files: sorted along the slice normal, copies dropped, checked."""
    first = files[0][1]
    series = DicomSeries(
        uid=uid,
        number=int(number(first, "SeriesNumber") or 0),
        description=text(first, "SeriesDescription"),
        folder=files[0][0].parent,
        paths=tuple(path for path, _ in files),
        headers=tuple(header for _, header in files),
        planes=(),
        findings=(),
    )

    def refused(code: str, message: str, number: float | None = None) -> DicomSeries:
        error = finding(code, case=case, where=series.name, message=message, value=number)
        return replace(series, findings=(*series.findings, error))

    many = [is_multiframe(header) for header in series.headers]
    if any(many) and len(many) > 1:
        return refused(
            "E131", f"expected one multi-frame object or single slices, found {len(many)} objects", len(many)
        )
    planes = planes_of(first) if any(many) else [plane for header in series.headers for plane in planes_of(header)]
    if None in planes or not planes:
        count = sum(plane is None for plane in planes) or len(files)
        return refused("E132", f"expected position, orientation and spacing of each slice, absent in {count}", count)
    known = [plane for plane in planes if plane is not None]
    kinds = grids_of(known)
    if len(kinds) > 1:
        described = "; ".join(f"{count} of {rows} x {columns} {view}" for (rows, columns, view), count in kinds)
        return refused("E131", f"expected slices of one grid, found {len(kinds)}: {described}", len(kinds))
    heights = heights_of(known)
    order = [int(i) for i in np.argsort(heights, kind="stable")]
    same = repeats(heights[order])
    kept, doubles = _without_copies(order, same, series, known)
    if doubles:
        copies = f"dropped {doubles} exact copies of slices"
        series = replace(
            series, findings=(finding("W137", case=case, where=series.name, message=copies, value=doubles),)
        )
    planes_kept = tuple(known[i] for i in kept)
    if len(series.paths) == len(known) and not any(many):
        series = replace(
            series,
            paths=tuple(series.paths[i] for i in kept),
            headers=tuple(series.headers[i] for i in kept),
        )
    series = replace(series, planes=planes_kept)
    repeated = sum(repeats(heights_of(planes_kept)))
    if repeated:
        return refused("E131", _several_per_position(series, repeated), repeated)
    series = replace(series, findings=(*series.findings, *_stack_findings(series, case)))
    # highdicom's stacks (slice, row, column) are right-handed, which is down the normal.
    single = len(series.paths) == len(series.planes)
    return replace(
        series,
        planes=series.planes[::-1],
        paths=series.paths[::-1] if single else series.paths,
        headers=series.headers[::-1] if single else series.headers,
    )


def _without_copies(
    order: Sequence[int], same: Sequence[bool], series: DicomSeries, planes: Sequence[Plane]
) -> tuple[list[int], int]:
    """Indices in the given order without slices that are exact copies of one at the same position, and their number."""
    if not any(same) or len(series.paths) != len(planes):
        return list(order), 0
    kept: list[int] = []
    contents: set[bytes] = set()
    for position, i in enumerate(order):
        alone = not same[position] and not (position + 1 < len(order) and same[position + 1])
        if not same[position]:
            contents = set()
        if not alone:
            content = _pixel_bytes(series.paths[i])
            if content in contents:  # the same pixels; an equal UID alone says nothing about them
                continue
            contents.add(content)
        kept.append(i)
    return kept, len(order) - len(kept)


def _pixel_bytes(path: Path) -> bytes:
    """Pixel data of a file as stored; its own path where it has none, so that it equals no other."""
    try:
        return bytes(read_file(path, pixels=True).get("PixelData") or str(path).encode())
    except InputError:
        return str(path).encode()


_TELLING = ("EchoTime", "EchoNumbers", "AcquisitionNumber", "TemporalPositionIdentifier", "ImageType", "TriggerTime")


def _several_per_position(series: DicomSeries, repeated: int) -> str:
    """What tells apart the images that share a position."""
    headers: Iterable[Any] = series.headers
    differing = []
    for keyword in _TELLING:
        values = dict.fromkeys(str(value(header, keyword)) for header in headers)
        if len(values) > 1:
            differing.append(f"{keyword} {', '.join(list(values)[:_SHOWN])}")
    reason = f"they differ in {'; '.join(differing)}" if differing else "nothing in their headers tells them apart"
    return f"expected one image per position, found {repeated} more than positions; {reason}"


def _stack_findings(series: DicomSeries, case: str) -> Iterator[Finding]:
    """Gaps, a sheared stack, and ends that may be missing, for a series with one slice per position."""
    heights = heights_of(series.planes)
    count = len(heights)
    if count < 2:
        message = f"expected a stack of slices, found {count}"
        yield finding("E130", case=case, where=series.name, message=message, value=count)
        return
    steps = np.diff(heights)
    step = float(np.median(steps))
    uneven = np.flatnonzero(np.abs(steps - step) > max(SPACING_TOLERANCE * step, SPACING_TOLERANCE_MM))
    if uneven.size:
        missing = int(sum(max(0, round(float(steps[i]) / step) - 1) for i in uneven))
        shown = ", ".join(f"{heights[i]:.2f} and {heights[i + 1]:.2f}" for i in uneven[:_SHOWN])
        more = f" and {uneven.size - _SHOWN} more" if uneven.size > _SHOWN else ""
        what = f"about {missing} slices missing" if missing else "uneven spacing"
        yield finding(
            "E130",
            case=case,
            where=series.name,
            message=f"expected a slice every {step:.2f} mm, found {what} between positions {shown} mm{more}",
            value=missing or int(uneven.size),
        )
        return
    first, last = np.asarray(series.planes[0].position), np.asarray(series.planes[-1].position)
    stacked = (last - first) / np.linalg.norm(last - first)
    across = float(np.abs(np.reshape(series.planes[0].orientation, (2, 3)) @ stacked).max())
    if across > SHEAR_TOLERANCE:
        message = f"expected slices stacked at right angles, found a sheared stack (cosine {across:.4f})"
        yield finding("E122", case=case, where=series.name, message=message, value=round(across, 4))
    yield from _end_findings(series, case)


def _end_findings(series: DicomSeries, case: str) -> Iterator[Finding]:
    """Geometry cannot tell that a stack lost its ends: the numbering of its instances can."""
    if len(series.headers) != len(series.planes):
        return
    numbers = sorted(int(n) for header in series.headers if (n := number(header, "InstanceNumber")) is not None)
    consecutive = len(numbers) == len(series.planes) and numbers[-1] - numbers[0] == len(numbers) - 1
    if consecutive and numbers[0] > 1:
        yield finding(
            "W138",
            case=case,
            where=series.name,
            message=f"expected instances from number 1 on, found {numbers[0]} to {numbers[-1]}",
            value=numbers[0] - 1,
        )
