"""Figures of a comparison: every row with its interval, every hospital, and Dice against bytes; all say NOT PRIVATE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fediod_med.comparison.rows import OURS
from fediod_med.durable import write_atomically
from fediod_med.reporting.style import ACCENT, DPI, INK, NEUTRAL
from fediod_med.resources import NOT_FOR_CLINICAL_USE

_SITE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def write_plots(folder: Path, results: Mapping[str, Any]) -> dict[str, Path]:
    """`forest.png`, `hospitals.png` and `bytes.png`; nothing when no row has been scored.

    Args:
        folder: made when absent.
        results: content of `results.json`.
    """
    rows = {key: row for key, row in results["rows"].items() if "dice" in row}
    if not rows:
        return {}
    return {
        "forest": _save(_forest(rows, results), folder / "forest.png"),
        "hospitals": _save(_hospitals(rows, results), folder / "hospitals.png"),
        "bytes": _save(_bytes(rows, results), folder / "bytes.png"),
    }


def _forest(rows: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(11, 0.34 * len(rows) + 1.6, results, "Mean Dice of each row, 95 % interval over patients")
    for place, (key, row) in zip(_places(axes, rows), rows.items(), strict=True):
        colour = ACCENT if key == OURS else NEUTRAL
        low, high = row["ci95"]["mean"]
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(row["dice"]["mean"], place, "o", color=colour, markersize=7)
        axes.text(high + 0.004, place, f"{row['dice']['mean']:.3f}", va="center", fontsize=9, color=INK)
    if OURS in rows:
        axes.axvline(rows[OURS]["dice"]["mean"], color=ACCENT, linewidth=0.8, linestyle=":")
    axes.set_xlabel("mean Dice (TC, WT, ET)")
    return figure


def _hospitals(rows: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(11, 0.34 * len(rows) + 1.9, results, "Mean Dice of each row on the patients of each hospital")
    places = _places(axes, rows)
    names = list(dict.fromkeys(site for row in rows.values() for site in row["sites"]))
    for index, name in enumerate(names):
        points = [
            (row["sites"][name]["mean"], y)
            for y, row in zip(places, rows.values(), strict=True)
            if name in row["sites"]
        ]
        values, at = zip(*points, strict=True)
        axes.plot(values, at, "os^DvPX*"[index % 8], color=_SITE_COLOURS[index % 8], label=name, linestyle="none")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(len(names), 5), frameon=False, fontsize=9)
    axes.set_xlabel("mean Dice (TC, WT, ET)")
    return figure


def _bytes(rows: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(10, 6.5, results, "Mean Dice against what each hospital sends and receives")
    for key, row in rows.items():
        total = np.mean([row["bytes"]["up"][site] + row["bytes"]["down"][site] for site in row["bytes"]["up"]]) / 1e6
        colour = ACCENT if key == OURS else NEUTRAL
        axes.plot(total, row["dice"]["mean"], "o" if row["deployable"] else "s", color=colour, markersize=7)
        axes.annotate(
            key, (float(total), row["dice"]["mean"]), xytext=(4, 3), textcoords="offset points", fontsize=7, color=INK
        )
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.05)
    axes.set_xlabel("MB per hospital, both ways (circle: no scan and no weight leaves a hospital; square: one does)")
    axes.set_ylabel("mean Dice (TC, WT, ET)")
    return figure


def _axes(width: float, height: float, results: Mapping[str, Any], title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12, loc="left", color=INK)
    axes.grid(axis="both", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    banner = f"{results['privacy']}. {results['data']}. {NOT_FOR_CLINICAL_USE}"
    figure.supxlabel(banner, x=0.01, ha="left", fontsize=10, color="#A03000")
    return figure, axes


def _places(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    places = np.arange(len(rows))[::-1]
    axes.set_yticks(places, [row["name"] for row in rows.values()], fontsize=9)
    axes.grid(axis="y", visible=False)
    return places


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))
    return path
