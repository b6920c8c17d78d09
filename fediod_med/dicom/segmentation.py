"""Writes a class map as a DICOM Segmentation object, reads it back, and keeps it only if every voxel is right.

Segmentation Storage (PS3.3 A.51) with one coded segment per class, the numbers of `CLASSES`: 1 necrotic core, 2 edema,
3 enhancing tumour. A class without a voxel keeps its segment, so that numbers mean the same in every file. The object
carries the patient and study of its source series, as it must to be found beside it; nothing else of the source.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.dicom.headers import load_pydicom, read_file
from fediod_med.dicom.planes import planes_of
from fediod_med.dicom.series import DicomSeries
from fediod_med.dicom.volume import geometry
from fediod_med.durable import write_verified
from fediod_med.errors import GeometryError, InputError, LabelError, SettingsError
from fediod_med.labels import CLASSES
from fediod_med.resources import NOT_FOR_CLINICAL_USE

KINDS = ("BINARY", "LABELMAP")
SERIES_NUMBER_OFFSET = 9000
# Positions and directions are stored as text of 16 characters; grids that differ by more are different grids.
_TOLERANCE_MM = 0.01
# What a Segmentation copies from its source and may be empty (type 2), but not absent.
_TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName"),
)


@dataclass(frozen=True)
class _Segment:
    """A class in codes: label, SNOMED CT concept by its pydicom name, and sRGB colour of the previews."""

    label: str
    concept: str
    rgb: tuple[int, int, int]


# Colours tell apart for the colour-blind (Okabe and Ito 2008), as in the previews.
_SEGMENTS = (
    _Segment("Necrotic tumour core (NCR), research only", "Necrosis", (0, 114, 178)),
    _Segment("Peritumoral edema (ED), research only", "Edema", (0, 158, 115)),
    _Segment("Enhancing tumour (ET), research only", "Neoplasm", (213, 94, 0)),
)


def write_dicom_seg(
    path: Path,
    classes: np.ndarray,
    affine: np.ndarray,
    source: DicomSeries,
    *,
    kind: str = "BINARY",
    algorithm_name: str = "fediod-med",
    version: str,
) -> None:
    """Write a class map that lies on the grid of a DICOM series as a Segmentation of that series.

    The file is written beside its destination, synced, read back, compared voxel for voxel with `classes`, and only
    then renamed. Axes may be permuted or flipped against those of the series; nothing is ever resampled. Slices of
    fewer than 8 pixels are refused as `BINARY`: highdicom 0.28 packs their bits wrongly, which reading back shows.

    Args:
        path: `.dcm`; missing parent folders are made.
        classes: `(X, Y, Z)` integers 0 to 3.
        affine: `(4, 4)` of `classes`, voxel index to mm in RAS+.
        source: usable series, from `read_study` or `find_series`.
        kind: `BINARY`, one bit per voxel and segment, read by every viewer; or `LABELMAP` (PS3.3 2024), one map.
        algorithm_name: names the model, at most 64 characters.
        version: of model and software, at most 64 characters.

    Raises:
        SettingsError: unknown kind, or the `dicom` extra is absent.
        LabelError: `classes` holds anything but 0 to 3.
        GeometryError: `classes` is not on the grid of the series, or the written grid differs.
        InputError: the series lacks what a Segmentation needs, writing failed, or the written voxels differ.
    """
    if kind not in KINDS:
        raise SettingsError(f"DICOM SEG: expected one of {', '.join(KINDS)}, found {kind!r}")
    if classes.ndim != 3 or classes.dtype.kind not in "ui" or (classes.size and int(classes.max()) >= len(CLASSES)):
        raise LabelError(f"{path}: expected classes (X, Y, Z) of 0 to {len(CLASSES) - 1} as integers, found other")
    if classes.dtype.kind == "i" and classes.size and int(classes.min()) < 0:
        raise LabelError(f"{path}: expected classes of 0 to {len(CLASSES) - 1}, found negative values")
    load_pydicom()
    mask = _on_source_grid(path, classes, affine, source)
    segmentation = _build(path, mask, source, kind, algorithm_name, version)
    write_verified(path, segmentation.save_as, lambda written: _verify(path, written, mask), ending=".dcm")


def _on_source_grid(path: Path, classes: np.ndarray, affine: np.ndarray, source: DicomSeries) -> Any:
    """The class map as a highdicom volume with the axes of the source; it must cover the same voxels."""
    import highdicom

    grid = geometry(source)
    if grid.frame_of_reference_uid is None:
        raise InputError(
            f"{path}: expected a Frame of Reference UID in {source.name}, found none; a DICOM SEG needs one, use NIfTI"
        )
    mask = highdicom.Volume(
        array=np.ascontiguousarray(classes, dtype=np.uint8),
        affine=np.asarray(affine, dtype=np.float64),
        coordinate_system="PATIENT",
        frame_of_reference_uid=grid.frame_of_reference_uid,
        from_reference_convention="RAS",
    )
    same_size = sorted(mask.shape) == sorted(grid.spatial_shape)
    try:
        aligned = mask.match_geometry(grid, tol=1e-3) if same_size else None
    except RuntimeError:
        aligned = None
    # Matching crops and pads where grids are shifted by whole voxels: a common centre rules that out.
    centred = np.allclose(mask.center_position, grid.center_position, rtol=0, atol=_TOLERANCE_MM)
    if aligned is None or not centred or not np.allclose(aligned.affine, grid.affine, rtol=0, atol=_TOLERANCE_MM):
        raise GeometryError(
            f"{path}: expected classes on the grid of {source.name}, {grid.spatial_shape} slices, rows and columns, "
            f"found another grid of shape {classes.shape}; bring them to the grid of the series first"
        )
    return highdicom.Volume(
        array=np.ascontiguousarray(aligned.array),
        affine=grid.affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=grid.frame_of_reference_uid,
    )


def _build(path: Path, mask: Any, source: DicomSeries, kind: str, algorithm_name: str, version: str) -> Any:
    """The Segmentation object, not yet written."""
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=algorithm_name, version=version, family=codes.DCM.ArtificialIntelligence
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=i,
            segment_label=segment.label,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=getattr(codes.SCT, segment.concept),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            anatomic_regions=[codes.SCT.Brain],
            display_color=highdicom.color.CIELabColor.from_rgb(*segment.rgb),
        )
        for i, segment in enumerate(_SEGMENTS, start=1)
    ]
    try:
        return highdicom.seg.Segmentation(
            source_images=[_complete(header) for header in source.headers],
            pixel_array=mask,
            segmentation_type=kind,
            segment_descriptions=descriptions,
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER_OFFSET + max(0, min(source.number, 999)) + 1,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="fediod-med contributors",
            manufacturer_model_name=algorithm_name,
            software_versions=version,
            device_serial_number="none",
            content_label="TUMOUR",
            content_description=NOT_FOR_CLINICAL_USE,
            series_description=f"Tumour segmentation. {NOT_FOR_CLINICAL_USE}"[:64],
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path}: expected headers that a DICOM SEG can refer to in {source.name}, found a defect "
            f"({type(error).__name__}); write NIfTI instead or repair the headers"
        ) from None


def _complete(header: Any) -> Any:
    """A header with the attributes that every Segmentation copies, empty where its source lacks them."""
    complete = copy.copy(header)
    for keyword in _TYPE_2:
        if keyword not in complete:
            setattr(complete, keyword, None)
    return complete


def _verify(path: Path, written: Path, mask: Any) -> None:
    """Refuse a written file unless its frames, put where they say they lie, make the mask again.

    The frames are placed by their own positions, one by one, and not by the writer's library, so an error there cannot
    cancel itself out.
    """
    dataset = read_file(written, pixels=True)
    binary = str(dataset.SegmentationType) == "BINARY"
    slices, rows, columns = mask.spatial_shape
    try:
        pixels = np.asarray(dataset.pixel_array).reshape(-1, rows, columns)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path}: expected to read back what was written, found pixel data that cannot be decoded "
            f"({type(error).__name__}); the file was not kept"
        ) from None
    planes = planes_of(dataset)
    expected_orientation = np.concatenate([mask.unit_vectors()[2], mask.unit_vectors()[1]])
    found = np.zeros(mask.spatial_shape, dtype=np.uint8)
    for i, plane in enumerate(planes):
        if plane is None:
            raise GeometryError(f"{path}: expected a position for every written frame, found none for frame {i + 1}")
        index = np.asarray(mask.map_reference_to_indices(np.array([plane.position]))).reshape(3)
        number = round(float(index[0]))
        off = np.abs(index - [number, 0, 0]) * mask.spacing
        placed = 0 <= number < slices and float(off.max()) <= _TOLERANCE_MM
        turned = not np.allclose(plane.orientation, expected_orientation, rtol=0, atol=1e-4)
        scaled = not np.allclose(plane.spacing, mask.spacing[1:], rtol=1e-4, atol=0)
        if not placed or turned or scaled:
            raise GeometryError(
                f"{path}: expected the grid of the source series, found frame {i + 1} elsewhere after writing; the "
                f"file was not kept"
            )
        if binary:
            group = dataset.PerFrameFunctionalGroupsSequence[i].SegmentIdentificationSequence[0]
            found[number][pixels[i] > 0] = int(group.ReferencedSegmentNumber)
        else:
            found[number] = pixels[i]
    if not np.array_equal(found, mask.array):
        raise InputError(f"{path}: expected to read back what was written, found other voxels; the file was not kept")
