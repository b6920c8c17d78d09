"""Open question (a): teachers of one backbone or of three, with the generator or on phantoms alone.

A two-by-two design with equal rounds and student updates, `{same, mixed} x {full, output-only}`. `full` asks about the
generator's volumes in half of the rounds, so discriminators and pull-backs take part; `output-only` asks about public
phantoms and needs the teachers' outputs alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.data.phantoms import Anatomy
from fediod_med.distillation.settings import GeneratorObjective, Schedule
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
from fediod_med.experiments.rows import (
    Task,
    compute_rows,
    interval,
    markdown_table,
    open_folder,
    ratio_interval,
    span,
    write_results,
)
from fediod_med.progress import Progress

BACKBONES: Mapping[str, tuple[str, ...]] = {
    "same": ("unet", "unet", "unet"),
    "mixed": ("unet", "segresnet", "dynunet"),
}
ASKED: Mapping[str, GeneratorObjective | None] = {"full": GeneratorObjective(), "output-only": None}
SHORT = Schedule(
    rounds=160,
    student_steps=4,
    student_rate=3e-3,
    generator_rate=5e-4,
    replay=80,
    ema=0.98,
    rehearsal=0.0,
    checkpoint_every=1000,
)
FULL = Setup(spacing=4.0, roi=32, width=8, depth=3, teacher_steps=400, rate=3e-3, public=48, tests=40, schedule=SHORT)
SMOKE = replace(
    FULL,
    spacing=8.0,
    roi=16,
    teacher_steps=2,
    public=2,
    tests=2,
    schedule=replace(SHORT, rounds=2, student_steps=1, batch=1, student_batch=1),
)


@dataclass(frozen=True)
class Plan:
    """What is run: sizes, seeds and patients of each hospital."""

    setup: Setup
    seeds: tuple[int, ...]
    patients: int


PLANS: Mapping[str, Plan] = {"full": Plan(FULL, (0, 1, 2), 8), "smoke": Plan(SMOKE, (0,), 1)}


def run_backbones(out: Path, profile: str, *, resume: bool, progress: Progress) -> str:
    """Run the design; a row is one of its cells with one seed.

    Args:
        out: folder.
        profile: name in `PLANS`.
        resume: go on with the rows that are there.
        progress: receives each row.

    Returns:
        The table, which also lies in `table.md`.

    Raises:
        SettingsError: the folder holds something else.
    """
    plan = PLANS[profile]
    open_folder(out, {"experiment": "backbones", **asdict(plan)}, resume=resume)
    anatomy = working_anatomy(plan.setup)
    tasks = [
        Task(f"{backbones}-{asked}-seed-{seed}", partial(_row, out, plan, backbones, asked, seed, anatomy))
        for seed in plan.seeds
        for backbones in BACKBONES
        for asked in ASKED
    ]
    rows = compute_rows(out, tasks, progress=progress)
    summary = summarise(list(rows.values()))
    table = _table(summary)
    write_results(out, experiment="backbones", data="phantoms", rows=rows, table=table, summary=summary)
    return table


def three_hospitals(
    out: Path, setup: Setup, backbones: Sequence[str], *, count: int, seed: int, anatomy: Anatomy
) -> list[PhantomHospital]:
    """Three hospitals of unlike scanners, `count` patients each, their teachers trained or read from `out/teachers`.

    The first hospitals of `phantoms.hospital_profiles()`; a hospital has the same patients whatever the backbone.
    """
    everyone = patients([count] * len(backbones), seed=seed, anatomy=anatomy)
    hospitals = []
    for number, backbone in enumerate(backbones):
        own = everyone.part(range(number * count, (number + 1) * count))
        name = own.profiles[0]
        teacher = trained_teacher(
            own,
            setup,
            backbone=backbone,
            seed=seed * 100 + number,
            keep=out / "teachers" / f"{name}-{backbone}-seed-{seed}.pt",
        )
        hospitals.append(PhantomHospital(name, own, teacher))
    return hospitals


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cells of the design over seeds, and what the input-space part adds for each kind of backbones.

    Args:
        rows: with `backbones`, `asked`, `seed`, `student` and `ensemble` (`dice_record`), `bytes_up`.

    Returns:
        `cells`: by `same, full` and so on: `student`, `ensemble`, `ratio` (one per seed), `ratio_interval`, `bytes_up`.
        `full_minus_output_only`: by kind of backbones the mean difference of the student's Dice, and its `interval`.
    """
    cells: dict[str, Any] = {}
    cases: dict[tuple[str, str], np.ndarray] = {}
    for backbones in BACKBONES:
        for asked in ASKED:
            found = sorted(
                (r for r in rows if (r["backbones"], r["asked"]) == (backbones, asked)), key=lambda r: int(r["seed"])
            )
            student, ensemble = (np.array([r[name]["cases"] for r in found]) for name in ("student", "ensemble"))
            cases[backbones, asked] = student
            cells[f"{backbones}, {asked}"] = {
                "student": student.mean(axis=1).tolist(),
                "ensemble": ensemble.mean(axis=1).tolist(),
                "ratio": (student.mean(axis=1) / np.maximum(ensemble.mean(axis=1), 1e-9)).tolist(),
                "ratio_interval": ratio_interval(student, ensemble),
                "bytes_up": [r["bytes_up"] for r in found],
            }
    differences = {name: cases[name, "full"] - cases[name, "output-only"] for name in BACKBONES}
    return {
        "cells": cells,
        "full_minus_output_only": {
            name: {"mean": float(values.mean()), "interval": interval(values), "seeds": values.mean(axis=1).tolist()}
            for name, values in differences.items()
        },
    }


