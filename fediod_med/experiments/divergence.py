"""Open question (b): what the generator should do with the teachers' disagreement, and whether disagreement helps.

Rows: the Jensen-Shannon divergence maximised, minimised and left out; mutual information of hospital and label (the
same number, so the same row: a check); mean pairwise KL and feature contrast, maximised. Each weight is scaled so that
its term has the same size on public phantoms before training as the Jensen-Shannon term has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from fediod_med.data.phantoms import Anatomy
from fediod_med.distillation.settings import GeneratorObjective
from fediod_med.experiments.backbones import BACKBONES, FULL, SMOKE, three_hospitals
from fediod_med.experiments.phantom_hospitals import (
    Setup,
    dice_record,
    disagreement,
    distilled,
    ensemble_dice,
    held_out_patients,
    network_dice,
    public_divergences,
    public_sampler,
    working_anatomy,
)
from fediod_med.experiments.rows import (
    Task,
    compute_rows,
    interval,
    markdown_table,
    open_folder,
    span,
    write_results,
)
from fediod_med.losses import DIVERGENCES
from fediod_med.progress import Progress

STRENGTH = 1.0  # weight of the Jensen-Shannon term; ten times the product's, so that there is something to see
NONE = "none"
ROWS: Mapping[str, tuple[str, float]] = {
    NONE: ("jensen_shannon", 0.0),
    "js-apart": ("jensen_shannon", 1.0),
    "js-together": ("jensen_shannon", -1.0),
    "information-apart": ("information", 1.0),
    "pairwise-apart": ("pairwise", 1.0),
    "features-apart": ("features", 1.0),
}
"""Divergence and sign of its weight, by row."""


@dataclass(frozen=True)
class Plan:
    """What is run: sizes, seeds and patients of each of three hospitals."""

    setup: Setup
    seeds: tuple[int, ...]
    patients: int


PLANS: Mapping[str, Plan] = {"full": Plan(FULL, (0, 1, 2), 8), "smoke": Plan(SMOKE, (0,), 1)}


def run_divergence(out: Path, profile: str, *, resume: bool, progress: Progress) -> str:
    """Run every row of `ROWS` with every seed; arguments, result and errors as `backbones.run_backbones`."""
    plan = PLANS[profile]
    open_folder(out, {"experiment": "divergence", "strength": STRENGTH, **asdict(plan)}, resume=resume)
    anatomy = working_anatomy(plan.setup)
    tasks = [
        Task(f"{name}-seed-{seed}", partial(_row, out, plan, name, seed, anatomy))
        for seed in plan.seeds
        for name in ROWS
    ]
    rows = compute_rows(out, tasks, progress=progress)
    summary = summarise(list(rows.values()))
    table = _table(summary)
    write_results(out, experiment="divergence", data="phantoms", rows=rows, table=table, summary=summary)
    return table


def equal_weights(measured: Mapping[str, float]) -> dict[str, float]:
    """Weight of each divergence so that weight x value is `STRENGTH` x the Jensen-Shannon divergence.

    Args:
        measured: value of each divergence on the same answers, `jensen_shannon` among them.
    """
    return {name: STRENGTH * measured["jensen_shannon"] / max(value, 1e-9) for name, value in measured.items()}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Student, disagreement and difference to the row without the term; rank correlation over all rows.

    Args:
        rows: with `row`, `seed`, `student` (`dice_record`), `disagreement` and `weight`.

    Returns:
        `rows`: by name `student` and `disagreement` (one per seed), `weight`, `difference` to `none` with its
        `interval`. `rank_correlation`: Spearman's rho of disagreement and student Dice, each taken relative to its
        seed's mean, with its `p`; over rows that are the same network twice (information) it counts once.
    """
    found: dict[str, Any] = {}
    base = _cases(rows, NONE)
    for name in ROWS:
        cases, own = _cases(rows, name), _of(rows, name)
        found[name] = {
            "student": cases.mean(axis=1).tolist(),
            "disagreement": [r["disagreement"] for r in own],
            "weight": [r["weight"] for r in own],
            "difference": float((cases - base).mean()),
            "interval": interval(cases - base),
        }
    different = [name for name in ROWS if name != "information-apart"]
    dice, apart = (np.array([found[name][key] for name in different]) for key in ("student", "disagreement"))
    centred = [(values - values.mean(axis=0)).ravel() for values in (apart, dice)]
    rho, p = spearmanr(*centred) if all(np.ptp(values) > 0 for values in centred) else (0.0, 1.0)
    return {"rows": found, "rank_correlation": {"rho": float(rho), "p": float(p), "points": int(dice.size)}}


def _of(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return sorted((r for r in rows if r["row"] == name), key=lambda r: int(r["seed"]))


def _cases(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([r["student"]["cases"] for r in _of(rows, name)])


def _row(out: Path, plan: Plan, name: str, seed: int, anatomy: Anatomy) -> dict[str, Any]:
    setup = plan.setup
    hospitals = three_hospitals(out, setup, BACKBONES["same"], count=plan.patients, seed=seed, anatomy=anatomy)
    sampler = public_sampler(setup, seed=seed, anatomy=anatomy)
    tests = held_out_patients(setup.tests, seed=seed, anatomy=anatomy)
    measured = public_divergences(hospitals, sampler, DIVERGENCES)
    divergence, sign = ROWS[name]
    weight = sign * equal_weights(measured)[divergence]
    outcome = distilled(
        hospitals,
        sampler,
        setup,
        objective=replace(GeneratorObjective(), divergence=divergence, unique=weight),
        seed=seed,
        state_dir=out / "site_state",
    )
    return {
        "row": name,
        "seed": seed,
        "divergence": divergence,
        "weight": weight,
        "student": dice_record(network_dice(outcome.student, tests)),
        "ensemble": dice_record(ensemble_dice(hospitals, tests)),
        "disagreement": disagreement(hospitals, outcome, sampler, setup),
        "on_phantoms": measured,
    }


def _table(summary: Mapping[str, Any]) -> str:
    body = [
        [
            name,
            f"{sum(row['weight']) / len(row['weight']):+.3g}",
            span(row["disagreement"], 4),
            span(row["student"]),
            f"{row['difference']:+.3f} ({row['interval'][0]:+.3f} to {row['interval'][1]:+.3f})",
        ]
        for name, row in summary["rows"].items()
    ]
    head = ("row", "weight", "JSD of the teachers on x (nats)", "student Dice", "minus none (95 % interval)")
    rank = summary["rank_correlation"]
    seeds = len(summary["rows"][NONE]["student"])
    return (
        f"{markdown_table(head, body)}\n\nDisagreement on the trained generator's volumes against student Dice, both "
        f"within a seed: Spearman's rho {rank['rho']:+.2f} over {rank['points']} runs (p {rank['p']:.2f}). Mean "
        f"phantom Dice of {seeds} seed(s) (lowest to highest); intervals: bootstrap over test phantoms."
    )
