"""Writes DICOM series for tests from an array and its affine, as a scanner would: classic or enhanced.

Independent of the package: positions follow from PS3.3 C.7.6.2.1.1 alone, `position + column index x column spacing x
row direction + ...`, with the sign change between RAS+ (NIfTI) and LPS+ (DICOM).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Axes of the array that become slices, rows and columns.
VIEWS = {"axial": (2, 1, 0), "sagittal": (0, 2, 1), "coronal": (1, 2, 0)}
STUDY_UID, FRAME_UID = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"

# What scanners state for the four sequences: name, echo, repetition and inversion time in ms, contrast agent.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "T1c": {
        "SeriesDescription": "T1 MPRAGE SAG POST",
        "EchoTime": 2.9,
        "RepetitionTime": 2300,
        "InversionTime": 900,
        "ContrastBolusAgent": "Gadobutrol",
        "MRAcquisitionType": "3D",
        "ScanningSequence": ["GR", "IR"],
    },
    "T1": {
        "SeriesDescription": "T1 MPRAGE SAG PRE",
        "EchoTime": 2.9,
        "RepetitionTime": 2300,
        "InversionTime": 900,
        "MRAcquisitionType": "3D",
        "ScanningSequence": ["GR", "IR"],
    },
    "T2": {"SeriesDescription": "t2_tse_tra_320", "EchoTime": 96, "RepetitionTime": 5600, "ScanningSequence": "SE"},
    "FLAIR": {
        "SeriesDescription": "AX FLAIR",
        "EchoTime": 120,
        "RepetitionTime": 9000,
        "InversionTime": 2500,
        "ScanningSequence": ["SE", "IR"],
    },
}


def rotation(degrees_x: float, degrees_y: float, degrees_z: float) -> np.ndarray:
    """Rotation matrix (3, 3) about x, then y, then z."""
    a, b, c = np.radians([degrees_x, degrees_y, degrees_z])
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return z @ y @ x


def affine_of(spacing: tuple[float, float, float], origin=(0.0, 0.0, 0.0), turn: np.ndarray | None = None):
    """RAS+ affine (4, 4) of a grid with a spacing in mm, an origin and a rotation."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    view: str = "axial",
    flip: tuple[int, ...] = (),
    multiframe: bool = False,
    header: Mapping[str, Any] | None = None,
    number: int = 1,
    slope: float | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write whole numbers (X, Y, Z) with a RAS+ affine (4, 4) as a series; returns its files by slice index.

    `flip` lists array axes to run backwards on disk. Files and frames are in random order, as archives send them.
    """
    from pydicom.uid import generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    for axis in flip:
        array = np.flip(array, axis)
        turned = np.eye(4)
        turned[axis, axis], turned[axis, 3] = -1, array.shape[axis] - 1
        affine = affine @ turned
    slices, rows, columns = VIEWS[view]
    stack = np.transpose(array, (slices, rows, columns))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    unit = lps[:3, :3] / spacing
    positions = [lps[:3, 3] + k * lps[:3, slices] for k in range(len(stack))]
    base: dict[str, Any] = {
        "SeriesInstanceUID": generate_uid(),
        "SeriesNumber": number,
        "Rows": stack.shape[1],
        "Columns": stack.shape[2],
        **(header or {}),
    }
    plane = {
        "ImageOrientationPatient": [_ds(v) for v in (*unit[:, columns], *unit[:, rows])],
        "PixelSpacing": [_ds(spacing[rows]), _ds(spacing[columns])],
        "SliceThickness": _ds(spacing[slices]),
    }
    rng = np.random.default_rng(seed)
    if multiframe:
        order = rng.permutation(len(stack))
        dataset = _enhanced(base, plane, [positions[k] for k in order], stack[order], slope)
        return [_save(folder / "enhanced.dcm", dataset)]
    names = rng.permutation(len(stack))
    paths = []
    for k, pixels in enumerate(stack):
        classic = {"InstanceNumber": k + 1, "ImagePositionPatient": [_ds(v) for v in positions[k]], **plane, **base}
        dataset = _dataset("1.2.840.10008.5.1.4.1.1.4", classic, pixels)
        if slope is not None:
            dataset.RescaleSlope, dataset.RescaleIntercept = slope, -5
        paths.append(_save(folder / f"IM{names[k]:04d}.dcm", dataset))
    return paths


def write_study(folder: Path, images: Mapping[str, np.ndarray], affine: np.ndarray, **options: Any) -> Path:
    """Write the four sequences as four series of one study, in sub-folders that do not tell what they are."""
    for i, (name, array) in enumerate(images.items(), start=1):
        write_series(folder / f"SE{i:02d}", array, affine, header=PROTOCOLS[name], number=i, seed=i, **options)
    return folder


def edit(path: Path, **values: Any) -> None:
    """Set attributes of a file in place; `None` removes one."""
    import pydicom

    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)


def _ds(value: float) -> str:
    """A decimal string: at most 16 characters (PS3.5 6.2)."""
    return min((f"{value:.{digits}f}" for digits in range(12, 5, -1)), key=lambda text: (len(text) > 16, -len(text)))


def _dataset(sop_class: str, values: Mapping[str, Any], pixels: np.ndarray) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality, dataset.ImageType = "MR", ["ORIGINAL", "PRIMARY", "M"]
    dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = STUDY_UID, FRAME_UID
    dataset.PatientName, dataset.PatientID, dataset.PatientIdentityRemoved = "CODE^1", "CODE1", "YES"
    dataset.DeidentificationMethod = "Made from numbers"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.StudyDate, dataset.StudyTime = "", "", "20260101", "120000"
    dataset.StudyID, dataset.AccessionNumber, dataset.ReferringPhysicianName = "1", "", ""
    dataset.Manufacturer, dataset.PositionReferenceIndicator = "phantom", ""
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = np.ascontiguousarray(pixels, dtype="<u2").tobytes()
    return dataset


def _enhanced(
    base: Mapping[str, Any], plane: Mapping[str, Any], positions: list[np.ndarray], stack: np.ndarray, slope: Any
) -> Any:
    """An enhanced MR object: geometry and timing in functional groups (PS3.3 A.36)."""
    timing = {
        "EchoTime": ("MREchoSequence", "EffectiveEchoTime"),
        "RepetitionTime": ("MRTimingAndRelatedParametersSequence", "RepetitionTime"),
        "InversionTime": ("MRModifierSequence", "InversionTimes"),
    }
    top = {keyword: value for keyword, value in base.items() if keyword not in timing}
    dataset = _dataset("1.2.840.10008.5.1.4.1.1.4.1", {"InstanceNumber": 1, **top}, stack)
    dataset.NumberOfFrames = len(stack)
    transformation = {"RescaleSlope": slope or 1, "RescaleIntercept": 0 if slope is None else -5, "RescaleType": "US"}
    shared = {
        "PlaneOrientationSequence": {"ImageOrientationPatient": plane["ImageOrientationPatient"]},
        "PixelMeasuresSequence": {key: plane[key] for key in ("PixelSpacing", "SliceThickness")},
        "PixelValueTransformationSequence": transformation,
    }
    shared |= {group: {name: base[key]} for key, (group, name) in timing.items() if key in base}
    dataset.SharedFunctionalGroupsSequence = [_groups(shared)]
    dataset.PerFrameFunctionalGroupsSequence = [
        _groups({"PlanePositionSequence": {"ImagePositionPatient": [_ds(v) for v in position]}})
        for position in positions
    ]
    return dataset


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> Any:
    from pydicom.dataset import Dataset

    holder = Dataset()
    for name, values in groups.items():
        item = Dataset()
        for keyword, value in values.items():
            setattr(item, keyword, value)
        setattr(holder, name, [item])
    return holder


def _save(path: Path, dataset: Any) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path
