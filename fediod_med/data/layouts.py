"""Finds the files of each subject in the folder layouts that BraTS data come in; no voxel is read here.

| layout | what is expected below the root |
|---|---|
| `brats2018`, `brats2019` | `[any folder/]{HGG,LGG}/<case>/<case>_{t1,t1ce,t2,flair,seg}.nii.gz` |
| `brats2020` | `[any folder/]<case>/<case>_{...}.nii[.gz]`, grades from `name_mapping.csv` when it is there |
| `brats2021` | `<case>/<case>_{t1,t1ce,t2,flair,seg}.nii.gz` |
| `brats2023`, `brats2024` | `[any folder/]<case>/<case>-{t1n,t1c,t2w,t2f,seg}.nii.gz` |
| `msd` | `[Task01_BrainTumour/]{imagesTr,labelsTr}/BRATS_001.nii.gz`, four sequences in one 4-D file |
| `flat` | every file of every case in one folder, `<id>_<suffix>` or `<id>-<suffix>` |

Scans may also be NRRD or MetaImage files (`.nrrd`, `.mha`, `.mhd`); label maps and 4-D files are NIfTI.

A layout says where files lie, never what their label values mean: the label scheme is a separate, explicit setting.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SEQUENCES

LAYOUTS = ("brats2018", "brats2019", "brats2020", "brats2021", "brats2023", "brats2024", "msd", "flat")
GRADES = ("HGG", "LGG")

_MASK = "mask"
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "T1c": ("t1ce", "t1c", "t1gd", "t1post", "ce-gadolinium_t1w"),
    "T1": ("t1", "t1n", "t1w"),
    "T2": ("t2", "t2w"),
    "FLAIR": ("flair", "t2f", "t2flair", "t2_flair"),
    _MASK: ("seg", "dseg", "tumor_segmentation"),
}
_ROLE_BY_SUFFIX = {suffix: role for role, suffixes in _SUFFIXES.items() for suffix in suffixes}
# The optional and the inner quantifier are lazy: the shortest identifier, hence the longest suffix, is tried first.
_FILE_NAME = re.compile(
    rf"(?:(?P<prefix>.+?)[_-])??(?P<suffix>{'|'.join(map(re.escape, _ROLE_BY_SUFFIX))})"
    r"(?P<ending>\.nii|\.nii\.gz|\.nrrd|\.mha|\.mhd)",
    re.IGNORECASE,
)
_NIFTI = (".nii", ".nii.gz")
_SCANS = (*_NIFTI, ".nrrd", ".mha", ".mhd")
# The mask of case 355 of BraTS 2020 carries the name it had at its hospital.
_MISNAMED_MASKS = ("w39_1998.09.19_segm.nii", "w39_1998.09.19_segm.nii.gz")
# Order of the sequences in MSD Task01 (its dataset.json).
_MSD_CHANNELS: Mapping[str, int] = {"T1c": 2, "T1": 1, "T2": 3, "FLAIR": 0}
_MAX_DEPTH = 5
_FLAGS = "--t1c FILE --t1 FILE --t2 FILE --flair FILE"


@dataclass(frozen=True)
class Subject:
    """The files of one scan session of one patient.

    Attributes:
        subject_id: name of the case, unique within its data set.
        images: file by sequence name, in the order of `SEQUENCES`; a 4-D file appears four times.
        channels: index in the 4-D file by sequence name, or None when each sequence has its own 3-D file.
        label: label map, or None.
        group: grade (`HGG` or `LGG`) when the layout tells, or None.
    """

    subject_id: str
    images: Mapping[str, Path] = field(hash=False)
    channels: Mapping[str, int] | None = field(default=None, hash=False)
    label: Path | None = None
    group: str | None = None


@dataclass(frozen=True)
class _NamedFile:
    """A file whose name tells its role (a sequence or the mask) and the identifier before the suffix."""

    path: Path
    role: str
    prefix: str


@dataclass(frozen=True)
class _Case:
    """Files that belong together, before it is known whether they are complete."""

    subject_id: str
    folder: Path
    files: tuple[_NamedFile, ...]
    group: str | None = None


_Found = TypeVar("_Found", _Case, Subject)


def find_subjects(
    root: Path, layout: str, *, pattern: str | None = None, require_label: bool = False
) -> tuple[Subject, ...]:
    """List the subjects below a root folder, sorted by id.

    Args:
        root: folder as described for the layout at the top of this module.
        layout: one of `LAYOUTS`.
        pattern: regular expression matched at the start of the subject id; other cases are not looked at further.
        require_label: refuse subjects without a label map.

    Raises:
        SettingsError: unknown layout or invalid pattern.
        InputError: nothing found, or a case with a missing or duplicated sequence, a repeated id or a missing label.
    """
    if layout not in LAYOUTS:
        raise SettingsError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    wanted = _compile(pattern)
    _require_folder(root)
    if layout == "msd":
        chosen = _matching(_msd_subjects(root), wanted, root, layout)
    elif layout == "flat":
        chosen = _complete(_matching(_flat_cases(root), wanted, root, layout))
    else:
        cases = [_case_of(folder, files) for folder, files in _case_folders(root, _MAX_DEPTH)]
        chosen = _complete(_matching(_with_grades(cases, root), wanted, root, layout))
    unlabelled = [subject.subject_id for subject in chosen if subject.label is None]
    if require_label and unlabelled:
        raise InputError(
            f"{root}: expected a label map for every subject, found none for {_some(unlabelled)}; add the file "
            f"<id>_seg.nii.gz or leave these subjects out with a pattern"
        )
    return chosen


def find_subject(folder: Path, *, subject_id: str | None = None) -> Subject:
    """The one case in a folder, whatever release named its files; the label map is optional.

    Args:
        folder: holds one file per sequence, each named `<anything>_<suffix>`, `<anything>-<suffix>` or `<suffix>`.
        subject_id: id to use instead of the one derived from the folder.

    Raises:
        InputError: a sequence is missing or appears twice; the message says how to name the files on the command line.
    """
    _require_folder(folder)
    files = _named_files(folder)
    case = _case_of(folder, files)
    subject = _subject(case, hint=f"name the files yourself with {_FLAGS}")
    if subject_id is None:
        return subject
    return Subject(subject_id, subject.images, subject.channels, subject.label, subject.group)


def find_cases(folder: Path) -> tuple[Subject, ...]:
    """All cases of a folder that is itself one case, holds case folders, or holds the files of several cases.

    Folders that hold masks only (an output folder, for example) are no cases.

    Raises:
        InputError: no case found, an incomplete case, or two cases of the same id.
    """
    _require_folder(folder)
    cases = _cases_of(folder)
    if not cases or (len(cases) == 1 and cases[0].folder == folder):
        return (find_subject(folder),)  # where it fails, its message names the flags to use
    return _complete(cases)


def list_cases(folder: Path) -> tuple[tuple[Subject, ...], dict[str, str]]:
    """As `find_cases`, but a case that is incomplete or doubled does not hide the others.

    Returns:
        The complete cases, sorted by id, and what is wrong with each of the others, by id; both empty when the folder
        holds no case at all.

    Raises:
        InputError: not a folder, or a file of a flat folder has no id.
    """
    _require_folder(folder)
    by_id: dict[str, list[_Case]] = {}
    for case in _cases_of(folder):
        by_id.setdefault(case.subject_id, []).append(case)
    subjects: list[Subject] = []
    problems: dict[str, str] = {}
    for subject_id, cases in sorted(by_id.items()):
        try:
            subjects += _complete(cases)
        except InputError as error:
            problems[subject_id] = str(error)
    return tuple(subjects), problems


def sequence_of(suffix: str) -> str | None:
    """The sequence that a suffix or column name stands for (`t1ce`, `T1GD`, `t2f`, ...), or `None`."""
    role = _ROLE_BY_SUFFIX.get(suffix.strip().lower())
    return role if role in SEQUENCES else None


def _cases_of(folder: Path) -> list[_Case]:
    """Cases in or below a folder, complete or not."""
    here = _named_files(folder)
    images = [file for file in here if file.role != _MASK]
    if images:
        repeated = len({file.role for file in images}) < len(images)
        if repeated and len({file.prefix for file in images}) > 1:
            return _flat_cases(folder)
        return [_case_of(folder, here)]
    return [
        _case_of(found, files)
        for found, files in _case_folders(folder, _MAX_DEPTH)
        if any(file.role != _MASK for file in files)
    ]


def _matching(found: Sequence[_Found], wanted: re.Pattern[str], root: Path, layout: str) -> tuple[_Found, ...]:
    """Cases or subjects whose id starts with the pattern; `InputError` when there is none at all, or none such."""
    if not found:
        raise InputError(
            f"{root}: expected cases of layout {layout}, found none; {_contents(root)}; check the folder and the "
            f"layout ({', '.join(LAYOUTS)})"
        )
    chosen = tuple(item for item in found if wanted.match(item.subject_id))
    if not chosen:
        ids = sorted(item.subject_id for item in found)
        raise InputError(f"{root}: no subject id starts with pattern {wanted.pattern!r}; found {_some(ids)}")
    return chosen


def _complete(cases: Iterable[_Case]) -> tuple[Subject, ...]:
    """Subjects of all cases, sorted by id; `InputError` names the first few that are incomplete or doubled."""
    seen: dict[str, Path] = {}
    subjects: list[Subject] = []
    problems: list[str] = []
    for case in sorted(cases, key=lambda c: (c.subject_id, str(c.folder))):
        if case.subject_id in seen:
            problems.append(
                f"subject id {case.subject_id!r}: expected once, found in {seen[case.subject_id]} and {case.folder}"
            )
            continue
        seen[case.subject_id] = case.folder
        try:
            subjects.append(_subject(case, hint="add or rename the file, or leave the case out"))
        except InputError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 3} more such cases)" if len(problems) > 3 else ""
        raise InputError("; ".join(problems[:3]) + more)
    return tuple(subjects)


def _subject(case: _Case, *, hint: str) -> Subject:
    """Turn the files of a case into a `Subject`; `InputError` when a role is filled twice or a sequence is missing."""
    by_role: dict[str, Path] = {}
    for file in case.files:
        if file.role in by_role:
            what = "label map" if file.role == _MASK else file.role
            raise InputError(
                f"{case.folder}: expected one file for {what}, found two: {by_role[file.role].name} and "
                f"{file.path.name}; remove or rename one"
            )
        by_role[file.role] = file.path
    missing = [name for name in SEQUENCES if name not in by_role]
    if missing:
        found = ", ".join(f"{name} = {by_role[name].name}" for name in (*SEQUENCES, _MASK) if name in by_role)
        present = _files(case.folder, _SCANS)
        strange = [path.name for path in present if _named(path) is None]
        unknown = f"; not recognised by name: {_some(strange)}" if strange else ""
        if not present:
            unknown = f"; {_contents(case.folder)}"
        raise InputError(
            f"{case.folder}: expected one NIfTI file for each of {', '.join(SEQUENCES)} ending in a suffix such as "
            f"_t1ce, _t1, _t2, _flair (case {case.subject_id!r}); found {found or 'none of them'}; "
            f"missing {', '.join(missing)}{unknown}; {hint}"
        )
    images = {name: by_role[name] for name in SEQUENCES}
    return Subject(case.subject_id, images, label=by_role.get(_MASK), group=case.group)


def _case_folders(root: Path, depth: int) -> Iterator[tuple[Path, tuple[_NamedFile, ...]]]:
    """Folders at or below `root` that hold recognised files, in order of name; nothing is sought inside a case."""
    files = _named_files(root)
    if files:
        yield root, files
    elif depth > 0:
        for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            yield from _case_folders(folder, depth - 1)


def _case_of(folder: Path, files: tuple[_NamedFile, ...]) -> _Case:
    """The case in one folder; its id is the folder's name, or the files' identifier if the folder only adds to that."""
    name = folder.resolve().name if folder.name in ("", "..") else folder.name
    prefixes = {file.prefix for file in files if file.role != _MASK}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    # `UCSF-PDGM-0014_nifti/UCSF-PDGM-0014_T1` and the BIDS folder `anat/`
    if prefix and (name.lower() == "anat" or re.match(re.escape(prefix) + "[_-]", name)):
        name = prefix
    parent = folder.resolve().parent.name.upper()
    return _Case(name, folder, files, parent if parent in GRADES else None)


def _flat_cases(folder: Path) -> list[_Case]:
    """Group the files of one folder by the identifier before their suffix."""
    by_id: dict[str, list[_NamedFile]] = {}
    for file in _named_files(folder):
        if not file.prefix:
            raise InputError(
                f"{file.path}: expected <id>_<suffix> or <id>-<suffix> in a flat folder, found no id; rename the file"
            )
        by_id.setdefault(file.prefix, []).append(file)
    return [_Case(subject_id, folder, tuple(files)) for subject_id, files in by_id.items()]


def _msd_subjects(root: Path) -> tuple[Subject, ...]:
    """Subjects of MSD Task01: one 4-D image in `imagesTr` and one label map of the same name in `labelsTr`."""
    base = next((b for b in (root, root / "Task01_BrainTumour") if (b / "imagesTr").is_dir()), None)
    if base is None:
        raise InputError(f"{root}: expected a folder imagesTr (layout msd), found none; {_contents(root)}")
    _check_msd_channels(base / "dataset.json")
    labels = {_stem(path): path for path in _files(base / "labelsTr", _NIFTI)} if (base / "labelsTr").is_dir() else {}
    images: dict[str, Path] = {}
    for path in _files(base / "imagesTr", _NIFTI):
        if _stem(path) in images:
            raise InputError(f"{path.parent}: two files for {_stem(path)}: {images[_stem(path)].name} and {path.name}")
        images[_stem(path)] = path
    return tuple(
        Subject(name, dict.fromkeys(SEQUENCES, images[name]), dict(_MSD_CHANNELS), labels.get(name))
        for name in sorted(images)
    )


def _check_msd_channels(path: Path) -> None:
    """Refuse a `dataset.json` that declares another order of sequences than MSD Task01 has."""
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        declared = {int(k): str(v).lower() for k, v in dict(content.get("modality") or {}).items()}
    except (OSError, UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected the JSON description of MSD Task01, could not read it ({error})") from error
    found = {_ROLE_BY_SUFFIX.get(name): index for index, name in declared.items()}
    if declared and found != dict(_MSD_CHANNELS):
        raise InputError(
            f"{path}: expected modality 0 FLAIR, 1 T1w, 2 T1gd, 3 T2w (MSD Task01), found {declared}; use separate "
            f"3-D files with layout flat"
        )


def _with_grades(cases: Sequence[_Case], root: Path) -> list[_Case]:
    """Add the grades of a `name_mapping.csv` (BraTS 2019 and 2020) beside the case folders or in the root."""
    grades: dict[str, str] = {}
    for folder in sorted({root, *(case.folder.parent for case in cases)}):
        table = folder / "name_mapping.csv"
        if table.is_file():
            with table.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
                for row in csv.DictReader(stream):
                    grade = (row.get("Grade") or "").strip().upper()
                    for column, value in row.items():
                        if column and column.lower().endswith("subject_id") and value and grade in GRADES:
                            grades[str(value).strip()] = grade
    return [
        _Case(case.subject_id, case.folder, case.files, case.group or grades.get(case.subject_id)) for case in cases
    ]


def _named_files(folder: Path) -> tuple[_NamedFile, ...]:
    """Files of a folder whose name tells their role, in order of name."""
    return tuple(named for path in _files(folder, _SCANS) if (named := _named(path)) is not None)


def _named(path: Path) -> _NamedFile | None:
    """Read role and identifier from a file name, by the longest suffix after `_` or `-`."""
    if path.name.lower() in _MISNAMED_MASKS:
        return _NamedFile(path, _MASK, "")
    match = _FILE_NAME.fullmatch(path.name)
    if match is None:
        return None
    role = _ROLE_BY_SUFFIX[match["suffix"].lower()]
    if role == _MASK and match["ending"].lower() not in _NIFTI:
        return None
    return _NamedFile(path, role, match["prefix"] or "")


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files of a folder with one of the endings in order of name; hidden ones and macOS forks (`._*`) are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(endings) and not path.name.startswith(".") and path.is_file()
    )


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        state = "a file" if folder.exists() else "nothing"
        raise InputError(f"{folder}: expected a folder, found {state}; check the path")


def _compile(pattern: str | None) -> re.Pattern[str]:
    try:
        return re.compile(pattern or "")
    except re.error as error:
        raise SettingsError(f"pattern {pattern!r}: not a regular expression ({error})") from error


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"the folder holds {_some(names)}" if names else "the folder is empty"


def _some(names: Iterable[str], limit: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
