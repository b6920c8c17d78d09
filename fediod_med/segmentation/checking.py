"""Every finding of every case, in one pass; what `fediod check` prints."""

from __future__ import annotations

from collections.abc import Iterable

from fediod_med.checks.case import inspect_scans, inspect_subject
from fediod_med.errors import InputError
from fediod_med.findings import Finding, finding
from fediod_med.labels import LabelScheme
from fediod_med.segmentation.inputs import Case


def check_cases(cases: Iterable[Case], *, label_scheme: LabelScheme | None = None) -> tuple[Finding, ...]:
    """Findings of all cases, in their order; no case stops the others.

    Args:
        cases: from `inputs.find_inputs`.
        label_scheme: also check label maps, which must hold values of this scheme.
    """
    return tuple(found for case in cases for found in check_case(case, label_scheme))


def check_case(case: Case, label_scheme: LabelScheme | None = None) -> tuple[Finding, ...]:
    """Findings of one case; nothing is raised for a defective input."""
    if case.problem is not None:
        return (finding("E140", case=case.case_id, where=case.case_id, message=case.problem),)
    if case.study is None:
        assert case.subject is not None, "a case has files, a study or a problem"
        return inspect_subject(case.subject, label_scheme=label_scheme).findings
    from fediod_med.dicom.study import read_study
    from fediod_med.dicom.volume import read_volume

    try:
        study = read_study(case.study, case=case.case_id, chosen=case.chosen)
    except InputError as error:
        return (finding(error.code, case=case.case_id, where=case.study, message=str(error)),)
    if not study.usable:
        return study.findings
    decoded = read_volume(study)
    before = [*study.findings, *(found for found in decoded.findings if found.code != "E150")]
    return inspect_scans(decoded.scans, case=case.case_id, before=before).findings
