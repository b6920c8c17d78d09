"""Segmented cases as they lie on disk, with the scans they were made from, references, and what other models said.

Records name input files by full path. Those are opened only inside the folders that the app was started with; a file
elsewhere is absent, with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fediod_med.data.layouts import Subject, list_cases
from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SCHEMES, SEQUENCES, LabelScheme
from fediod_med.review.roots import Roots, read_json

_SEG, _STATS = "_seg.nii.gz", "_stats.json"
_NIFTI_CHANNELS = {"T1c": 2, "T1": 1, "T2": 3, "FLAIR": 0}  # the one 4-D layout that is read, Task01 of the MSD


@dataclass(frozen=True)
class ImageFile:
    """Where a sequence lies: a file, and the channel of a 4-D one."""

    path: Path
    channel: int | None = None


@dataclass(frozen=True)
class LabelMapFile:
    """A label map and the scheme of its values."""

    path: Path
    scheme: LabelScheme


@dataclass(frozen=True)
class Case:
    """One case of a segmented folder.

    Attributes:
        case_id: study code.
        status: `done`, `failed`, or `unrecorded` (files without a record, as in a demo).
        reason: why it failed, or empty.
        findings: of the input checks, each with `code`, `severity`, `message`, `fix` and so on.
        notes: of the segmentation.
        quality: predicted mean Dice, 0 to 1.
        quality_detail: what it rests on, with its interval.
        disagreement: mean disagreement of the teachers in the tumour (nats).
        volumes_ml: millilitres by class and region.
        statistics: `<case>_stats.json`.
        label_map: the segmentation.
        images: file by sequence.
        files: further files by kind (`preview`, `entropy`, `disagreement`, `probabilities`, `report`).
        reference: an expert's label map.
        others: label maps of other models, by name.
        outputs_sha256: hash by file name, from the record.
        inputs_sha256: hash by file name, from the record.
        absent: why a part is missing, by name.
    """

    case_id: str
    status: str
    reason: str
    findings: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    quality: float | None
    quality_detail: Mapping[str, Any] | None
    disagreement: float | None
    volumes_ml: Mapping[str, float] | None
    statistics: Mapping[str, Any] | None
    label_map: LabelMapFile | None
    images: Mapping[str, ImageFile]
    files: Mapping[str, Path]
    reference: LabelMapFile | None
    others: Mapping[str, LabelMapFile]
    outputs_sha256: Mapping[str, str]
    inputs_sha256: Mapping[str, str]
    absent: Mapping[str, str]

    def why(self, part: str) -> str:
        """Why a part is not there, for people; empty when it is."""
        return self.absent.get(part, "")

    def label_maps(self, own: str = "model") -> dict[str, LabelMapFile]:
        """Every label map of the case: the segmentation (under `own`), the other models, the reference."""
        found = {own: self.label_map, **self.others, "reference": self.reference}
        return {name: file for name, file in found.items() if file is not None}


@dataclass(frozen=True)
class CaseFolder:
    """Segmented cases.

    Attributes:
        path: the folder.
        name: as shown, and as the `run` of its reviews.
        cases: by id, sorted.
        banner: what the model may be trusted with.
        record: `run.json`, or none.
        absent: why a part is missing, by name.
    """

    path: Path
    name: str
    cases: Mapping[str, Case]
    banner: str
    record: Mapping[str, Any] | None
    absent: Mapping[str, str]


def read_cases(
    folder: Path,
    roots: Roots,
    *,
    images: Path | None = None,
    references: Path | None = None,
    models: Mapping[str, Path] | None = None,
    scheme: LabelScheme | None = None,
    reference_scheme: LabelScheme | None = None,
) -> CaseFolder:
    """Read a folder of segmented cases; a case that is damaged does not hide the others.

    Args:
        folder: inside the roots.
        roots: where files may lie.
        images: folder of case folders, for scans that no record names; `unseen` beside the folder when omitted.
        references: folder with experts' label maps, as case folders or as `<case>_seg.nii.gz`; `images` when omitted.
        models: folders of `<case>_seg.nii.gz` by other models, by name.
        scheme: of label maps whose statistics do not tell it.
        reference_scheme: of the references; the scheme of the segmentation when omitted.

    Raises:
        InputError: no such folder.
        SettingsError: a folder outside the roots.
    """
    folder = roots.folder(folder)
    absent: dict[str, str] = {}
    record = _read(folder, "run.json", absent, "record")
    images = images or scans_beside(folder)
    scans = _subjects(None if images is None else roots.folder(images), absent)
    expert = _reference_files(None if references is None else roots.folder(references), scans, absent)
    elsewhere = {name: roots.folder(path) for name, path in (models or {}).items()}
    cases = {}
    for case_id in _case_ids(folder):
        cases[case_id] = _case(case_id, folder, roots, scans.get(case_id), expert, elsewhere, scheme, reference_scheme)
    return CaseFolder(
        path=folder,
        name=roots.name_of(folder),
        cases=cases,
        banner=_banner(record, cases),
        record=record,
        absent=absent,
    )


def scans_beside(folder: Path) -> Path | None:
    """The folder of scans that a demo leaves beside its segmented cases; none elsewhere."""
    return folder.parent / "unseen" if (folder.parent / "unseen").is_dir() else None


def _case_ids(folder: Path) -> list[str]:
    recorded = {path.stem for path in (folder / "records").glob("*.json") if not path.name.startswith(".")}
    loose = {path.name.removesuffix(_SEG) for path in folder.glob(f"*{_SEG}") if not path.name.startswith(".")}
    return sorted(recorded | loose)


def _case(
    case_id: str,
    folder: Path,
    roots: Roots,
    scan: Subject | None,
    expert: Mapping[str, Path],
    elsewhere: Mapping[str, Path],
    scheme: LabelScheme | None,
    reference_scheme: LabelScheme | None,
) -> Case:
    absent: dict[str, str] = {}
    record = _read(folder, f"records/{case_id}.json", absent, "record") or {}
    statistics = _read(folder, f"{case_id}{_STATS}", absent, "statistics")
    stated = SCHEMES.get(str((statistics or {}).get("label_scheme", "")), scheme)
    path = folder / f"{case_id}{_SEG}"
    label_map = None
    if record.get("status") == "failed":
        absent["label_map"] = str(record.get("reason", "the case failed"))
    elif not path.is_file():
        absent["label_map"] = f"{path.name}: not there"
    elif stated is None:
        absent["label_map"] = f"{path.name}: no statistics tell its label scheme; state it"
    else:
        label_map = _label_map(path, stated, roots, absent, "label_map")
    quality = record.get("quality")
    quality = quality if isinstance(quality, dict) else (statistics or {}).get("quality")
    volumes = record.get("volumes_ml") or (statistics or {}).get("volumes_ml")
    inputs = record.get("inputs")
    return Case(
        case_id=case_id,
        status=str(record.get("status", "unrecorded")),
        reason=str(record.get("reason", "")),
        findings=tuple(found for found in _list(record.get("findings")) if isinstance(found, dict)),
        notes=tuple(str(note) for note in _list(record.get("notes"))),
        quality=_fraction(quality),
        quality_detail=quality if isinstance(quality, dict) else None,
        disagreement=_disagreement(quality),
        volumes_ml=volumes if isinstance(volumes, dict) else None,
        statistics=statistics,
        label_map=label_map,
        images=_images(inputs if isinstance(inputs, dict) else {}, scan, roots, absent),
        files=_files(case_id, folder, roots, record),
        reference=_reference(expert.get(case_id), reference_scheme or stated, roots, absent),
        others=_others(case_id, elsewhere, stated, roots),
        outputs_sha256=_hashes(record.get("outputs")),
        inputs_sha256={Path(name).name: value for name, value in _hashes(inputs).items()},
        absent=absent,
    )


def _images(
    inputs: Mapping[str, Any], scan: Subject | None, roots: Roots, absent: dict[str, str]
) -> dict[str, ImageFile]:
    """The scan's files: those that the record names, else those found in the folder of images."""
    paths = [Path(name) for name in inputs]
    if len(paths) == len(SEQUENCES):  # the record lists them in the usual order
        named = {sequence: ImageFile(path) for sequence, path in zip(SEQUENCES, paths, strict=True)}
    elif len(paths) == 1 and paths[0].suffix:
        named = {sequence: ImageFile(paths[0], _NIFTI_CHANNELS[sequence]) for sequence in SEQUENCES}
    elif scan is not None:
        channels = scan.channels or {}
        named = {sequence: ImageFile(scan.images[sequence], channels.get(sequence)) for sequence in SEQUENCES}
    else:
        absent["images"] = (
            "the case was read from DICOM, which this viewer does not draw; segment NIfTI files to see the scan"
            if paths
            else "no record names the scan; choose the folder of images"
        )
        return {}
    found: dict[str, ImageFile] = {}
    for sequence, image in named.items():
        try:
            found[sequence] = ImageFile(roots.file(image.path), image.channel)
        except SettingsError:
            absent["images"] = "the scan lies outside the chosen folders; start the app with its folder as well"
        except InputError:
            absent["images"] = f"{image.path.name}: not there any more"
    return found


