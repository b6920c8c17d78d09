"""The rows of a comparison in words and figures: a table for the terminal, and one in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fediod_med.labels import REGIONS
from fediod_med.metrics import ABSENT_REGION_POLICY
from fediod_med.resources import NOT_FOR_CLINICAL_USE

COLUMNS = (*REGIONS, "mean")
_HEAD = ["model", *COLUMNS, "95 % interval", "HD95", "worst hospital"]


def row_name(key: str) -> str:
    """Words for a key of the comparison; unknown keys are shown as they are."""
    known = {
        "ensemble": "teacher ensemble",
        "prior": "public prior only",
        "kd_phantoms": "distilled on phantoms",
        "student": "distilled student",
        "pooled": "all scans pooled",
    }
    return f"hospital {key.removeprefix('site:')}" if key.startswith("site:") else known.get(key, key)


def results_table(summary: Mapping[str, Any], *, highlight: str = "student") -> Table:
    """`summary["rows"]` as a table for the terminal: Dice per region, HD95, worst hospital."""
    rows: Mapping[str, Mapping[str, Any]] = summary["rows"]
    table = Table(caption=f"Mean Dice over patients; HD95 in mm. {NOT_FOR_CLINICAL_USE}")
    for name in _HEAD:
        table.add_column(name, justify="left" if name == _HEAD[0] else "right")
    for cells, key in zip(_cells(rows), rows, strict=True):
        table.add_row(*cells, style="bold" if key == highlight else None)
    return table


def results_markdown(summary: Mapping[str, Any]) -> str:
    """`summary["rows"]` as a Markdown table with its policy below."""
    lines = [_HEAD, ["---", *["---:"] * (len(_HEAD) - 1)], *_cells(summary["rows"])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    policy = f"{ABSENT_REGION_POLICY} {NOT_FOR_CLINICAL_USE}"
    return f"{table}\n\nMean Dice over patients; interval of the mean; HD95 in mm. {policy}\n"


def _cells(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    table = []
    for key, row in rows.items():
        interval = "{:.2f} to {:.2f}".format(*row["ci95"]["mean"]) if "ci95" in row else "-"
        distance = f"{row['hd95_mm']['mean']:.1f}" if "hd95_mm" in row else "-"
        worst = f"{row['worst_site']} {row['worst_site_mean']:.3f}" if row.get("worst_site") else "-"
        table.append([row_name(key), *(f"{row[column]:.3f}" for column in COLUMNS), interval, distance, worst])
    return table
