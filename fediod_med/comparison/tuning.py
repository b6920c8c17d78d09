"""Tuning of FedAvg and FedProx on validation patients, who are training patients of the cell, never test patients.

Each fold is tuned on its own training patients with the first seed, so that no fold's choice has seen its test part.
All candidates have the same local compute.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fediod_med.comparison.averaging import AveragingPlan
from fediod_med.comparison.cells import Cell
from fediod_med.comparison.profiles import Profile
from fediod_med.data.layouts import Subject
from fediod_med.data.partitions import by_patient, split_fold
from fediod_med.errors import InputError
from fediod_med.records import write_json
from fediod_med.sites import Site

VALIDATION_FOLDS = 3


def candidate_names(profile: Profile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of FedAvg's candidates and of FedProx's, such as `fedavg-2` and `fedprox-1`."""
    return (
        tuple(f"fedavg-{number}" for number in range(len(profile.candidates))),
        tuple(f"fedprox-{number}" for number in range(len(profile.mus))),
    )


def candidate_plan(out: Path, cell: Cell, profile: Profile, name: str) -> AveragingPlan:
    """The setting behind a candidate's name; FedProx's candidates take over FedAvg's tuned setting."""
    number = int(name.rpartition("-")[2])
    if name.startswith("fedavg-"):
        return profile.candidates[number]
    chosen = tuned_plan(out, cell, profile, "fedavg_tuned")
    return dataclasses.replace(chosen, mu=profile.mus[number])


def tuned_plan(out: Path, cell: Cell, profile: Profile, row: str) -> AveragingPlan:
    """The candidate with the highest validation Dice; the first of equals.

    Raises:
        InputError: a candidate has not been scored.
    """
    fedavg, fedprox = candidate_names(profile)
    found = [_read(out, cell, name) for name in (fedavg if row.startswith("fedavg") else fedprox)]
    best = max(found, key=lambda record: float(record["validation_dice"]))
    return AveragingPlan(**best["plan"])


def record_candidate(
    out: Path, cell: Cell, name: str, plan: AveragingPlan, *, dice: float, patients: int, seconds: float
) -> None:
    """Write a candidate's validation score."""
    content = {
        "candidate": name,
        "fold": cell.fold,
        "seed": cell.seed,
        "plan": dataclasses.asdict(plan),
        "validation_dice": dice,
        "validation_patients": patients,
        "seconds": round(seconds, 1),
    }
    write_json(_path(out, cell, name), content)


def is_tuned(out: Path, cell: Cell, name: str) -> bool:
    """Whether a candidate has been scored."""
    return _path(out, cell, name).is_file()


def tuning_record(out: Path, cells: Sequence[Cell], profile: Profile) -> list[dict[str, Any]]:
    """Every candidate that has been scored, for `results.json`."""
    names = [name for group in candidate_names(profile) for name in group]
    return [_read(out, cell, name) for cell in cells for name in names if is_tuned(out, cell, name)]


def validation_split(site: Site) -> tuple[tuple[Subject, ...], tuple[Subject, ...]]:
    """A hospital's training subjects of a cell, cut into a part to train on and validation patients.

    A hospital with a single training patient has nobody to validate on.
    """
    train = site.subjects()[0]
    patients = len(by_patient(train))
    if patients < 2:
        return train, ()
    return split_fold(train, folds=min(VALIDATION_FOLDS, patients), fold=0)


def validation_parts(sites: Sequence[Site]) -> list[tuple[Site, tuple[Subject, ...], tuple[Subject, ...]]]:
    """Each hospital with its two parts, see `validation_split`.

    Raises:
        InputError: no hospital has a patient to validate on.
    """
    parts = [(site, *validation_split(site)) for site in sites]
    if not any(validation for _, _, validation in parts):
        raise InputError("tuning: expected a hospital with two or more training patients, found none; use fewer folds")
    return parts


def _path(out: Path, cell: Cell, name: str) -> Path:
    return out / "tuning" / f"{cell.name}-{name}.json"


def _read(out: Path, cell: Cell, name: str) -> dict[str, Any]:
    path = _path(out, cell, name)
    if not path.is_file():
        raise InputError(f"{path}: expected the validation score of a candidate, found nothing; resume the comparison")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
