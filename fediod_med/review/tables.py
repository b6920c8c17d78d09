"""Rows of the app's tables and charts: what a run says, in the order and words that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fediod_med.labels import REGIONS
from fediod_med.review.run_folder import CaseScore, RunFolder

_MODELS = {
    "student": "student",
    "ensemble": "teachers' ensemble",
    "prior": "public prior",
    "kd_phantoms": "student on phantoms",
    "pooled": "pooled data",
}
PROGRESS = {
    "student": "student's mean Dice",
    "realism": "realism (critics)",
    "mask": "mask fit",
    "clarity": "clarity",
    "unique": "teachers' divergence",
    "transfer": "transfer loss",
}


def model_name(key: str) -> str:
    """A row's key in words: `site:north` becomes `teacher north`."""
    return f"teacher {key.removeprefix('site:')}" if key.startswith("site:") else _MODELS.get(key, key)


def dice_rows(run: RunFolder) -> list[dict[str, Any]]:
    """One row per model: Dice by region with the mean's interval, HD95, patients and the worst hospital."""
    found = []
    for key, row in (run.rows or {}).items():
        low, high = _pair(_object(row.get("ci95")).get("mean"))
        found.append(
            {
                "model": model_name(key),
                **{f"Dice {region}": row.get(region) for region in REGIONS},
                "mean Dice": row.get("mean"),
                "95 % low": low,
                "95 % high": high,
                "HD95 mm": _object(row.get("hd95_mm")).get("mean"),
                "worst hospital": row.get("worst_site"),
                "its mean Dice": row.get("worst_site_mean"),
                "patients": row.get("patients"),
            }
        )
    return found


def site_rows(run: RunFolder) -> list[dict[str, Any]]:
    """One row per model and hospital of the held-out patients: mean Dice, for a chart."""
    return [
        {
            "model": model_name(key),
            "hospital": site,
            "mean Dice": scores.get("mean"),
            "patients": scores.get("patients"),
        }
        for key, row in (run.rows or {}).items()
        for site, scores in _object(row.get("sites")).items()
        if isinstance(scores, Mapping)
    ]


def privacy_rows(run: RunFolder) -> list[dict[str, Any]]:
    """One row per hospital: promise, epsilon by both accountants, budget, delta and patients, as far as any has it."""
    rows: list[dict[str, Any]] = [
        {
            "hospital": terms.site,
            "promise": "private" if terms.private else "NOT PRIVATE",
            "mode": terms.mode,
            "epsilon (RDP)": terms.epsilon,
            "epsilon (PRV)": terms.epsilon_prv,
            "budget": terms.budget,
            "delta": None if terms.delta is None else f"{terms.delta:.1e}",
            "patients": terms.patients,
        }
        for terms in run.privacy or ()
    ]
    told = {name for row in rows for name, value in row.items() if value is not None}
    return [{name: value for name, value in row.items() if name in told} for row in rows]


def privacy_words(run: RunFolder) -> str:
    """What is promised per hospital, in one line below the banner; empty where nothing is promised."""
    if not any(terms.private for terms in run.privacy or ()):
        return ""
    told = []
    for terms in run.privacy or ():
        if terms.private and terms.epsilon is not None and terms.delta is not None:
            told.append(f"{terms.site}: epsilon {terms.epsilon:.3g} at delta {terms.delta:.1e}")
        else:
            told.append(f"{terms.site}: NOT PRIVATE")
    return "; ".join(told)


def progress_rows(run: RunFolder) -> list[dict[str, Any]]:
    """One row per round and quantity that the round has, for a chart; per hospital where the round tells it."""
    rows = []
    for number, entry in enumerate(run.history or ()):
        at = entry.get("round", number + 1)
        for name, words in PROGRESS.items():
            if _is_number(entry.get(name)):
                rows.append({"round": at, "quantity": words, "hospital": "all", "value": float(entry[name])})
        for name, found in entry.items():
            what, of_site, site = name.partition(":")
            if of_site and _is_number(found):
                words = f"{PROGRESS.get(what, what)} by hospital"
                rows.append({"round": at, "quantity": words, "hospital": site, "value": float(found)})
    return rows


def score_rows(scores: Sequence[CaseScore], region: str) -> list[dict[str, Any]]:
    """One row per held-out case and model in one region, for a chart of points."""
    return [
        {
            "model": model_name(score.model),
            "case": score.case,
            "hospital": score.site,
            "Dice": score.dice,
            "HD95 mm": score.hd95_mm,
            "reference": "empty: Dice is 0 or 1 by convention" if score.reference_empty else "has this region",
        }
        for score in scores
        if score.region == region
    ]


def finding_rows(findings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Findings of the input checks: what was found and what to do."""
    names = ("severity", "code", "where", "message", "fix")
    return [{name: str(found.get(name) or "") for name in names} for found in findings]


def volume_rows(volumes: Mapping[str, float], other: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Millilitres by class and region, beside another segmentation's with the difference."""
    rows: list[dict[str, Any]] = []
    for name, value in volumes.items():
        row: dict[str, Any] = {"region": name, "ml": round(float(value), 2)}
        if other is not None and name in other:
            row |= {"reference ml": round(float(other[name]), 2), "difference ml": round(float(value - other[name]), 2)}
        rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (None, None)