def _files(case_id: str, folder: Path, roots: Roots, record: Mapping[str, Any]) -> dict[str, Path]:
    endings = {
        "preview": "_preview.png",
        "entropy": "_entropy.nii.gz",
        "disagreement": "_disagreement.nii.gz",
        "probabilities": "_probabilities.nii.gz",
        "report": "_report.html",
    }
    found = {kind: folder / f"{case_id}{ending}" for kind, ending in endings.items()}
    kinds = record.get("kinds")
    for kind, name in (kinds if isinstance(kinds, dict) else {}).items():
        if kind not in ("segmentation", "statistics"):
            found.setdefault(str(kind), folder / str(name))
    return {kind: path.resolve() for kind, path in found.items() if roots.contains(path) and path.is_file()}


def _others(
    case_id: str, elsewhere: Mapping[str, Path], scheme: LabelScheme | None, roots: Roots
) -> dict[str, LabelMapFile]:
    found: dict[str, LabelMapFile] = {}
    for name, folder in elsewhere.items():
        path = folder / f"{case_id}{_SEG}"
        told = _read(folder, f"{case_id}{_STATS}", {}, "") or {}
        stated = SCHEMES.get(str(told.get("label_scheme", "")), scheme)
        if stated is not None and path.is_file() and roots.contains(path):
            found[name] = LabelMapFile(roots.file(path), stated)
    return found


