"""Writes the outputs of one segmented case: every file under a temporary name, read back, then renamed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor

from fediod_med import __version__
from fediod_med.case_report import CaseReport, write_html, write_png
from fediod_med.data.nifti.writing import write_label_map, write_segmentation, write_volumes
from fediod_med.data.transforms import to_native
from fediod_med.findings import Finding
from fediod_med.inference import Segmentation, case_statistics, privacy_banner, volumes_ml
from fediod_med.labels import get_scheme
from fediod_med.lesions import measure_lesions
from fediod_med.quality import QualityScore
from fediod_med.records import write_json
from fediod_med.reporting.case import preview
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.segmentation.options import Model, SegmentOptions
from fediod_med.segmentation.reading import Loaded


@dataclass(frozen=True, eq=False)
class Computed:
    """A case after computing.

    Attributes:
        loaded: from reading.
        segmentation: on the grid of T1c.
        quality: predicted Dice.
        entropy: of the class probabilities on the working grid `(1, x, y, z)`, nats, or none.
        disagreement: of the teachers on the working grid `(1, x, y, z)`, nats, or none.
        notes: what happened on the way.
        seconds: of computing.
    """

    loaded: Loaded
    segmentation: Segmentation
    quality: QualityScore
    entropy: MetaTensor | None
    disagreement: MetaTensor | None
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class Written:
    """A finished case.

    Attributes:
        case_id: the case.
        classes: label map as written, `(X, Y, Z)` uint8 classes.
        affine: of its grid, voxel to mm in RAS+.
        probabilities: `(4, X, Y, Z)` float32 on the grid of T1c, when they were asked for.
        volumes_ml: by class and region, counted on `classes`.
        quality: predicted Dice, as in the JSON files.
        findings: about the input.
        notes: what happened on the way.
        paths: files by kind.
        inputs: SHA-256 by input file.
        seconds: by stage.
    """

    case_id: str
    classes: np.ndarray
    affine: np.ndarray
    probabilities: np.ndarray | None
    volumes_ml: Mapping[str, float]
    quality: Mapping[str, Any]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    paths: Mapping[str, Path]
    inputs: Mapping[str, str]
    seconds: Mapping[str, float]


def write_outputs(computed: Computed, out: Path, *, model: Model, options: SegmentOptions) -> Written:
    """Write what was asked for.

    Raises:
        InputError: a file reads back other than it was meant, or the folder cannot be written.
    """
    began = time.perf_counter()
    loaded, case_id = computed.loaded, computed.loaded.case.case_id
    provenance, scheme = model.provenance, get_scheme(options.scheme or model.provenance.label_scheme)
    shown = _on_native_grid(computed, options)
    paths = {"segmentation": out / f"{case_id}_seg.nii.gz"}
    if shown.reference.name.lower().endswith((".nii", ".nii.gz")):
        write_segmentation(paths["segmentation"], shown.classes, reference=shown.reference, scheme=scheme)
    else:
        write_label_map(paths["segmentation"], shown.classes, shown.affine, scheme)
    paths |= _dicom_outputs(computed, shown, out, model, options)
    banner = f"{privacy_banner(provenance)}. {NOT_FOR_CLINICAL_USE}"
    brain = _brain(shown)
    lesions = measure_lesions(shown.classes, shown.affine, brain=brain)
    if options.statistics:
        paths["statistics"] = out / f"{case_id}_stats.json"
        statistics = case_statistics(shown, scheme, provenance) | {
            "lesions_by_region": lesions.as_dict(),
            "quality": computed.quality.as_dict(),
            "findings": [found.model_dump(mode="json") for found in loaded.findings],
            "notes": list(computed.notes),
        }
        write_json(paths["statistics"], statistics)
    if options.preview or options.report:
        paths["preview"] = preview(out / f"{case_id}_preview.png", computed.segmentation, banner=banner)
    if options.report:
        report = CaseReport(
            subject_id=case_id,
            volumes_ml=shown.volumes_ml,
            lesions=lesions,
            provenance=provenance,
            privacy=privacy_banner(provenance),
            findings=loaded.findings,
            quality=computed.quality,
            notes=computed.notes,
            pictures={"T1c and FLAIR with the label map": paths["preview"]},
        )
        paths["report"] = write_html(out / f"{case_id}_report.html", report)
        paths["report_picture"] = write_png(out / f"{case_id}_report.png", report)
    probabilities = None
    if options.probabilities and computed.segmentation.probabilities is not None:
        probabilities = computed.segmentation.probabilities
        paths["probabilities"] = out / f"{case_id}_probabilities.nii.gz"
        write_volumes(paths["probabilities"], probabilities, computed.segmentation.affine)
    for kind, values in (("entropy", computed.entropy), ("disagreement", computed.disagreement)):
        if values is not None:
            paths[kind] = out / f"{case_id}_{kind}.nii.gz"
            write_volumes(paths[kind], _map_on_scan(values, computed.segmentation), computed.segmentation.affine)
    return Written(
        case_id=case_id,
        classes=shown.classes,
        affine=shown.affine,
        probabilities=probabilities,
        volumes_ml=shown.volumes_ml,
        quality=computed.quality.as_dict(),
        findings=loaded.findings,
        notes=(*loaded.matches, *computed.notes),
        paths=paths,
        inputs=loaded.inputs,
        seconds={"read": loaded.seconds, "compute": computed.seconds, "write": time.perf_counter() - began},
    )


def _on_native_grid(computed: Computed, options: SegmentOptions) -> Segmentation:
    """The segmentation on the grid that was asked for: T1c's, or a sequence's own after registration."""
    found, registration = computed.segmentation, computed.loaded.registration
    if registration is None or options.native == "T1c":
        return found
    grid = registration.grids[options.native]
    classes = registration.classes_on(options.native, found.classes)
    return dataclasses.replace(
        found,
        classes=classes,
        affine=grid.affine,
        reference=grid.path,
        volumes_ml=volumes_ml(classes, grid.affine),
        image=None,
    )


def _dicom_outputs(
    computed: Computed, shown: Segmentation, out: Path, model: Model, options: SegmentOptions
) -> dict[str, Path]:
    wanted = {"dicom-seg": "BINARY", "dicom-labelmap": "LABELMAP"}
    kinds = {name: kind for name, kind in wanted.items() if name in options.output_types}
    if not kinds:
        return {}
    loaded = computed.loaded
    from fediod_med.dicom.segmentation import write_dicom_seg

    paths = {}
    for name, kind in kinds.items():
        paths[name] = out / f"{loaded.case.case_id}_{'seg' if kind == 'BINARY' else 'labelmap'}.dcm"
        source = loaded.series[options.native]
        version = f"{__version__}, weights {model.sha256[:16]}"
        write_dicom_seg(paths[name], shown.classes, shown.affine, source, kind=kind, version=version)
    return paths


def _brain(shown: Segmentation) -> np.ndarray | None:
    return None if shown.image is None else (shown.image != 0).any(axis=0)


def _map_on_scan(values: MetaTensor, segmentation: Segmentation) -> np.ndarray:
    """A map `(1, x, y, z)` of the working grid on the scan's grid, linearly; 0 outside."""
    # `to_native` brings the channels after the first over and makes the first the rest to 1.
    doubled = MetaTensor(values.as_tensor().repeat(2, 1, 1, 1), affine=values.affine)
    shape = segmentation.classes.shape
    # Three decimals of a nat are more than the maps mean, and compress to a third.
    return np.asarray(np.round(to_native(doubled, affine=segmentation.affine, shape=shape)[1].numpy(), 3))
