"""What all figures share: colours, frame, legend, the notice at the bottom, and how a picture is written.

Figures are drawn with the Agg canvas directly, so nothing global is set up or left open. Colours are those of Okabe and
Ito (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from fediod_med.durable import write_atomically
from fediod_med.resources import NOT_FOR_CLINICAL_USE

DPI = 150
CLASS_COLOURS = {"NCR": "#56B4E9", "ED": "#009E73", "ET": "#E69F00"}
ACCENT, NEUTRAL, INK = "#D55E00", "#7A8794", "#222222"


def new_figure(width: float, height: float, *, title: str = "", subtitle: str = "", legend: bool = False) -> Figure:
    """White figure (inches) with its heading at the top left and room for legend and footer below."""
    figure = Figure(figsize=(width, height), facecolor="white")
    left = 0.12 / width
    figure.text(left, 1 - 0.1 / height, title, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.4 / height, subtitle, ha="left", va="top", fontsize=11, color=INK)
    top = 1 - (0.15 + 0.3 * bool(title) + 0.25 * bool(subtitle)) / height
    bottom = (0.75 if legend else 0.42) / height
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, bottom, 1, top - bottom), w_pad=0.05, h_pad=0.05))
    return figure


def class_legend(figure: Figure) -> None:
    """Name the classes and their colours below the axes."""
    words = {"NCR": "NCR, necrotic or non-enhancing core", "ED": "ED, oedema", "ET": "ET, enhancing tumour"}
    handles = [Patch(facecolor=CLASS_COLOURS[name], label=text) for name, text in words.items()]
    anchor = (0.12 / figure.get_figwidth(), 0.38 / figure.get_figheight())
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=anchor,
        ncols=3,
        fontsize=11,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
    )


def footer(figure: Figure, banner: str) -> None:
    """The notice and what the model may be trusted with, at the bottom; the notice stands there once."""
    text = banner if NOT_FOR_CLINICAL_USE in banner else f"{NOT_FOR_CLINICAL_USE} {banner}"
    text = textwrap.shorten(text, int(14 * figure.get_figwidth()), placeholder=" ...")
    figure.text(
        0.12 / figure.get_figwidth(),
        0.1 / figure.get_figheight(),
        text,
        ha="left",
        va="bottom",
        fontsize=10,
        color="#A03000",
    )


def open_frame(axes: Axes) -> None:
    """Leave out the upper and the right border of a chart."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=10)


def save(figure: Figure, path: Path, *, description: str = "") -> Path:
    """Write a PNG whole or not at all; `description`, for those who cannot see it, goes into its text."""
    FigureCanvasAgg(figure)
    text = {"Description": description} if description else None
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI, metadata=text))
    return path
