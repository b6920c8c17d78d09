"""All checks of one case, in one pass over its files."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fediod_med.checks.headers import header_findings
from fediod_med.checks.pairs import grid_pairs, identity_pairs, register_findings, swap_findings
from fediod_med.checks.values import grid_findings, value_findings
from fediod_med.data.itk_formats import read_any_scan
from fediod_med.data.layouts import Subject
from fediod_med.data.nifti.reading import read_label
from fediod_med.data.scans import Scan, Volume, on_one_grid
from fediod_med.errors import GeometryError, InputError, LabelError
from fediod_med.findings import Finding, fatal, finding
from fediod_med.labels import SEQUENCES, LabelScheme


@dataclass(frozen=True, eq=False)
class Inspection:
    """A case that was read and checked.

    Attributes:
        findings: all of them, errors first.
        scans: sequences that could be read, each on its own grid.
        volume: the four sequences on one grid; `None` with an error, and where grids may differ and do.
    """

    findings: tuple[Finding, ...]
    scans: Mapping[str, Scan]
    volume: Volume | None


def inspect_subject(
    subject: Subject, *, label_scheme: LabelScheme | None = None, one_grid: bool = True, threads: int = 2
) -> Inspection:
    """Read the four files of a case and find what is wrong with them; nothing is raised for a defective file.

    Args:
        subject: files of NIfTI, NRRD or MetaImage.
        label_scheme: also check the label map, which must hold values of this scheme.
        one_grid: differing grids are errors; without, notes (they will be registered).
        threads: files read at a time.
    """
    case = subject.subject_id
    found: list[Finding] = []
    scans: dict[str, Scan] = {}
    named = {name: subject.images[name] for name in SEQUENCES if name in subject.images}
    for name in SEQUENCES:
        if name not in named:
            found.append(finding("E140", case=case, where=case, message=f"expected a file for {name}, found none"))
    if subject.channels is None:
        found += _one_file_twice(named, case)
    channels = subject.channels or {}
    with ThreadPoolExecutor(threads) as pool:  # decompression lets other threads run
        reading = {
            name: pool.submit(read_any_scan, path, name, channel=channels.get(name)) for name, path in named.items()
        }
        for name, path in named.items():
            try:
                scans[name] = reading[name].result()
            except InputError as error:
                found.append(_from_error(error, case, path))
    for path in dict.fromkeys(scans[name].path for name in scans):
        found += header_findings(path, case=case)
    if label_scheme is not None:
        found += label_findings(subject, label_scheme)
    return inspect_scans(scans, case=case, one_grid=one_grid, before=found)


def inspect_scans(
    scans: Mapping[str, Scan], *, case: str, one_grid: bool = True, before: list[Finding] | tuple[Finding, ...] = ()
) -> Inspection:
    """Check sequences that were read already, from files or DICOM.

    Args:
        scans: by sequence; not necessarily all four.
        case: id of the case.
        one_grid: as for `inspect_subject`.
        before: findings so far.
    """
    found = list(before)
    for name, scan in scans.items():
        found += value_findings(scan, name, case=case)
    if SEQUENCES[0] in scans:
        found += grid_findings(scans[SEQUENCES[0]], case=case)
    volume = None
    if all(name in scans for name in SEQUENCES):
        found += identity_pairs(scans, case=case)
        apart = list(grid_pairs(scans, case=case, one_grid=one_grid))
        found += apart
        if not apart:
            if not any(f.code == "E141" for f in found):
                found += [*swap_findings(scans, case=case), *register_findings(scans, case=case)]
            if not fatal(found):
                volume = on_one_grid(scans)
    return Inspection(tuple(sorted(found, key=lambda f: _ORDER.index(f.code[0]))), dict(scans), volume)


def label_findings(subject: Subject, scheme: LabelScheme) -> list[Finding]:
    """What is wrong with the label map of a case: absent, defective, on another grid, or with unknown values."""
    where = subject.label or subject.subject_id
    try:
        read_label(subject, scheme)
    except LabelError as error:
        return [_from_error(error, subject.subject_id, where)]
    except GeometryError as error:
        code = "E191" if error.code == "E150" else error.code
        return [finding(code, case=subject.subject_id, where=where, message=_short(error, where))]
    except InputError as error:
        return [_from_error(error, subject.subject_id, where)]
    return []


_ORDER = "EWPN"


def _one_file_twice(named: Mapping[str, Path], case: str) -> list[Finding]:
    first: dict[Path, str] = {}
    found = []
    for name, path in named.items():
        other = first.setdefault(path.resolve(), name)
        if other != name:
            message = f"expected four different files, found one for {other} and {name}"
            found.append(finding("E141", case=case, where=path, message=message))
    return found


def _from_error(error: InputError, case: str, where: Path | str) -> Finding:
    return finding(error.code, case=case, where=where, message=_short(error, where))


def _short(error: InputError, where: Path | str) -> str:
    """The message without the path that the finding names anyway."""
    return str(error).removeprefix(f"{where}: ")