def _row(out: Path, plan: Plan, backbones: str, asked: str, seed: int, anatomy: Anatomy) -> dict[str, Any]:
    setup = plan.setup
    hospitals = three_hospitals(out, setup, BACKBONES[backbones], count=plan.patients, seed=seed, anatomy=anatomy)
    tests: Cohort = held_out_patients(setup.tests, seed=seed, anatomy=anatomy)
    outcome = distilled(
        hospitals,
        public_sampler(setup, seed=seed, anatomy=anatomy),
        setup,
        objective=ASKED[asked],
        seed=seed,
        state_dir=out / "site_state",
    )
    return {
        "backbones": backbones,
        "asked": asked,
        "seed": seed,
        "student": dice_record(network_dice(outcome.student, tests)),
        "ensemble": dice_record(ensemble_dice(hospitals, tests)),
        "teachers": {h.name: dice_record(network_dice(h.teacher, tests))["mean"] for h in hospitals},
        "bytes_up": sum(outcome.bytes_up.values()) / len(hospitals),
    }


def _table(summary: Mapping[str, Any]) -> str:
    body = []
    for name, cell in summary["cells"].items():
        ratio = sum(cell["ratio"]) / len(cell["ratio"])
        low, high = cell["ratio_interval"]
        sent = sum(cell["bytes_up"]) / len(cell["bytes_up"]) / 1e6
        body.append(
            [
                name,
                span(cell["ensemble"]),
                span(cell["student"]),
                f"{ratio:.3f} ({low:.3f} to {high:.3f})",
                f"{sent:.0f}",
            ]
        )
    head = ("backbones, asked", "ensemble Dice", "student Dice", "student / ensemble (95 % interval)", "MB up a site")
    lines = [
        f"- {name} backbones, full minus output-only: {d['mean']:+.3f} ({d['interval'][0]:+.3f} to "
        f"{d['interval'][1]:+.3f})"
        for name, d in summary["full_minus_output_only"].items()
    ]
    seeds = len(next(iter(summary["cells"].values()))["student"])
    note = f"Mean phantom Dice of {seeds} seed(s) (lowest to highest); intervals: bootstrap over test phantoms."
    return f"{markdown_table(head, body)}\n\n" + "\n".join(lines) + f"\n\n{note}"