def _subjects(folder: Path | None, absent: dict[str, str]) -> dict[str, Subject]:
    if folder is None:
        return {}
    try:
        subjects, problems = list_cases(folder)
    except InputError as error:
        absent["images"] = str(error)
        return {}
    if problems:
        absent["images"] = "; ".join(f"{case}: {problem}" for case, problem in sorted(problems.items())[:3])
    return {subject.subject_id: subject for subject in subjects}


def _reference_files(folder: Path | None, scans: Mapping[str, Subject], absent: dict[str, str]) -> dict[str, Path]:
    """Experts' label maps by case: those beside the scans, then those of the folder."""
    found = {case: subject.label for case, subject in scans.items() if subject.label is not None}
    if folder is None:
        return found
    beside = {case: subject.label for case, subject in _subjects(folder, {}).items() if subject.label is not None}
    loose = {path.name.removesuffix(_SEG): path for path in sorted(folder.glob(f"*{_SEG}"))}
    if not (beside or loose):
        absent["references"] = f"{folder.name}: no case folder with a label map and no <case>{_SEG}"
    return found | beside | loose


def _reference(
    path: Path | None, scheme: LabelScheme | None, roots: Roots, absent: dict[str, str]
) -> LabelMapFile | None:
    if path is None:
        absent["reference"] = "no expert's label map was found for this case"
    elif scheme is None:
        absent["reference"] = f"{path.name}: state its label scheme"
    else:
        return _label_map(path, scheme, roots, absent, "reference")
    return None


def _label_map(path: Path, scheme: LabelScheme, roots: Roots, absent: dict[str, str], part: str) -> LabelMapFile | None:
    try:
        return LabelMapFile(roots.file(path), scheme)
    except (SettingsError, InputError) as error:
        absent[part] = str(error)
        return None


def _banner(record: Mapping[str, Any] | None, cases: Mapping[str, Case]) -> str:
    stated = (record or {}).get("privacy")
    if isinstance(stated, str) and stated:
        return stated
    models = [(case.statistics or {}).get("model") for case in cases.values()]
    told = {str(model["privacy_banner"]) for model in models if isinstance(model, dict) and model.get("privacy_banner")}
    # several models, or none that says: the weakest promise is none
    return told.pop() if len(told) == 1 else "NOT PRIVATE: the model does not say on which terms it was made"


def _read(folder: Path, name: str, absent: dict[str, str], part: str) -> Mapping[str, Any] | None:
    path = folder / name
    try:
        content = read_json(path, within=folder)
    except InputError as error:
        absent[part] = str(error)
        return None
    if not isinstance(content, dict):
        absent[part] = f"{path.name}: expected an object, found {type(content).__name__}"
        return None
    return content


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _hashes(value: Any) -> dict[str, str]:
    return {str(name): str(digest) for name, digest in value.items()} if isinstance(value, dict) else {}


def _fraction(quality: Any) -> float | None:
    value = quality.get("value") if isinstance(quality, dict) else quality
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 else None


def _disagreement(quality: Any) -> float | None:
    """Mean disagreement of the teachers, from what a quality score shows beside."""
    beside = quality.get("beside") if isinstance(quality, dict) else None
    for name, value in (beside if isinstance(beside, dict) else {}).items():
        if "disagreement" in name and isinstance(value, int | float):
            return float(value)
    return None
