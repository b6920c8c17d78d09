"""`fediod experiment digits` and `cifar`: the method on classification, a row per partition and seed, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.errors import SettingsError
from fediod_med.experiments.classification import Setup, run_cell
from fediod_med.experiments.images import ImageSet, cifar, digits, validation_of
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

TARGET, TARGET_ALPHA = 0.95, 1.0
TUNING_SEED = 100  # none of the seeds that are scored on the test part
_OBJECTIVE = GeneratorObjective(
    gan=1.0, clarity=0.1, unique=0.1, mask=0.0, balance=1.0, transfer=0.2, realism_weights=True, competence=0.0
)
CANDIDATES: Mapping[str, GeneratorObjective] = {
    "chosen": _OBJECTIVE,
    "no-discriminator-weights": replace(_OBJECTIVE, realism_weights=False),
    "agreeing": replace(_OBJECTIVE, unique=-0.1),
}
"""Objectives that profile `tune` compares on a part of the training images; the first one is used everywhere else."""
_DIGITS = Setup(
    sites=20,
    local_steps=100,
    pooled_steps=300,
    batch=32,
    rate=5e-3,
    averaging_rounds=10,
    width=8,
    levels=3,
    latent=32,
    doublings=2,
    real_batch=16,
    discriminator_rate=1e-3,
    objective=_OBJECTIVE,
    schedule=Schedule(
        rounds=100,
        batch=64,
        student_steps=6,
        student_batch=64,
        student_rate=5e-3,
        generator_rate=2e-3,
        replay=60,
        ema=0.98,
        phantom_share=0.0,
        rehearsal=0.0,
    ),
)
_CIFAR = replace(
    _DIGITS,
    local_steps=1000,
    pooled_steps=10000,
    batch=64,
    rate=2e-3,
    averaging_rounds=50,
    width=32,
    levels=4,
    latent=100,
    doublings=3,
    real_batch=64,
    discriminator_rate=1e-4,
    schedule=replace(_DIGITS.schedule, rounds=5000, student_steps=5, generator_rate=1e-4, student_rate=1e-3),
)
"""Never run: sizes after the paper's code, for a machine with an accelerator's patience."""
_ROWS = {
    "ensemble": "teacher ensemble, class ratio (not deployable)",
    "fedavg": "FedAvg (moves weights)",
    "pooled": "all images pooled (not allowed to the sites)",
    "untrained_generator": "distilled on an untrained generator's noise",
    "student": "**distilled student**",
}


@dataclass(frozen=True)
class Profile:
    """What is run.

    Attributes:
        alphas: of the Dirichlet distribution.
        seeds: of partition, networks and draws.
        setup: sizes.
        candidates: names in `CANDIDATES`.
        validation: whether a part of the training images takes the place of the test part.
    """

    alphas: tuple[float, ...]
    seeds: tuple[int, ...]
    setup: Setup
    candidates: tuple[str, ...] = ("chosen",)
    validation: bool = False


def profile_of(name: str, *, images: str) -> Profile:
    """`full`, `tune` or `smoke` for `digits` or `cifar`; `SettingsError` on another name."""
    setup = _DIGITS if images == "digits" else _CIFAR
    if name == "full":
        return Profile((1.0, 0.1), (0, 1, 2), setup)
    if name == "tune":
        return Profile((1.0, 0.1), (TUNING_SEED,), setup, tuple(CANDIDATES), validation=True)
    if name == "smoke":
        few = replace(
            setup, sites=3, local_steps=10, pooled_steps=10, averaging_rounds=2, width=4, levels=3, real_batch=4
        )
        schedule = replace(setup.schedule, rounds=3, batch=4, student_steps=2, student_batch=4)
        return Profile((1.0,), (0,), replace(few, schedule=schedule))
    raise SettingsError(f"--profile: expected full, tune or smoke, found {name!r}")


def run_digits(out: Path, profile: str, *, resume: bool, progress: Progress) -> str:
    """Handwritten digits; writes `results.json` and `table.md` and returns the table.

    Raises:
        SettingsError: profile or folder.
    """
    return _run(out, digits(), profile_of(profile, images="digits"), "digits", resume=resume, progress=progress)


def run_cifar(out: Path, folder: Path, profile: str, *, resume: bool, progress: Progress) -> str:
    """CIFAR from a local folder (`images.cifar`); as `run_digits`.

    Raises:
        SettingsError: profile or folder.
        InputError: no CIFAR in the folder.
    """
    return _run(out, cifar(folder), profile_of(profile, images="cifar"), "cifar", resume=resume, progress=progress)


def _run(out: Path, images: ImageSet, profile: Profile, name: str, *, resume: bool, progress: Progress) -> str:
    scored = validation_of(images) if profile.validation else images
    open_folder(out, {"experiment": name, "images": len(images.train_y), **asdict(profile)}, resume=resume)
    tasks = [
        Task(
            f"{candidate}-alpha-{alpha:g}-seed-{seed}",
            partial(
                _cell, scored, replace(profile.setup, objective=CANDIDATES[candidate]), candidate, alpha, seed, out
            ),
        )
        for alpha in profile.alphas
        for candidate in profile.candidates
        for seed in profile.seeds
    ]
    rows = compute_rows(out, tasks, progress=progress)
    groups = {
        (candidate, alpha): [r for r in rows.values() if (r["candidate"], r["alpha"]) == (candidate, alpha)]
        for alpha in profile.alphas
        for candidate in profile.candidates
    }
    summary = {f"{candidate}, alpha {alpha:g}": summarise(group) for (candidate, alpha), group in groups.items()}
    table = "\n\n".join(f"### {title}\n\n{_table(part)}" for title, part in summary.items())
    write_results(out, experiment=name, data=scored.name, rows=rows, table=table, summary=summary)
    return table


def summarise(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and intervals over test images, of the cells of one partition.

    Args:
        cells: as `classification.run_cell` gives them, one per seed.

    Returns:
        By row `accuracy` (one per seed), `interval`; `sites` with `mean` and `best` (one per seed); `ratio`, student
        over ensemble, one per seed, with `ratio_interval`; `student_minus`, by other row the paired difference in
        accuracy, `mean` and `interval`; `bytes_up` and `bytes_down` per site.
    """
    hits = {
        row: np.array([[int(hit) for hit in cell["rows"][row]["correct"]] for cell in cells], dtype=float)
        for row in _ROWS
    }
    accuracies = [[site["accuracy"] for site in cell["sites"].values()] for cell in cells]
    sizes = [site["images"] for cell in cells for site in cell["sites"].values()]
    return {
        "rows": {
            row: {"accuracy": values.mean(axis=1).tolist(), "interval": interval(values)}
            for row, values in hits.items()
        },
        "sites": {
            "mean": [sum(found) / len(found) for found in accuracies],
            "best": [max(found) for found in accuracies],
            "images": [min(sizes), max(sizes)],
        },
        "ratio": (hits["student"].mean(axis=1) / hits["ensemble"].mean(axis=1)).tolist(),
        "ratio_interval": ratio_interval(hits["student"], hits["ensemble"]),
        "student_minus": {
            row: {"mean": float((hits["student"] - values).mean()), "interval": interval(hits["student"] - values)}
            for row, values in hits.items()
            if row != "student"
        },
        "alpha": cells[0]["alpha"],
        "bytes_up": [cell["bytes_up"] for cell in cells],
        "bytes_down": [cell["bytes_down"] for cell in cells],
        "seeds": len(cells),
    }


