"""From what a user names to the cases to segment: a case folder, a folder of cases, a table, a data list, DICOM.

| given | read as |
|---|---|
| folder | one case, case folders at any depth, or the files of several cases (`data.layouts.find_cases`) |
| folder with DICOM files | one study, or one study per sub-folder |
| `.csv`, `.tsv` | one case a row: `case` and either `folder` or `t1c`, `t1`, `t2`, `flair` (also the columns of FeTS) |
| `.json` | data list: `[{"case": ..., "t1c": ..., ...}]`, or MONAI's `{"testing": [{"image": [...]}]}` |
| `.txt` | one folder a line |

Relative paths in a table or list start at its own folder. A row that cannot be used becomes a case with a problem, so
that it is reported beside the others instead of stopping them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fediod_med.data.layouts import Subject, find_subject, list_cases, sequence_of
from fediod_med.dicom.headers import holds_dicom
from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SEQUENCES

_ID_KEYS = ("case", "case_id", "caseid", "subject", "subject_id", "patientid", "patient_id", "id")
_FOLDER_KEYS = ("folder", "path", "dicom", "study")
_PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Case:
    """One thing to segment.

    Attributes:
        case_id: names the output files; letters, digits, dots, dashes and underscores.
        subject: files of the four sequences, or none for DICOM and for a case with a problem.
        study: folder of a DICOM study, or none.
        chosen: DICOM series folder or series UID by sequence, where the user chose.
        problem: why this case cannot be read at all.
    """

    case_id: str
    subject: Subject | None = None
    study: Path | None = None
    chosen: Mapping[str, str] = field(default_factory=dict, hash=False)
    problem: str | None = None


def find_inputs(source: Path) -> tuple[Case, ...]:
    """The cases behind one path, sorted by id.

    Raises:
        InputError: nothing there, nothing recognised, a table that cannot be read, or an id that occurs twice.
    """
    if source.is_dir():
        found = _in_folder(source)
    elif not source.exists():
        raise InputError(f"{source}: expected a folder, a .csv, a .json or a .txt, found nothing; check the path")
    elif source.suffix.lower() in (".csv", ".tsv"):
        found = [_case_of_row(row, source, where) for where, row in _table_rows(source)]
    elif source.suffix.lower() == ".json":
        found = [_case_of_row(row, source, where) for where, row in _list_rows(source)]
    elif source.suffix.lower() == ".txt":
        found = [_case_of_row({"folder": line}, source, where) for where, line in _lines(source)]
    else:
        raise InputError(
            f"{source}: expected a folder, a .csv, a .json or a .txt, found {source.suffix or 'no ending'}; "
            "a single scan is its folder, or --t1c FILE --t1 FILE --t2 FILE --flair FILE"
        )
    if not found:
        raise InputError(f"{source}: expected at least one case, found none")
    return _unique(found, source)


def case_of_files(files: Mapping[str, Path]) -> Case:
    """The case that four named files make; its id comes from the T1c file's name.

    Raises:
        SettingsError: a sequence is missing.
    """
    missing = [name for name in SEQUENCES if name not in files]
    if missing:
        raise SettingsError(f"expected files for {', '.join(SEQUENCES)}, found none for {', '.join(missing)}")
    name = _plain(files["T1c"].name.split(".")[0])
    return Case(name, Subject(name, {sequence: files[sequence] for sequence in SEQUENCES}))


def part_of(cases: Sequence[Case], *, parts: int, part: int) -> tuple[Case, ...]:
    """Every `parts`-th case from number `part` (from 0): disjoint parts that together are all cases.

    Raises:
        SettingsError: not `0 <= part < parts`.
    """
    if not 0 <= part < parts:
        raise SettingsError(f"parts: expected 0 <= part id < number of parts, found {part} of {parts}")
    return tuple(cases[part::parts])


def _in_folder(folder: Path) -> list[Case]:
    if holds_dicom(folder):
        return [Case(_plain(folder.resolve().name), study=folder)]
    subjects, problems = list_cases(folder)
    found = [Case(_plain(subject.subject_id), subject) for subject in subjects]
    found += [Case(_plain(case), problem=problem) for case, problem in problems.items()]
    if found:
        return found
    below = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    studies = [entry for entry in below if any(holds_dicom(inner) for inner in _folders(entry))]
    if any(holds_dicom(entry) for entry in studies):  # the series of one study
        return [Case(_plain(folder.resolve().name), study=folder)]
    if studies:
        return [Case(_plain(entry.name), study=entry) for entry in studies]
    return [Case(_plain(folder.resolve().name), find_subject(folder))]  # raises: what it holds, and the flags to use


def _folders(root: Path, depth: int = 3) -> Iterator[Path]:
    yield root
    if depth:
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _folders(entry, depth - 1)


def _case_of_row(row: Mapping[str, Any], source: Path, where: str) -> Case:
    """One row of a table or data list as a case; what is wrong with it becomes its problem."""
    values = {
        str(key).strip().lower(): value for key, value in row.items() if key is not None and value not in ("", None)
    }
    named = next((str(values[key]).strip() for key in _ID_KEYS if key in values), "")
    folder = next((str(values[key]) for key in _FOLDER_KEYS if key in values), "")
    try:
        if folder:
            inside = find_inputs(source.parent / folder)
            if len(inside) != 1:
                raise InputError(f"{source.parent / folder}: expected one case, found {len(inside)}; give each its row")
            return replace(inside[0], case_id=_plain(named)) if named else inside[0]
        files = {role: source.parent / str(path) for role, path in _sequences(values).items()}
        missing = [name for name in SEQUENCES if name not in files]
        if missing:
            raise InputError(f"{source}, {where}: expected {', '.join(SEQUENCES)}, found none for {', '.join(missing)}")
        case = case_of_files(files)
        if not named:
            return case
        return Case(_plain(named), Subject(_plain(named), {name: files[name] for name in SEQUENCES}))
    except InputError as error:
        return Case(_plain(named or Path(folder).name or where), problem=str(error))


def _sequences(values: Mapping[str, Any]) -> dict[str, Any]:
    """File by sequence from named columns, or from the names of the files in MONAI's `image` list."""
    found = {role: value for key, value in values.items() if (role := sequence_of(key)) is not None}
    images = values.get("image")
    if found or not isinstance(images, list):
        return found
    for path in images:
        role = sequence_of(re.split(r"[_-]", Path(str(path)).name.split(".")[0])[-1])
        if role is None or role in found:
            raise InputError(
                f"image list: expected four files whose names end in a sequence (_t1ce, _t1, _t2, _flair), found "
                f"{Path(str(path)).name}; name them by keys t1c, t1, t2, flair instead"
            )
        found[role] = path
    return found


def _table_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            for number, row in enumerate(csv.DictReader(stream, delimiter=delimiter), start=2):
                yield f"line {number}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: expected a table in UTF-8 with a header line, could not read it ({error})"
        ) from error


def _list_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: expected JSON, could not read it ({error})") from error
    if isinstance(content, dict):
        content = next((content[key] for key in ("testing", "test", "cases", "data") if key in content), None)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path}: expected a list of cases, or an object with one under `testing`, found neither")
    for number, row in enumerate(content, start=1):
        yield f"entry {number}", row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, could not read it ({error})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            yield f"line {number}", line.strip()


def _unique(cases: Iterable[Case], source: Path) -> tuple[Case, ...]:
    ordered = tuple(sorted(cases, key=lambda case: case.case_id))
    for first, second in pairwise(ordered):
        if first.case_id == second.case_id:
            raise InputError(
                f"{source}: expected every case once, found {first.case_id!r} twice; their outputs would overwrite one "
                "another; name them in a table with a column `case`"
            )
    return ordered


def _plain(name: str) -> str:
    """A name that is safe in file names on every system."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name.strip()).strip(".-_")
    return plain if _PLAIN_ID.fullmatch(plain) else "case"
