"""Charts of numbers: loss terms by round, and the rows of a comparison with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.errors import InputError
from fediod_med.reporting.style import ACCENT, INK, NEUTRAL, footer, new_figure, open_frame, save
from fediod_med.reporting.tables import COLUMNS, row_name


def write_training_curves(
    path: Path, records: Sequence[Mapping[str, Any]], *, x: str = "round", title: str = "", banner: str = ""
) -> Path:
    """One small chart per quantity over the rounds: every value faint, a running median strong.

    A quantity that stays above zero and spans more than two decades gets a logarithmic axis. A quantity that some
    rounds do not have (the generator's terms in rounds without it) is drawn through the rounds that do.

    Args:
        path: of the PNG.
        records: one mapping per round; numbers are plotted, everything else is left out.
        x: key of the horizontal axis; the index of the record where it is missing.
        title: first line.
        banner: as in `write_preview`.

    Raises:
        InputError: no numbers to plot.
    """
    names = list(dict.fromkeys(key for record in records for key in record if key != x))
    at = np.array([_number(record.get(x, i)) for i, record in enumerate(records)])
    series = {name: np.array([_number(record.get(name)) for record in records]) for name in names}
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    if not series:
        raise InputError("training curves: expected numbers per round, found none")
    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    told = "Line and number: running median. Faint: every value."
    figure = new_figure(3.7 * columns + 0.5, 2.5 * lines + 1.3, title=title, subtitle=told)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(series) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(grid.flat, series.items(), strict=False):
        known = np.isfinite(values)
        finite = values[known]
        smooth = _running_median(finite)
        axes.plot(at[known], finite, color=NEUTRAL, alpha=0.45, linewidth=0.9)
        axes.plot(at[known], smooth, color=ACCENT, linewidth=2, marker="o" if len(finite) < 3 else None)
        if finite.min() > 0 and finite.max() / finite.min() > 100:
            axes.set_yscale("log")
        elif finite.min() < 0 < finite.max():
            axes.axhline(0, color=NEUTRAL, linewidth=0.8)
        axes.set_title(name.replace("_", " "), fontsize=12, loc="left")
        axes.set_title(f"{smooth[-1]:.3g}", fontsize=12, loc="right", color=ACCENT)
        open_frame(axes)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
        axes.margins(x=0.03, y=0.12)
    for axes in grid.flat[max(0, len(series) - columns) : len(series)]:
        axes.set_xlabel(x, fontsize=11)
    footer(figure, banner)
    return save(figure, path)


def has_numbers(records: Sequence[Mapping[str, Any]], *, x: str = "round") -> bool:
    """Whether `write_training_curves` has anything to plot."""
    return any(math.isfinite(_number(value)) for record in records for key, value in record.items() if key != x)


def write_comparison(
    path: Path,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    highlight: Sequence[str] = ("student",),
    title: str = "",
    note: str = "",
    banner: str = "",
) -> Path:
    """Dice of every row of a comparison with its 95 % interval, one chart each for TC, WT, ET and their mean.

    Args:
        path: of the PNG.
        rows: `evaluation.summarise` by key (`site:<name>`, `ensemble`, `prior`, `kd_phantoms`, `student`, `pooled`),
            top to bottom.
        highlight: keys drawn in the accent colour.
        title: first line.
        note: what was scored, for example "13 patients, phantoms".
        banner: as in `write_preview`.

    Raises:
        InputError: no rows.
    """
    if not rows:
        raise InputError("comparison: expected at least one row, found none")
    names = [row_name(key) for key in rows]
    told = "   ".join(part for part in (note, "Dice; line: 95 % interval over patients") if part)
    figure = new_figure(12.0, 0.42 * len(rows) + 1.9, title=title, subtitle=told)
    y = np.arange(len(rows))[::-1]
    colours = [ACCENT if key in highlight else NEUTRAL for key in rows]
    for axes, column in zip(figure.subplots(1, len(COLUMNS), sharey=True), COLUMNS, strict=True):
        values = np.array([float(row[column]) for row in rows.values()])
        axes.barh(y, values, height=0.62, color=colours)
        for place, value, row in zip(y, values, rows.values(), strict=True):
            right = value
            if "ci95" in row:
                low, right = row["ci95"][column]
                axes.plot([low, right], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
            axes.text(max(right, value) + 0.02, place, f"{value:.2f}", va="center", fontsize=10, color=INK)
        axes.set_title("Mean of the three" if column == "mean" else column, fontsize=12, loc="left")
        axes.set_yticks(y, names, fontsize=11)
        axes.set_xlim(0, 1.16)
        axes.set_xticks([0, 0.5, 1])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
        open_frame(axes)
    footer(figure, banner)
    return save(figure, path)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else math.nan


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median over a centred window of about a fifteenth of the series (finite values)."""
    half = len(values) // 30
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
