"""Segmenting from Python: one scan with its arrays, or many scans with their records."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.devices import pick_device
from fediod_med.errors import InputError, SettingsError
from fediod_med.findings import Finding
from fediod_med.inference import privacy_banner
from fediod_med.labels import from_classes, get_scheme
from fediod_med.progress import Progress, silent
from fediod_med.segmentation.cohort import CaseResult, segment_cohort, segment_one
from fediod_med.segmentation.inputs import Case, case_of_files, find_inputs, part_of
from fediod_med.segmentation.options import SegmentOptions, load_model
from fediod_med.segmentation.steps import CaseSegmenter

Scan = str | Path | Mapping[str, str | Path]


@dataclass(frozen=True, eq=False)
class SegmentedScan:
    """One segmented scan.

    Attributes:
        case_id: name of the case.
        classes: `(X, Y, Z)` uint8: 0 background, 1 NCR, 2 ED, 3 ET; axes are those of the input file.
        labels: the same in the values of the label scheme, as written.
        affine: `(4, 4)` voxel index to mm in RAS+.
        volumes_ml: of NCR, ED, ET, TC and WT.
        probabilities: `(4, X, Y, Z)` float32, when asked for.
        quality: predicted mean Dice with what it rests on.
        findings: about the input.
        notes: what happened on the way.
        paths: files by kind; empty without `out`.
        privacy: what the model's privacy is worth, in one line.
    """

    case_id: str
    classes: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    volumes_ml: Mapping[str, float]
    probabilities: np.ndarray | None
    quality: Mapping[str, Any]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    paths: Mapping[str, Path]
    privacy: str


def segment(
    scan: Scan, *, out: str | Path | None = None, model: str | Path | None = None, device: str = "auto", **options: Any
) -> SegmentedScan:
    """Segment one scan. Research software, not for clinical use.

    Args:
        scan: case folder or DICOM study, or files by sequence: `{"T1c": ..., "T1": ..., "T2": ..., "FLAIR": ...}`.
        out: folder to write to; nothing is kept on disk when omitted.
        model: run folder, bundle or weights file; the public prior, trained on no patient, when omitted.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        **options: of `SegmentOptions`: `scheme`, `output_types`, `probabilities`, `fast`, `coregister` and others.

    Raises:
        RefusedInput: the input has findings that forbid output; they are in its attribute `findings`.
        InputError: not one scan.
        SettingsError: an unknown model, device or option.
    """
    chosen = _options(options)
    cases = resolve(scan)
    if len(cases) != 1:
        raise InputError(f"{scan}: expected one scan, found {len(cases)}; use segment_cohort")
    if out is not None:
        return _one(cases[0], Path(out), model, device, chosen)
    with tempfile.TemporaryDirectory() as folder:
        found = _one(cases[0], Path(folder), model, device, chosen)
        return SegmentedScan(**{**vars(found), "paths": {}})


def segment_scans(
    scans: Scan | Sequence[Case],
    *,
    out: str | Path,
    model: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
    on_result: Callable[[CaseResult], None] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> tuple[CaseResult, ...]:
    """Segment a folder, table or list of scans; one that fails does not stop the others.

    Args:
        scans: what `segmentation.inputs.find_inputs` takes, or the cases it found.
        out: output folder.
        model: as for `segment`.
        device: as for `segment`.
        resume: keep what an earlier call finished.
        num_parts: number of parts that the cases are divided into.
        part_id: the part to do, from 0.
        on_result: called once per case.
        progress: called as work goes on.
        **options: of `SegmentOptions`.

    Returns:
        How each case ended, with its record.
    """
    chosen = _options(options)
    cases = scans if isinstance(scans, Sequence) and not isinstance(scans, str) else resolve(scans)
    part = "" if num_parts == 1 else f"-part-{part_id}-of-{num_parts}"
    segmenter = _segmenter(Path(out), model, device, chosen)
    return segment_cohort(
        part_of(cases, parts=num_parts, part=part_id),
        segmenter,
        resume=resume,
        part=part,
        on_result=on_result,
        progress=progress,
    )


def resolve(scan: Scan) -> tuple[Case, ...]:
    """Cases behind a path or a mapping of files."""
    if isinstance(scan, Mapping):
        return (case_of_files({name: Path(path) for name, path in scan.items()}),)
    return find_inputs(Path(scan))


def _one(case: Case, out: Path, model: str | Path | None, device: str, options: SegmentOptions) -> SegmentedScan:
    segmenter = _segmenter(out, model, device, options)
    _, written = segment_one(case, segmenter)
    scheme = get_scheme(options.scheme or segmenter.model.provenance.label_scheme)
    return SegmentedScan(
        case_id=written.case_id,
        classes=written.classes,
        labels=from_classes(written.classes, scheme),
        affine=written.affine,
        volumes_ml=written.volumes_ml,
        probabilities=written.probabilities,
        quality=written.quality,
        findings=written.findings,
        notes=written.notes,
        paths=written.paths,
        privacy=privacy_banner(segmenter.model.provenance),
    )


def _segmenter(out: Path, model: str | Path | None, device: str, options: SegmentOptions) -> CaseSegmenter:
    where = pick_device(device)
    loaded = load_model(None if model is None else Path(model), device=where, options=options)
    return CaseSegmenter(loaded, options=options, out=out, device=where)


def _options(options: Mapping[str, Any]) -> SegmentOptions:
    known = set(SegmentOptions.__dataclass_fields__)
    unknown = sorted(set(options) - known)
    if unknown:
        raise SettingsError(f"segment: expected options {', '.join(sorted(known))}, found {', '.join(unknown)}")
    return SegmentOptions(**options)
