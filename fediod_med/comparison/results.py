"""From the rows on disk to numbers: means over cross-validated patients, intervals, paired tests, targets.

A patient is tested once per seed; its scores are averaged over seeds (and visits) first, so that the patient is the
unit of every interval and test. Intervals: percentile bootstrap over patients. Tests: Wilcoxon's signed-rank test of
`ours` against each other row, with Holm's correction over all of them (Holm 1979, Scand J Stat 6).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from fediod_med.comparison.rows import ALIASES, OURS, row_kind
from fediod_med.comparison.storage import NOT_PRIVATE, StoredRow
from fediod_med.data.partitions import patient_id
from fediod_med.evaluation import LEVEL, RESAMPLES, bootstrap_interval, score_matrix
from fediod_med.labels import REGIONS
from fediod_med.metrics import ABSENT_REGION_POLICY
from fediod_med.resources import NOT_FOR_CLINICAL_USE

COLUMNS = (*REGIONS, "mean")
Patient = tuple[str, str]
"""Hospital and patient."""
Patients = Mapping[Patient, np.ndarray]
"""Scores `(4,)` (TC, WT, ET, mean) of the patients of one row."""


def gather(
    stored: Mapping[str, Sequence[StoredRow]],
    *,
    site_names: Sequence[str],
    cells: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Content of `results.json`.

    Args:
        stored: rows by key, one per cell that lies on disk, failed ones included; in the order of the tables.
        site_names: hospitals in order.
        cells: number of cells that a complete row has.
        about: further values for the head (profile, seeds, data, tuning, ...).
    """
    found = {key: [row for row in rows if row.done] for key, rows in stored.items()}
    dice = {key: patient_means(rows, "dice") for key, rows in found.items() if rows}
    ours = {key: patient_means(_same_cells(found.get(OURS, ()), rows), "dice") for key, rows in found.items()}
    rows = {key: _row(key, found[key], dice.get(key, {}), stored[key], site_names, cells) for key in stored}
    return {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy": NOT_PRIVATE,
        **about,
        "absent_region_policy": ABSENT_REGION_POLICY,
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "unit": "patient, averaged over seeds", "seed": 0},
        "aliases": ALIASES,
        "rows": rows,
        "paired": paired_tests(dice, ours),
        "targets": targets(dice, ours),
    }


