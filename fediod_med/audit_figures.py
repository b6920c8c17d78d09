"""Figures of a privacy audit: AUC with intervals, ROC curves, and epsilon bounds beside ceiling and claim.

Draws what `auditing.audit_run` wrote, and computes nothing. Colours are those of Okabe and Ito (2008).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fediod_med.durable import write_atomically
from fediod_med.errors import InputError

DPI = 150
SAFE, ALARM, NEUTRAL, INK = "#0072B2", "#D55E00", "#7A8794", "#222222"
_LOWEST_RATE = 1e-3


def write_audit_figures(folder: Path, result: Mapping[str, Any]) -> dict[str, Path]:
    """Write `auc.png`, `roc.png` and `epsilon.png` of an audit.

    Args:
        folder: made when absent.
        result: content of `audit.json`.

    Returns:
        Paths by name without ending.

    Raises:
        InputError: the audit holds no attack.
    """
    if not result["attacks"]:
        raise InputError("audit figures: expected at least one attack, found none; audit a site with held-out patients")
    return {
        "auc": write_auc(folder / "auc.png", result),
        "roc": write_roc(folder / "roc.png", result),
        "epsilon": write_epsilon(folder / "epsilon.png", result),
    }


def write_auc(path: Path, result: Mapping[str, Any]) -> Path:
    """AUC of each attack with its interval, one row each; orange where the interval lies above one half."""
    attacks = result["attacks"]
    level = f"{100 * result['confidence']:g} % intervals. Dashed: guessing. Orange: interval above it."
    figure = _figure(9.0, 0.5 * len(attacks) + 1.9, "Can an attacker tell who was trained on?", level)
    axes: Axes = figure.subplots()
    for row, attack in enumerate(attacks):
        low, high = attack["auc_interval"]
        colour = ALARM if low > 0.5 else SAFE
        axes.plot([low, high], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([attack["auc"]], [row], marker="o", color=colour, markersize=8)
        axes.text(1.03, row, f"{attack['auc']:.2f}  ({low:.2f} to {high:.2f})", va="center", fontsize=10, color=INK)
    axes.axvline(0.5, color=NEUTRAL, linestyle="--", linewidth=1)
    _rows(axes, [f"{_name(attack)}\n{attack['members']} against {attack['non_members']}" for attack in attacks])
    axes.set_xlim(0, 1.38)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("AUC", fontsize=11)
    return _finish(figure, path, result)


def write_roc(path: Path, result: Mapping[str, Any]) -> Path:
    """ROC curve of each attack on logarithmic axes, where accusing few is seen; one small chart each."""
    attacks = result["attacks"]
    columns = min(3, len(attacks))
    lines = -(-len(attacks) // columns)
    figure = _figure(3.4 * columns + 0.6, 3.2 * lines + 1.4, "True against false positives", "Dashed: guessing.")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(attacks) :]:
        axes.set_visible(False)
    for axes, attack in zip(grid.flat, attacks, strict=False):
        rates = [[max(rate, _LOWEST_RATE) for rate in attack["roc"][side]] for side in ("fpr", "tpr")]
        axes.plot([_LOWEST_RATE, 1], [_LOWEST_RATE, 1], color=NEUTRAL, linestyle="--", linewidth=1)
        axes.step(*rates, where="post", color=ALARM if attack["auc_interval"][0] > 0.5 else SAFE, linewidth=2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(_LOWEST_RATE, 1.1)
        axes.set_ylim(_LOWEST_RATE, 1.3)
        axes.set_title(_name(attack), fontsize=11, loc="left")
        axes.set_xlabel("false positive rate", fontsize=10)
        _plain(axes)
    for line in grid:
        line[0].set_ylabel("true positive rate", fontsize=10)
    return _finish(figure, path, result)


def write_epsilon(path: Path, result: Mapping[str, Any]) -> Path:
    """Lower bound on epsilon of each attack, with the ceiling of the audit and, where there is one, the claim.

    A claim to the right of the ceiling is out of this audit's sight, and is drawn so.
    """
    rows = [
        (_name(attack), attack["epsilon"]["epsilon"], attack["epsilon"]["ceiling"], attack["claim"])
        for attack in result["attacks"]
    ] + [
        (
            _name({**entry, "attack": "canaries"}),
            entry["epsilon_lower_bound"],
            entry["ceiling"],
            None if entry["claimed_epsilon"] is None else {"epsilon": entry["claimed_epsilon"]},
        )
        for entry in result["one_run"]
    ]
    told = (
        f"Bar: lower bound ({100 * result['confidence']:g} %). Tick: what a perfect attack would show. Diamond: claim."
    )
    figure = _figure(9.0, 0.5 * len(rows) + 1.9, "Epsilon that the attacks show", told)
    axes: Axes = figure.subplots()
    for row, (_, bound, ceiling, claim) in enumerate(rows):
        contradicted = claim is not None and bound > claim["epsilon"]
        axes.barh(row, bound, height=0.45, color=ALARM if contradicted else SAFE)
        axes.plot([ceiling, ceiling], [row - 0.33, row + 0.33], color=INK, linewidth=2)
        if claim is not None:
            axes.plot([claim["epsilon"]], [row], marker="D", color=INK, markersize=7)
    _rows(axes, [name for name, *_ in rows])
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.set_xlabel("epsilon", fontsize=11)
    return _finish(figure, path, result)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _name(attack: Mapping[str, Any]) -> str:
    return f"{attack['target'].replace(':', ' ')}, {attack['attack']}"


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """White figure (inches), heading at the top left, room for the footer below."""
    figure = Figure(figsize=(width, height), facecolor="white")
    left = 0.12 / width
    figure.text(left, 1 - 0.1 / height, title, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.4 / height, subtitle, ha="left", va="top", fontsize=10, color=INK)
    bottom = 0.62 / height
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, bottom, 1, 1 - 0.7 / height - bottom)))
    return figure


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    _plain(axes)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=10)


def _finish(figure: Figure, path: Path, result: Mapping[str, Any]) -> Path:
    width = figure.get_figwidth()
    text = textwrap.wrap(f"{result['notice']} {result['not_private']}", int(13 * width))
    where = (0.12 / width, 0.1 / figure.get_figheight())
    figure.text(*where, "\n".join(text), ha="left", va="bottom", fontsize=9, color="#A03000")
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))
    return path
