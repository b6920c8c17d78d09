"""Reads a DICOM study: which series is which sequence, and every finding about them, without naming the patient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fediod_med.dicom.headers import IDENTITY, value
from fediod_med.dicom.sequences import SequenceMatch, doubts, evidence_of, recognise
from fediod_med.dicom.series import DicomSeries, find_series
from fediod_med.errors import InputError, SettingsError
from fediod_med.findings import Finding, Severity, finding
from fediod_med.labels import SEQUENCES


@dataclass(frozen=True, eq=False)
class Study:
    """A DICOM study, recognised but not yet decoded.

    Attributes:
        subject_id: pseudonym made from the study's UID; never the patient's name or id.
        case: id used in findings.
        series: by sequence; complete exactly when `findings` holds no E133.
        matches: why each series was taken, for printing.
        findings: about the study and the series that were taken.
        others: series that were not taken.
    """

    subject_id: str
    case: str
    series: Mapping[str, DicomSeries]
    matches: tuple[SequenceMatch, ...]
    findings: tuple[Finding, ...]
    others: tuple[DicomSeries, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether nothing found so far forbids output."""
        return not any(found.severity is Severity.ERROR for found in self.findings)


def read_study(path: Path, *, chosen: Mapping[str, str | Path] | None = None, case: str | None = None) -> Study:
    """Find the four sequences of a study from the headers of its files.

    Args:
        path: folder of one study, with its series in it or in folders below.
        chosen: series by sequence, where the user decides: its folder (also outside `path`, absolute or relative to
            it), its series UID, or its series number. Sequences not named are recognised.
        case: id used in findings; the pseudonym when omitted.

    Raises:
        InputError: no DICOM file there, or a chosen series does not exist.
        SettingsError: `chosen` names an unknown sequence, or one series for two.
    """
    chosen = chosen or {}
    if unknown := [name for name in chosen if name not in SEQUENCES]:
        raise SettingsError(f"chosen series: expected {', '.join(SEQUENCES)}, found {', '.join(unknown)}")
    series, general = find_series(path, case=case or "")
    series = _with_outside(series, path, chosen, case or "")
    picked = {name: _pick(series, path, wanted, name) for name, wanted in chosen.items()}
    if len({one.uid for one in picked.values()}) < len(picked):
        listed = ", ".join(f"{name} = {one.name}" for name, one in picked.items())
        raise SettingsError(f"chosen series: expected one series per sequence, found one for several: {listed}")
    taken = {one.uid for one in picked.values()}
    matches = tuple(SequenceMatch(name, one, "chosen by the user") for name, one in picked.items())
    findings = [*general, *doubts(matches, case=case or "")]
    if len(picked) < len(SEQUENCES):
        recognised, problems = recognise([one for one in series if one.uid not in taken], case=case or "")
        matches += tuple(match for match in recognised if match.sequence not in picked)
        findings += [one for one in problems if _about(one) not in picked]
    matches = tuple(sorted(matches, key=lambda match: SEQUENCES.index(match.sequence)))
    by_sequence = {match.sequence: match.series for match in matches}
    considered = list(by_sequence.values()) if len(by_sequence) == len(SEQUENCES) else list(series)
    findings += [found for one in by_sequence.values() for found in one.findings]
    findings += _study_findings(considered, by_sequence, path, case or "")
    findings += _strangers(considered, series, path, case or "")
    subject_id = pseudonym(considered)
    used = {one.uid for one in by_sequence.values()}
    return Study(
        subject_id=subject_id,
        case=case or subject_id,
        series=by_sequence,
        matches=matches,
        findings=tuple(found if case else found.model_copy(update={"case": subject_id}) for found in findings),
        others=tuple(one for one in series if one.uid not in used),
    )


def pseudonym(series: Sequence[DicomSeries]) -> str:
    """Short id from the hash of the study's UID (which holds no personal value), stable for one study."""
    uids = sorted({str(value(one.headers[0], "StudyInstanceUID") or one.uid) for one in series})
    return f"study-{hashlib.sha256(' '.join(uids).encode()).hexdigest()[:10]}"