def _table(part: Mapping[str, Any]) -> str:
    low, high = part["sites"]["images"]
    body = [
        [f"a site alone, mean over sites ({low} to {high} images each)", span(part["sites"]["mean"]), ""],
        ["best site alone", span(part["sites"]["best"]), ""],
    ]
    for key, title in _ROWS.items():
        row = part["rows"][key]
        body.append([title, span(row["accuracy"]), "{:.3f} to {:.3f}".format(*row["interval"])])
    table = markdown_table(
        ("row", f"accuracy, mean of {part['seeds']} seeds (lowest to highest)", "95 % interval"), body
    )
    ratio = sum(part["ratio"]) / len(part["ratio"])
    target = ""
    if part["alpha"] == TARGET_ALPHA:
        target = f"; target {TARGET} at alpha {TARGET_ALPHA:g}: {'met' if ratio >= TARGET else 'missed'}"
    low, high = part["ratio_interval"]
    minus = ", ".join(
        f"{key.replace('_', ' ')} {found['mean']:+.3f} ({found['interval'][0]:+.3f} to {found['interval'][1]:+.3f})"
        for key, found in part["student_minus"].items()
    )
    sent = sum(part["bytes_up"]) / len(part["bytes_up"]) / 1e6
    return (
        f"{table}\n\nStudent / ensemble {ratio:.3f} ({low:.3f} to {high:.3f}){target}. "
        f"Student minus {minus}. Each site sends {sent:.2f} MB. Intervals: bootstrap over test images."
    )


def _cell(images: ImageSet, setup: Setup, candidate: str, alpha: float, seed: int, out: Path) -> dict[str, Any]:
    return {"candidate": candidate, **run_cell(images, setup, alpha=alpha, seed=seed, state=out / "site_state")}