def patient_means(rows: Sequence[StoredRow], field: str) -> dict[Patient, np.ndarray]:
    """Scores `(4,)` (TC, WT, ET, mean) of each patient of one row, averaged over its seeds and visits."""
    values: dict[Patient, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        keys, matrix = score_matrix(row.scores, field)
        for (site, subject), scores in zip(keys, matrix, strict=True):
            values[site, patient_id(subject)].append(np.append(scores, scores.mean()))
    return {patient: np.mean(found, axis=0) for patient, found in sorted(values.items())}


def paired_tests(dice: Mapping[str, Patients], ours: Mapping[str, Patients] | None = None) -> dict[str, Any]:
    """`ours` against every other row, on the patients that both have; empty without `ours`.

    Args:
        dice: by row.
        ours: by row, the scores of `ours` in the cells of that row alone, so that a row with fewer seeds meets the same
            seeds; `dice["ours"]` where omitted.

    Returns:
        By row: `patients`, `difference` (ours minus row, mean Dice), `ci95`, the same per region under `regions`,
        `wilcoxon_p`, `holm_p` and `wins` (patients above, equal, below).
    """
    if OURS not in dice:
        return {}
    tests: dict[str, Any] = {}
    for key, other in dice.items():
        own = dice[OURS] if ours is None else ours[key]
        shared = sorted(set(own) & set(other))
        if key == OURS or not shared:
            continue
        delta = np.stack([own[patient] - other[patient] for patient in shared])
        interval = bootstrap_interval(delta, seed=0)
        column = delta[:, -1]
        tests[key] = {
            "patients": len(shared),
            "difference": float(column.mean()),
            "ci95": [float(bound) for bound in interval[-1]],
            "regions": {
                name: {"difference": float(delta[:, j].mean()), "ci95": [float(bound) for bound in interval[j]]}
                for j, name in enumerate(REGIONS)
            },
            "wilcoxon_p": signed_rank_p(column),
            "wins": [int((column > 0).sum()), int((column == 0).sum()), int((column < 0).sum())],
        }
    for (_, test), p in zip(tests.items(), holm([t["wilcoxon_p"] for t in tests.values()]), strict=True):
        test["holm_p"] = p
    return tests


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where no difference is left."""
    if not np.any(differences):
        return 1.0
    with warnings.catch_warnings():  # ties and few patients make it approximate, which the table says anyway
        warnings.simplefilter("ignore")
        return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m times (m - i + 1), never falling, at most 1."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = np.ones(len(p_values)), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return [float(p) for p in corrected]


def targets(dice: Mapping[str, Patients], ours: Mapping[str, Patients] | None = None) -> list[dict[str, Any]]:
    """What the method set out to reach, met or missed and by how much; a target whose rows are missing is left out.

    Where several rows stand for one rival (FedAvg as it is and tuned, the ensembles), the best of them counts. A row is
    compared on the cells and patients that it shares with `ours`, so that an incomplete one is not judged by easier
    patients. Arguments as in `paired_tests`.
    """
    if OURS not in dice:
        return []
    found = []
    own = {key: dice[OURS] if ours is None else ours[key] for key in dice}
    for name, rivals, bound in (
        ("ours / FedAvg", ["fedavg", "fedavg_tuned"], 1.03),
        ("ours / best ensemble", [key for key in dice if key.startswith("ensemble_")], 1.05),
        ("ours / pooled", ["pooled"], 0.97),
    ):
        ratios = {key: _ratio(own[key], dice[key]) for key in rivals if set(dice.get(key, ())) & set(own.get(key, ()))}
        if not ratios:
            continue
        best = min(ratios, key=lambda key: ratios[key])
        found.append(_target(name, best, ratios[best], bound, ratios[best] >= bound))
    test = paired_tests(dice, ours).get("kd_phantoms")
    if test is not None:
        met = test["difference"] >= 0.02 and test["ci95"][0] > 0
        target = _target("ours - kd_phantoms, interval above 0", "kd_phantoms", test["difference"], 0.02, met)
        found.append({**target, "ci95": test["ci95"]})
    return found


def _same_cells(rows: Sequence[StoredRow], others: Sequence[StoredRow]) -> list[StoredRow]:
    cells = {row.cell for row in others}
    return [row for row in rows if row.cell in cells]


def _ratio(ours: Patients, rival: Patients) -> float:
    shared = sorted(set(ours) & set(rival))
    mine, other = (_mean({patient: row[patient] for patient in shared}) for row in (ours, rival))
    return mine / other if other > 0 else float(mine > 0)


def _target(name: str, rival: str, value: float, bound: float, met: bool) -> dict[str, Any]:
    return {"name": name, "rival": rival, "value": value, "bound": bound, "margin": value - bound, "met": bool(met)}


def _mean(patients: Patients) -> float:
    return float(np.mean([scores[-1] for scores in patients.values()]))


def _row(
    key: str,
    done: Sequence[StoredRow],
    dice: Patients,
    stored: Sequence[StoredRow],
    site_names: Sequence[str],
    cells: int,
) -> dict[str, Any]:
    kind = row_kind(key)
    head: dict[str, Any] = {
        "name": kind.name,
        "leaves": kind.leaves,
        "deployable": kind.deployable,
        "cells": len(done),
        "complete": len(done) == cells,
        "failures": [
            {"fold": row.cell.fold, "seed": row.cell.seed, "reason": row.record.get("reason", "")}
            for row in stored
            if not row.done
        ],
    }
    if not done:
        return head
    distance = patient_means(done, "hd95")
    matrix = np.stack([*dice.values()])
    by_site = {
        site: np.stack([scores for (owner, _), scores in dice.items() if owner == site])
        for site in site_names
        if any(owner == site for owner, _ in dice)
    }
    site_dice = {site: {**_named(m.mean(axis=0)), "patients": len(m)} for site, m in by_site.items()}
    worst = min(site_dice, key=lambda site: site_dice[site]["mean"])
    seeds = sorted({row.cell.seed for row in done})
    of_seeds = [_mean(patient_means([row for row in done if row.cell.seed == seed], "dice")) for seed in seeds]
    return {
        **head,
        "patients": len(dice),
        "dice": _named(matrix.mean(axis=0)),
        "ci95": _intervals(matrix),
        "hd95_mm": _named(np.stack([*distance.values()]).mean(axis=0)),
        "hd95_ci95": _intervals(np.stack([*distance.values()])),
        "sites": site_dice,
        "worst_site": worst,
        "worst_site_mean": site_dice[worst]["mean"],
        "seed_means": dict(zip(map(str, seeds), of_seeds, strict=True)),
        "bytes": {
            way: {site: float(np.mean([row.record["bytes"][way].get(site, 0) for row in done])) for site in site_names}
            for way in ("down", "up")
        },
        "seconds": float(np.mean([row.record["seconds"] for row in done])),
        "selected_on": sorted({str(row.record.get("selected_on", "nothing")) for row in done}),
        "scores": [score for row in done for score in _cell_scores(row)],
    }


def _cell_scores(row: StoredRow) -> list[dict[str, Any]]:
    """Means per fold, seed and hospital; `n` held-out subjects."""
    keys, dice = score_matrix(row.scores, "dice")
    _, distance = score_matrix(row.scores, "hd95")
    _, empty = score_matrix(row.scores, "reference_empty")
    found = []
    for site in sorted({site for site, _ in keys}):
        chosen = [index for index, (owner, _) in enumerate(keys) if owner == site]
        means, distances = dice[chosen].mean(axis=0), distance[chosen].mean(axis=0)
        found.append(
            {
                "fold": row.cell.fold,
                "seed": row.cell.seed,
                "site": site,
                "n": len(chosen),
                **_named(np.append(means, means.mean())),
                "hd95_mm": _named(np.append(distances, distances.mean())),
                "empty_references": dict(zip(REGIONS, empty[chosen].sum(axis=0).astype(int).tolist(), strict=True)),
            }
        )
    return found


def _named(values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(COLUMNS, values, strict=True)}


def _intervals(matrix: np.ndarray) -> dict[str, list[float]]:
    bounds = bootstrap_interval(matrix, seed=0)
    return {name: [float(bound) for bound in pair] for name, pair in zip(COLUMNS, bounds, strict=True)}
