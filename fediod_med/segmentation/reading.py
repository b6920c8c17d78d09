"""Reads one case for segmentation: NIfTI, NRRD, MetaImage or DICOM, checked, registered on request, on one grid."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fediod_med.checks.case import inspect_scans, inspect_subject
from fediod_med.checks.values import value_findings
from fediod_med.coregister import Coregistered, coregister
from fediod_med.data.scans import Scan, Volume
from fediod_med.errors import SettingsError
from fediod_med.findings import Finding, RefusedInput, fatal, finding
from fediod_med.labels import SEQUENCES
from fediod_med.preprocess import parse_command, preprocess
from fediod_med.records import sha256
from fediod_med.segmentation.inputs import Case
from fediod_med.segmentation.options import SegmentOptions

if TYPE_CHECKING:
    from fediod_med.dicom.series import DicomSeries

# Findings about intensities, which an external program changes.
_OF_VALUES = ("W160", "W162", "W173")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A case after reading.

    Attributes:
        case: what was asked for.
        volume: the four sequences on the grid of T1c.
        series: DICOM series by sequence; empty for files.
        matches: why each series was taken for its sequence, one line each; empty for files.
        registration: what `--coregister` found, or none.
        findings: about the input; none of them forbids output.
        inputs: SHA-256 by file.
        seconds: of reading, checking and registering.
    """

    case: Case
    volume: Volume
    series: Mapping[str, DicomSeries]
    matches: tuple[str, ...]
    registration: Coregistered | None
    findings: tuple[Finding, ...]
    inputs: Mapping[str, str]
    seconds: float


def read_case(case: Case, options: SegmentOptions) -> Loaded:
    """Read one case.

    Raises:
        RefusedInput: with the findings that forbid output.
        InputError: a file that cannot be read at all.
        SettingsError: DICOM output of a case that is not DICOM.
    """
    began = time.perf_counter()
    if case.problem is not None:
        raise RefusedInput(case.case_id, [finding("E140", case=case.case_id, where=case.case_id, message=case.problem)])
    dicom = [name for name in options.output_types if name.startswith("dicom")]
    if dicom and case.study is None:
        raise SettingsError(
            f"{case.case_id}: expected DICOM input for {' and '.join(dicom)}, found files of another format; leave the "
            "output type out, or give the DICOM study"
        )
    strict = options.strict and options.preprocess is None  # what the program mends is judged after it
    series: Mapping[str, DicomSeries] = {}
    matches: tuple[str, ...] = ()
    if case.study is not None:
        from fediod_med.dicom.study import describe, read_study
        from fediod_med.dicom.volume import read_volume

        study = read_study(case.study, case=case.case_id, chosen=case.chosen)
        _refuse(case, study.findings, strict=strict)
        decoded = read_volume(study)
        before = [*study.findings, *(found for found in decoded.findings if found.code != "E150")]  # checked below
        inspection = inspect_scans(decoded.scans, case=case.case_id, one_grid=not options.coregister, before=before)
        findings, series, matches = inspection.findings, study.series, describe(study)
    else:
        assert case.subject is not None, "a case has files, a study or a problem"
        subject = case.subject
        inspection = inspect_subject(subject, one_grid=not options.coregister)
        findings = inspection.findings
    _refuse(case, findings, strict=strict)
    registration = None
    if options.coregister:
        registration = coregister(inspection.scans, case=case.case_id)
        findings = (*findings, *registration.findings)
        _refuse(case, findings, strict=strict)
        volume = registration.volume
    else:
        volume = inspection.volume
    assert volume is not None, "there is no error among the findings"
    if options.preprocess is not None:
        volume = preprocess(volume, parse_command(options.preprocess), case=case.case_id)
        stripped = {name: Scan(volume.array[i], volume.affine, volume.path) for i, name in enumerate(SEQUENCES)}
        again = (found for name, scan in stripped.items() for found in value_findings(scan, name, case=case.case_id))
        findings = (*(found for found in findings if found.code not in _OF_VALUES), *again)
        _refuse(case, findings, strict=options.strict)
    seconds = time.perf_counter() - began
    return Loaded(case, volume, series, matches, registration, findings, input_files(case), seconds)


def input_files(case: Case) -> dict[str, str]:
    """SHA-256 of every file that a case is read from, by its whole path; one number stands for all files of a study.

    Whole paths, since a record is read from other folders than the one that the command was given in.

    Raises:
        InputError: a file cannot be read.
    """
    if case.study is not None:
        digest = hashlib.sha256()
        files = sorted(path for path in case.study.rglob("*") if path.is_file())
        for path in files:
            digest.update(f"{path.relative_to(case.study).as_posix()} {sha256(path)}\n".encode())
        return {f"{case.study.resolve()} ({len(files)} files)": digest.hexdigest()}
    if case.subject is None:
        return {}
    paths = dict.fromkeys(case.subject.images[name] for name in SEQUENCES)
    return {str(path.resolve()): sha256(path) for path in paths}


def _refuse(case: Case, findings: tuple[Finding, ...], *, strict: bool) -> None:
    refused = fatal(findings, strict=strict)
    if refused:
        raise RefusedInput(case.case_id, refused)
