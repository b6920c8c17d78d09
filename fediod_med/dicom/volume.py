"""Turns DICOM series into arrays with a RAS+ affine; geometry by highdicom, never by hand-written flips.

highdicom stacks slices, rows and columns in the LPS+ system of DICOM. The arrays here have columns first, then rows,
then slices, the axis order of NIfTI files; the affine carries whatever orientation the scanner used, oblique included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fediod_med.data.grids import GEOMETRY_TOLERANCE_MM, corner_distance
from fediod_med.data.scans import Scan, Volume, checked_scan, on_one_grid
from fediod_med.dicom.headers import load_pydicom, number, read_file, value
from fediod_med.dicom.series import DicomSeries
from fediod_med.dicom.study import Study
from fediod_med.errors import GeometryError, InputError
from fediod_med.findings import Finding, fatal, finding
from fediod_med.labels import SEQUENCES

# From highdicom's axes (slice, row, column) to those of arrays here, and back: the permutation is its own inverse.
_AXES = (2, 1, 0)


@dataclass(frozen=True, eq=False)
class StudyVolume:
    """A decoded study.

    Attributes:
        volume: the four sequences on the grid of T1c, or none when there is an error here or in the study.
        scans: each decoded sequence on its own grid; what co-registration starts from.
        findings: what decoding added to those of the study: E101, E134, E150 and content errors.
    """

    volume: Volume | None
    scans: Mapping[str, Scan]
    findings: tuple[Finding, ...]


def geometry(series: DicomSeries) -> Any:
    """The grid of a usable series as a `highdicom.VolumeGeometry` with axes slice, row, column.

    Raises:
        GeometryError: the series cannot be one grid (see its findings).
    """
    load_pydicom()
    import highdicom

    if not series.usable or len(series.planes) < 2:
        raise GeometryError(
            f"{series.name}: expected evenly spaced slices of one grid; "
            + "; ".join(found.message for found in series.findings)
        )
    first = series.planes[0]
    return highdicom.VolumeGeometry.from_attributes(
        image_position=first.position,
        image_orientation=first.orientation,
        rows=first.rows,
        columns=first.columns,
        pixel_spacing=first.spacing,
        spacing_between_slices=series.spacing_between_slices,
        number_of_frames=len(series.planes),
        coordinate_system="PATIENT",
        frame_of_reference_uid=value(series.headers[0], "FrameOfReferenceUID"),
    )


def affine_of(series: DicomSeries) -> np.ndarray:
    """Voxel index (column, row, slice) to mm in RAS+, (4, 4) float64.

    Raises:
        GeometryError: the series cannot be one grid.
    """
    permuted = geometry(series).permute_spatial_axes(_AXES)
    return np.asarray(permuted.get_affine(output_convention="RAS"), dtype=np.float64)


def read_series(series: DicomSeries, sequence: str = "image") -> Scan:
    """Decode a series: stored values times rescale slope plus intercept.

    Args:
        series: usable, from `find_series`.
        sequence: name for messages.

    Returns:
        Array `(columns, rows, slices)` float32 with its RAS+ affine; the path is that of the first slice.

    Raises:
        InputError: a file is cut short, has no decoder, or the content is not finite or constant.
        GeometryError: the series cannot be one grid.
    """
    affine = affine_of(series)
    first = series.planes[0]
    array = np.empty((first.columns, first.rows, len(series.planes)), dtype=np.float32)
    if len(series.paths) == 1:
        dataset = read_file(series.paths[0], pixels=True)
        frames = _pixels(dataset, series).reshape(-1, first.rows, first.columns)
        for k, plane in enumerate(series.planes):
            array[..., k] = _real_values(frames[plane.index], dataset, plane.index).T
    else:
        for k, path in enumerate(series.paths):
            dataset = read_file(path, pixels=True)
            array[..., k] = _real_values(_pixels(dataset, series), dataset, 0).T
    return checked_scan(array, affine, series.paths[0], sequence)


def read_scans(study: Study) -> tuple[dict[str, Scan], tuple[Finding, ...]]:
    """Decode the sequences of a study, each on its own grid.

    Errors become findings: a file that cannot be decoded does not hide what is wrong with the others.

    Args:
        study: from `read_study`.

    Returns:
        Scans by sequence, without those that cannot be decoded, and E101, E110, E134 or E161 for each of these.
    """
    findings: list[Finding] = []
    scans: dict[str, Scan] = {}
    for name in SEQUENCES:
        series = study.series.get(name)
        if series is None or not series.usable:
            continue
        try:
            scans[name] = read_series(series, name)
        except InputError as error:
            findings.append(finding(error.code, case=study.case, where=series.name, message=str(error)))
    return scans, tuple(findings)


def read_volume(study: Study) -> StudyVolume:
    """Decode the four sequences of a study and bring them together, if they share the grid of T1c.

    Args:
        study: from `read_study`.
    """
    scans, undecoded = read_scans(study)
    if len(scans) < len(SEQUENCES) or fatal((*study.findings, *undecoded)):
        return StudyVolume(None, scans, undecoded)
    apart = _grid_findings(scans, study)
    volume = None if apart else on_one_grid(scans)
    return StudyVolume(volume, scans, (*undecoded, *apart))


def _pixels(dataset: Any, series: DicomSeries) -> np.ndarray:
    """Stored values of a dataset: (rows, columns), or with frames first."""
    try:
        pixels = np.asarray(dataset.pixel_array)
    except (NotImplementedError, RuntimeError) as error:
        syntax = getattr(dataset.file_meta.get("TransferSyntaxUID"), "name", "an unknown compression")
        raise InputError(
            f"{series.name}: expected pixel data with an installed decoder, found {syntax} ({type(error).__name__})",
            code="E134",
        ) from None
    except (ValueError, AttributeError, KeyError, TypeError, EOFError) as error:
        raise InputError(
            f"{series.name}: expected whole pixel data, could not decode it ({type(error).__name__}) in "
            f"{dataset.filename}; copy the file again",
            code="E101",
        ) from None
    if str(dataset.PhotometricInterpretation) == "MONOCHROME1":
        # White is the lowest value: mirrored within the range of stored values, the same in every slice.
        top = -1 if int(dataset.PixelRepresentation) else 2 ** int(dataset.BitsStored) - 1
        pixels = top - pixels.astype(np.int64)
    return pixels


def _real_values(stored: np.ndarray, dataset: Any, frame: int) -> np.ndarray:
    """Stored values of a frame with its rescale slope and intercept applied, float32."""
    group = "PixelValueTransformationSequence"
    slope = number(dataset, "RescaleSlope", group=group, frame=frame)
    intercept = number(dataset, "RescaleIntercept", group=group, frame=frame)
    values = stored * np.float64(1 if slope is None else slope) + np.float64(intercept or 0)
    return np.asarray(values, dtype=np.float32)


def _grid_findings(scans: Mapping[str, Scan], study: Study) -> list[Finding]:
    """E150 for each sequence that is not on the grid of T1c."""
    reference = scans[SEQUENCES[0]]
    found = []
    for name in SEQUENCES[1:]:
        scan, where = scans[name], study.series[name].name
        if scan.array.shape != reference.array.shape:
            message = f"expected the shape {reference.array.shape} of T1c, found {scan.array.shape} for {name}"
            found.append(finding("E150", case=study.case, where=where, message=message))
            continue
        distance = corner_distance(scan.array.shape, scan.affine, reference.affine)
        if not distance <= GEOMETRY_TOLERANCE_MM:
            message = f"expected the grid of T1c, found corners of {name} up to {distance:.2f} mm apart"
            found.append(finding("E150", case=study.case, where=where, message=message, value=round(distance, 2)))
    return found
