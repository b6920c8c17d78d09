"""Open question (c): how rounds, bytes and the student grow with the number of hospitals, and with their unlikeness.

K hospitals share a fixed number of phantom patients, or each adds as many as the others (on average). Patients are
grouped by scanner profile and tumour size and spread by Dirichlet(alpha) (`data.partitions`); a partition that no draw
fills is recorded as impossible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fediod_med.data.layouts import Subject
from fediod_med.data.partitions import dirichlet
from fediod_med.data.phantoms import Anatomy, hospital_profiles
from fediod_med.distillation.settings import GeneratorObjective
from fediod_med.errors import SettingsError
from fediod_med.experiments.backbones import FULL, SMOKE
from fediod_med.experiments.phantom_hospitals import (
    Cohort,
    PhantomHospital,
    Setup,
    dice_record,
    distilled,
    ensemble_dice,
    held_out_patients,
    network_dice,
    patients,
    public_sampler,
    trained_teacher,
    working_anatomy,
)
from fediod_med.experiments.rows import Task, compute_rows, interval, markdown_table, open_folder, write_results
from fediod_med.progress import Progress

SHARE = 0.95  # of the ensemble's Dice: how far the student must come for `rounds`
TUMOUR = 4  # first tumour tissue in `phantoms.TISSUES`


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        setup: sizes.
        hospitals: numbers of hospitals.
        alphas: of the Dirichlet distribution.
        total: patients in all, where the total is fixed.
        each: patients per hospital on average, where that is fixed.
        every: rounds between scores of the student.
        seed: of everything.
    """

    setup: Setup
    hospitals: tuple[int, ...]
    alphas: tuple[float, ...]
    total: int
    each: int
    every: int
    seed: int = 0

    def cells(self) -> list[tuple[int, int, float]]:
        """Hospitals, patients in all and alpha of each row; a cell that both rules give appears once."""
        sizes = [(k, total) for k in self.hospitals for total in (self.total, self.each * k)]
        return [(k, total, alpha) for k, total in dict.fromkeys(sizes) for alpha in self.alphas]


PLANS: Mapping[str, Plan] = {
    "full": Plan(
        replace(FULL, teacher_steps=100, public=32, tests=10, schedule=replace(FULL.schedule, rounds=48)),
        hospitals=(2, 4, 10, 20),
        alphas=(0.1, 1.0, 100.0),
        total=80,
        each=4,
        every=4,
    ),
    "smoke": Plan(SMOKE, hospitals=(2, 3), alphas=(1.0,), total=4, each=2, every=1),
}


def run_scaling(out: Path, profile: str, *, resume: bool, progress: Progress) -> str:
    """Run every cell; arguments, result and errors as `backbones.run_backbones`."""
    plan = PLANS[profile]
    open_folder(out, {"experiment": "scaling", **asdict(plan)}, resume=resume)
    anatomy = working_anatomy(plan.setup)
    tasks = [
        Task(f"hospitals-{k}-patients-{total}-alpha-{alpha:g}", partial(_row, out, plan, k, total, alpha, anatomy))
        for k, total, alpha in plan.cells()
    ]
    rows = compute_rows(out, tasks, progress=progress)
    table = _table(list(rows.values()), plan)
    summary = {"share": SHARE, "rounds_at_most": plan.setup.schedule.rounds}
    write_results(out, experiment="scaling", data="phantoms", rows=rows, table=table, summary=summary)
    return table


