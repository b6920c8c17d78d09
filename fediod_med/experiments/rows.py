"""Rows of an experiment on disk: one file each, so that an interrupted experiment goes on where it stood."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.checkpoints import current_commit
from fediod_med.durable import write_atomically
from fediod_med.errors import SettingsError
from fediod_med.evaluation import RESAMPLES, bootstrap_interval
from fediod_med.progress import Progress
from fediod_med.records import software_versions, write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE

NOT_PRIVATE = "NOT PRIVATE"


@dataclass(frozen=True)
class Task:
    """One row that is yet to be computed.

    Attributes:
        key: letters, digits, dots and dashes; names the file.
        run: computes the row; plain values.
    """

    key: str
    run: Callable[[], Mapping[str, Any]]


def open_folder(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Begin an experiment in an empty folder, or go on with one of the same settings.

    Args:
        out: made when absent.
        settings: plain values that decide the rows; kept in `settings.json`.
        resume: go on.

    Raises:
        SettingsError: the folder holds something and `resume` is not set, or another experiment.
    """
    path = out / "settings.json"
    plain = json.loads(json.dumps(settings))
    if path.is_file() and resume:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != plain:
            differing = sorted(k for k in {*found, *plain} if found.get(k) != plain.get(k))
            raise SettingsError(
                f"{out}: expected rows of the same settings to go on with, found others in {', '.join(differing)}; "
                f"choose a new folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise SettingsError(f"{out}: expected a new or empty folder, found files; add --resume to go on with them")
    write_json(path, plain)


def compute_rows(out: Path, tasks: Sequence[Task], *, progress: Progress) -> dict[str, dict[str, Any]]:
    """Compute the rows that are not there yet, each into `rows/<key>.json`.

    Returns:
        All rows by key, with `seconds` each.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, task in enumerate(tasks, start=1):
        path = out / "rows" / f"{task.key}.json"
        if not path.is_file():
            began = time.perf_counter()
            content = task.run()
            spent = time.perf_counter() - began
            write_json(path, {"notice": NOT_FOR_CLINICAL_USE, "privacy": NOT_PRIVATE, **content, "seconds": spent})
        rows[task.key] = json.loads(path.read_text(encoding="utf-8"))
        progress("rows", number, len(tasks), task.key)
    return rows


def write_results(
    out: Path,
    *,
    experiment: str,
    data: str,
    rows: Mapping[str, Mapping[str, Any]],
    table: str,
    summary: Mapping[str, Any],
) -> None:
    """Write `results.json` (rows and summary) and `table.md`, both with the banner.

    Args:
        out: of the experiment.
        experiment: its name.
        data: what was scored: `phantoms`, `handwritten digits`, ...
        rows: as `compute_rows` gives them.
        table: Markdown without a banner.
        summary: means, ratios and intervals.
    """
    write_json(
        out / "results.json",
        {
            "notice": NOT_FOR_CLINICAL_USE,
            "privacy": NOT_PRIVATE,
            "experiment": experiment,
            "data": data,
            "commit": current_commit(),
            "versions": software_versions(),
            "summary": summary,
            "rows": rows,
        },
    )
    banner = f"**{NOT_PRIVATE}. {NOT_FOR_CLINICAL_USE} Scores on {data}.**"
    text = f"{banner}\n\n{table.rstrip()}\n"
    write_atomically(out / "table.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over cases.

    Args:
        values: `(seeds, cases)`: what each case scores with each seed. Cases are drawn anew, with all their seeds; the
            interval says nothing about seeds that were not run.
        seed: of the draws.
    """
    low, high = bootstrap_interval(values.mean(axis=0)[:, None], seed=seed)[0]
    return float(low), float(high)


def ratio_interval(upper: np.ndarray, lower: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `mean(upper) / mean(lower)`, paired by case; both `(seeds, cases)`."""
    pairs = np.stack([upper.mean(axis=0), lower.mean(axis=0)], axis=1)
    draws = np.random.default_rng(seed).integers(0, len(pairs), size=(RESAMPLES, len(pairs)))
    means = pairs[draws].mean(axis=1)
    low, high = np.percentile(means[:, 0] / np.maximum(means[:, 1], 1e-9), [2.5, 97.5])
    return float(low), float(high)


def span(values: Sequence[float], digits: int = 3) -> str:
    """`mean (lowest to highest)` of a few seeds."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
