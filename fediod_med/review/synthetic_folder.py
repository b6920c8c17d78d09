"""The synthetic volumes that a run kept, with the answers to them, and the measures of their quality, read only.

Layout: `synthetic/<name>.nii.gz` at the end of a run and `synthetic/round-000030/<name>.nii.gz` during it, each with
`<name>_labels`, `_phantom`, `_teacher-<site>`, `_ensemble` and `_student` beside it as far as the run kept them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fediod_med.errors import InputError
from fediod_med.review.roots import lies_in, read_json

_NIFTI = ".nii.gz"
_ROUND = re.compile(r"round[-_]?(\d+)")
_LABELS, _PHANTOM, _TEACHER = "_labels", "_phantom", "_teacher-"


@dataclass(frozen=True)
class SyntheticVolume:
    """One volume that the generator made.

    Attributes:
        name: file name without ending.
        path: `(x, y, z, 4)` NIfTI, sequences in the usual order.
        round: when it was made; none for those of the end of the run.
        label_map: `<name>_labels.nii.gz`, the class map (0 to 3) that it was made from.
        phantom: `<name>_phantom.nii.gz`, the public phantom that it started from, like `path`.
        answers: class map by site, from `<name>_teacher-<site>.nii.gz`; empty where the run kept none.
        others: further class maps, such as `student` and `ensemble`, from `<name>_<what>.nii.gz`.
    """

    name: str
    path: Path
    round: int | None
    label_map: Path | None
    phantom: Path | None
    answers: Mapping[str, Path]
    others: Mapping[str, Path]

    @property
    def key(self) -> str:
        """Name that tells it from volumes of other rounds: `round-000030/synthetic-00`, or the name alone."""
        return self.name if self.round is None else f"round-{self.round:06d}/{self.name}"


def synthetic_volumes(folder: Path) -> tuple[SyntheticVolume, ...]:
    """Every synthetic volume below a folder, those of a round first, by round and name.

    Raises:
        InputError: there is none.
    """
    files = {path: path.name.removesuffix(_NIFTI) for path in sorted(folder.rglob(f"*{_NIFTI}"))}
    files = {path: name for path, name in files.items() if not name.startswith(".") and lies_in(path, folder)}
    volumes = []
    for path, name in files.items():
        beside = {p: n for p, n in files.items() if p.parent == path.parent and p != path}
        if any(name.startswith(f"{other}_") for other in beside.values()):
            continue  # belongs to another file
        extra = {n.removeprefix(name): p for p, n in beside.items() if n.startswith(f"{name}_")}
        found = _ROUND.search(path.relative_to(folder).as_posix())
        volumes.append(
            SyntheticVolume(
                name=name,
                path=path,
                round=int(found[1]) if found else None,
                label_map=extra.pop(_LABELS, None),
                phantom=extra.pop(_PHANTOM, None),
                answers={k.removeprefix(_TEACHER): p for k, p in sorted(extra.items()) if k.startswith(_TEACHER)},
                others={k[1:]: p for k, p in sorted(extra.items()) if not k.startswith(_TEACHER)},
            )
        )
    if not volumes:
        raise InputError("synthetic: the run kept no synthetic volume")
    return tuple(sorted(volumes, key=lambda v: (v.round is None, v.round or 0, v.name)))


def synthetic_quality(folder: Path) -> Mapping[str, Any]:
    """Content of `quality.json`.

    Raises:
        InputError: the run measured none, or the file is damaged.
    """
    path = folder / "quality.json"
    if not path.is_file():
        raise InputError("the run did not measure how good its synthetic volumes are (no synthetic/quality.json)")
    content = read_json(path, within=folder)
    if not isinstance(content, dict):
        raise InputError(f"quality.json: expected an object, found {type(content).__name__}")
    return content


def missing_words(volume: SyntheticVolume, rounds: Sequence[int | None]) -> list[str]:
    """What the run did not keep beside a volume, in sentences.

    Args:
        volume: that is shown.
        rounds: all of which the run kept volumes; `None` stands for the end of the run.
    """
    words = []
    if not any(number is not None for number in rounds):
        words.append("The run kept no volume of a round, only those of its end.")
    kept = {
        "the answers of single hospitals": bool(volume.answers),
        "the ensemble's answer": "ensemble" in volume.others,
        "the student's answer": "student" in volume.others,
        "the phantom it started from": volume.phantom is not None,
    }
    absent = [what for what, there in kept.items() if not there]
    if absent:
        words.append(f"Not kept with this volume: {', '.join(absent)}.")
    return words


def quality_rows(quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per measured number: against which reference, of which measure, its value.

    Measures against the centre's reference come first, then those that a hospital took against its own scans; what was
    not measured has no value and says why.
    """
    rows = _numbers(quality.get("measures"), str(quality.get("reference", "public phantoms")))
    per_site = quality.get("per_site")
    for site, found in (per_site if isinstance(per_site, dict) else {"hospitals' own scans": per_site}).items():
        rows += _numbers(found, f"scans of {site}" if isinstance(per_site, dict) else site)
    return rows


def nearest_of(quality: Mapping[str, Any] | None, volume: SyntheticVolume) -> list[dict[str, Any]]:
    """What was measured about the public phantom nearest to one volume; empty where nothing was."""
    found = (quality or {}).get("nearest")
    entry = found.get(volume.key) if isinstance(found, dict) else None
    return _numbers(entry, "nearest public phantom")


def _numbers(found: Any, against: str, name: str = "") -> list[dict[str, Any]]:
    """Numbers of a nested object by the path to them; text instead of a number is the reason why there is none."""
    if isinstance(found, dict):
        return [row for key, value in found.items() for row in _numbers(value, against, f"{name} {key}".strip())]
    row = {"against": against, "measure": name.replace("_", " ") or "all", "value": None, "note": ""}
    if isinstance(found, bool) or not isinstance(found, int | float):
        return [row | {"note": str(found)}] if isinstance(found, str) and found else []
    return [row | {"value": float(found)}]