def cohort_of(total: int, *, seed: int, anatomy: Anatomy) -> Cohort:
    """`total` patients of the five scanner profiles in turn; a larger cohort has the smaller one's patients too."""
    profiles = len(hospital_profiles())
    return patients([(total + profiles - 1 - i) // profiles for i in range(profiles)], seed=seed, anatomy=anatomy)


def groups_of(cohort: Cohort) -> list[tuple[str, int]]:
    """Scanner profile and third of the tumour size (0 small, 2 large) of each patient."""
    sizes = (cohort.tissues.flatten(1) >= TUMOUR).sum(dim=1).numpy()
    thirds = np.searchsorted(np.quantile(sizes, [1 / 3, 2 / 3]), sizes, side="right")
    return [(name, int(third)) for name, third in zip(cohort.profiles, thirds, strict=True)]


def split_patients(cohort: Cohort, *, hospitals: int, alpha: float, seed: int) -> dict[str, list[int]]:
    """Indices of the patients of each hospital; `SettingsError` where no draw gives every hospital a patient."""
    subjects = [Subject(f"phantom-{i:04d}", {}) for i in range(len(cohort.profiles))]
    parts = dirichlet(subjects, groups_of(cohort), alpha, hospitals, seed)
    return {name: [int(s.subject_id.removeprefix("phantom-")) for s in part] for name, part in parts.items()}


def rounds_to(curve: Sequence[tuple[int, float]], goal: float) -> int | None:
    """First scored round at which the student has reached `goal`, or none."""
    return next((number for number, score in curve if score >= goal), None)


def _row(out: Path, plan: Plan, count: int, total: int, alpha: float, anatomy: Anatomy) -> dict[str, Any]:
    setup, seed = plan.setup, plan.seed
    cohort = cohort_of(total, seed=seed, anatomy=anatomy)
    place = {"hospitals": count, "patients": total, "alpha": alpha, "seed": seed}
    try:
        parts = split_patients(cohort, hospitals=count, alpha=alpha, seed=seed)
    except SettingsError as error:
        return {**place, "impossible": str(error)}
    hospitals = [
        PhantomHospital(
            name,
            cohort.part(index),
            trained_teacher(
                cohort.part(index),
                setup,
                backbone="unet",
                seed=seed * 100 + number,
                keep=out / "teachers" / f"{count}-{total}-{alpha:g}" / f"{name}.pt",
            ),
        )
        for number, (name, index) in enumerate(parts.items())
    ]
    tests = held_out_patients(setup.tests, seed=seed, anatomy=anatomy)
    ensemble = dice_record(ensemble_dice(hospitals, tests))
    curve: list[tuple[int, float]] = []

    def follow(number: int, student: nn.Module) -> None:
        if number % plan.every == 0:
            curve.append((number, float(network_dice(student, tests).mean())))
            student.train()

    outcome = distilled(
        hospitals,
        public_sampler(setup, seed=seed, anatomy=anatomy),
        setup,
        objective=GeneratorObjective(),
        seed=seed,
        state_dir=out / "site_state",
        on_round=follow,
    )
    alone = [float(network_dice(h.teacher, tests).mean()) for h in hospitals]
    up = list(outcome.bytes_up.values())
    return {
        **place,
        "sizes": [len(index) for index in parts.values()],
        "student": dice_record(network_dice(outcome.student, tests)),
        "ensemble": ensemble,
        "teachers": {"mean": sum(alone) / count, "best": max(alone), "worst": min(alone)},
        "curve": curve,
        "rounds": rounds_to(curve, SHARE * ensemble["mean"]),
        "bytes_up_site": sum(up) / count,
        "bytes_up_total": sum(up),
    }


def _table(rows: Sequence[Mapping[str, Any]], plan: Plan) -> str:
    body = []
    for row in rows:
        place = [str(row["hospitals"]), str(row["patients"]), f"{row['alpha']:g}"]
        if "impossible" in row:
            body.append([*place, "impossible", "", "", "", "", "", ""])
            continue
        student, rounds = row["student"], row["rounds"]
        low, high = interval(np.array([student["cases"]]))
        body.append(
            [
                *place,
                f"{min(row['sizes'])} to {max(row['sizes'])}",
                f"{row['teachers']['mean']:.3f}",
                f"{row['ensemble']['mean']:.3f}",
                f"{student['mean']:.3f} ({low:.3f} to {high:.3f})",
                f"over {plan.setup.schedule.rounds}" if rounds is None else str(rounds),
                f"{row['bytes_up_site'] / 1e6:.1f}",
                f"{row['bytes_up_total'] / 1e6:.0f}",
            ]
        )
    head = (
        "hospitals",
        "patients",
        "alpha",
        "a hospital's patients",
        "teachers",
        "ensemble",
        "student (95 % interval)",
        f"rounds to {SHARE:.0%} of the ensemble",
        "MB up a site",
        "MB up in all",
    )
    note = f"Mean phantom Dice, one seed; the student in training is scored every {plan.every} rounds."
    return f"{markdown_table(head, body)}\n\n{note} Intervals: bootstrap over test phantoms."