def describe(study: Study) -> tuple[str, ...]:
    """One line per series of a study, for printing: what each was taken for and why."""
    taken = [f"{match.sequence}: {match.series.name}, {match.reason}" for match in study.matches]
    left = [f"not used: {one.name}, {evidence_of(one).reason}" for one in study.others]
    return (*taken, *left)


def _about(found: Finding) -> str:
    """The sequence that a finding of `recognise` is about."""
    named = re.search(rf"\b(?:for )({'|'.join(SEQUENCES)})\b", found.message)
    return named.group(1) if named else ""


def _with_outside(
    series: Sequence[DicomSeries], path: Path, chosen: Mapping[str, str | Path], case: str
) -> tuple[DicomSeries, ...]:
    """The series of a study and those of chosen folders that lie elsewhere."""
    known = {one.uid for one in series}
    extended = list(series)
    for wanted in chosen.values():
        folder = path / wanted
        if folder.is_dir() and not folder.resolve().is_relative_to(path.resolve()):
            for one in find_series(folder, case=case)[0]:
                if one.uid not in known:
                    known.add(one.uid)
                    extended.append(one)
    return tuple(extended)


def _pick(series: Sequence[DicomSeries], path: Path, wanted: str | Path, name: str) -> DicomSeries:
    """The series that a folder, series UID or series number names."""
    folder = (path / wanted).resolve()
    found = [one for one in series if str(wanted) in (one.uid, str(one.number))]
    if not found and folder.is_dir():
        found = [one for one in series if one.folder.resolve().is_relative_to(folder)]
    if len(found) != 1:
        listed = "; ".join(f"{one.name}, UID {one.uid}" for one in series)
        raise InputError(
            f"{path}: expected one series for {name} = {str(wanted)!r}, found {len(found)}; the study holds: {listed}; "
            "give a folder, series UID or series number that names one of them",
            code="E133",
        )
    return found[0]


def _strangers(
    considered: Sequence[DicomSeries], series: Sequence[DicomSeries], path: Path, case: str
) -> Iterator[Finding]:
    """Series beside those of the case that belong to another patient or study: the folder may be the wrong one."""
    taken = {one.uid for one in considered}
    for keyword, what in (("PatientID", "patient"), ("StudyInstanceUID", "study")):
        own = {str(value(one.headers[0], keyword)) for one in considered}
        strange = [
            one.name for one in series if one.uid not in taken and str(value(one.headers[0], keyword)) not in own
        ]
        if strange:
            message = f"expected series of one {what}, found of another, not used: {', '.join(strange)}"
            yield finding("W135", case=case, where=path, message=message, value=len(strange))
            return


def _study_findings(
    series: Sequence[DicomSeries], by_sequence: Mapping[str, DicomSeries], path: Path, case: str
) -> Iterator[Finding]:
    """Several patients or studies, several frames of reference, identity in headers."""
    headers = [one.headers[0] for one in series]
    for keyword, what in (("PatientID", "patients"), ("StudyInstanceUID", "studies")):
        count = len({str(value(header, keyword)) for header in headers if value(header, keyword) is not None})
        if count > 1:
            message = f"expected the series of one study, found {count} {what}"
            yield finding("E135", case=case, where=path, message=message, value=count)
            break
    frames = {name: str(value(one.headers[0], "FrameOfReferenceUID")) for name, one in by_sequence.items()}
    if len(set(frames.values())) > 1:
        apart = [name for name in by_sequence if frames[name] != next(iter(frames.values()))]
        message = f"expected one frame of reference, found {len(set(frames.values()))}: {', '.join(apart)} apart"
        yield finding("W156", case=case, where=path, message=message, value=len(set(frames.values())))
    present = [
        keyword
        for keyword in IDENTITY
        if any(
            value(header, keyword) is not None and value(header, "PatientIdentityRemoved") != "YES"
            for header in headers
        )
    ]
    burned = any(value(header, "BurnedInAnnotation") == "YES" for header in headers)
    if present or burned:
        listed = ", ".join([*present, *(["text burned into the image"] if burned else [])])
        message = f"expected a de-identified study (Patient Identity Removed = YES), found {listed}"
        yield finding("P201", case=case, where=path, message=message, value=len(present) + burned)
