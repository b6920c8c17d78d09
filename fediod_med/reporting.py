"""Turns scores and scans into figures and tables; no model in sight, and no display needed.

The only home of matplotlib: figures are drawn with the Agg canvas directly, so nothing global is set up or left open.
Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from rich.table import Table

from fediod_med.durable import write_atomically
from fediod_med.errors import InputError
from fediod_med.labels import CLASSES, REGIONS, SEQUENCES
from fediod_med.metrics import ABSENT_REGION_POLICY, bounding_box
from fediod_med.resources import NOT_FOR_CLINICAL_USE

DPI = 150
CLASS_COLOURS = {"NCR": "#56B4E9", "ED": "#009E73", "ET": "#E69F00"}
ACCENT, NEUTRAL, INK = "#D55E00", "#7A8794", "#222222"
COLUMNS = (*REGIONS, "mean")
_TABLE_HEAD = ["model", *COLUMNS, "95 % interval", "HD95", "worst hospital"]
Origin = Literal["upper", "lower"]
_PLANES = ("Axial", "Coronal", "Sagittal")


class Scan(Protocol):
    """What a preview needs of a segmented scan; `inference.Segmentation` has it."""

    @property
    def subject_id(self) -> str:
        """The case."""

    @property
    def classes(self) -> np.ndarray:
        """Class map `(X, Y, Z)`."""

    @property
    def affine(self) -> np.ndarray:
        """Voxel to world matrix, mm."""

    @property
    def image(self) -> np.ndarray | None:
        """Four sequences `(4, X, Y, Z)`."""

    @property
    def volumes_ml(self) -> Mapping[str, float]:
        """Millilitres by class and region."""


@dataclass(frozen=True)
class PanelRow:
    """One row of the slice panel.

    Attributes:
        title: shown at the left.
        image: `(4, X, Y, Z)`, the sequences in the usual order.
        classes: `(X, Y, Z)` overlay, or none.
        affine: voxel to world matrix; RAS with 1 mm voxels when omitted.
    """

    title: str
    image: np.ndarray
    classes: np.ndarray | None = None
    affine: np.ndarray | None = None


@dataclass(frozen=True)
class RoundRow:
    """One round of `write_rounds`: a synthetic volume beside the phantom it was made from.

    Attributes:
        round: shown at the left.
        phantom: `(4, X, Y, Z)`, z-scores, the sequences in the usual order.
        synthetic: `(4, X, Y, Z)`.
        labels: `(X, Y, Z)` class map of the phantom.
        ensemble: `(X, Y, Z)` what the hospitals together made of the synthetic volume.
        affine: voxel to world matrix.
    """

    round: int
    phantom: np.ndarray
    synthetic: np.ndarray
    labels: np.ndarray
    ensemble: np.ndarray
    affine: np.ndarray


# --- scans ------------------------------------------------------------------------------------------------------------


def write_preview(
    path: Path,
    images: Mapping[str, np.ndarray],
    classes: np.ndarray,
    affine: np.ndarray,
    *,
    title: str = "",
    subtitle: str = "",
    banner: str = "",
) -> Path:
    """Tri-planar picture of a scan with its label map, one row per image, through the largest tumour area.

    Radiological convention: the patient's left is on the right of axial and coronal pictures, the nose points left in
    sagittal ones; letters at the borders say so. Voxels keep their true proportions.

    Args:
        path: of the PNG.
        images: `(X, Y, Z)` by name, on the grid of `classes`.
        classes: `(X, Y, Z)` with values 0 to 3.
        affine: voxel to world matrix, mm; oblique grids are shown along their own axes, named by the nearest direction.
        title: first line.
        subtitle: second line, for example the volumes.
        banner: what the model may be trusted with, such as `NOT PRIVATE`; the notice is always added.

    Raises:
        InputError: an image has another shape than the label map.
    """
    for name, image in images.items():
        if image.shape != classes.shape:
            raise InputError(f"preview: expected {name} of shape {classes.shape} as the label map, found {image.shape}")
    labels, spacing = _to_lps(classes, affine)
    volumes = {name: _to_lps(image, affine)[0] for name, image in images.items()}
    box = _brain_box([labels, *volumes.values()])
    labels, volumes = labels[box], {name: volume[box] for name, volume in volumes.items()}
    centre = _focus(labels, next(iter(volumes.values())))
    extent = np.array(labels.shape) * spacing
    widths = [extent[0], extent[0], extent[1]]
    height = max(extent[1], extent[2])
    scale = 11.0 / (sum(widths) + 60)
    figure = _figure(11.0, scale * height * len(volumes) + 1.6, title=title, subtitle=subtitle, legend=True)
    grid = figure.subplots(len(volumes), 3, squeeze=False, gridspec_kw={"width_ratios": widths})
    for row, (name, volume) in enumerate(volumes.items()):
        window = _window(volume)
        for plane, axes in enumerate(grid[row]):
            _show(axes, volume, labels, plane, centre, spacing, window, outline=row > 0)
            if row == 0:
                axes.set_title(_PLANES[plane], fontsize=12)
        grid[row][0].set_ylabel(name, fontsize=12)
    _class_legend(figure)
    _footer(figure, banner)
    return _save(figure, path)


def preview(path: Path, scan: Scan, *, banner: str = "") -> Path:
    """`write_preview` of a segmented scan: T1c and FLAIR with the label map and its volumes.

    Raises:
        InputError: the record carries no image.
    """
    if scan.image is None:
        raise InputError(f"{scan.subject_id}: expected the scan beside its label map for a preview, found none")
    shown = {name: scan.image[SEQUENCES.index(name)] for name in ("T1c", "FLAIR")}
    volumes = "   ".join(f"{region} {scan.volumes_ml[region]:.1f} ml" for region in REGIONS)
    return write_preview(path, shown, scan.classes, scan.affine, title=scan.subject_id, subtitle=volumes, banner=banner)


def write_panel(path: Path, rows: Sequence[PanelRow], *, title: str = "", banner: str = "") -> Path:
    """Axial slices, one row per volume and one column per sequence, through the largest labelled area of each row.

    Rows that show the same image share their slice; a row without a label map shows the image alone.

    Args:
        path: of the PNG.
        rows: for example real, synthetic, ensemble prediction, student prediction.
        title: first line.
        banner: as in `write_preview`.

    Raises:
        InputError: no rows, or a row of another shape than `(4, X, Y, Z)` with a matching label map.
    """
    if not rows:
        raise InputError("panel: expected at least one row, found none")
    figure = _figure(9.2, 2.3 * len(rows) + 1.3, title=title, legend=True)
    grid = figure.subplots(len(rows), len(SEQUENCES), squeeze=False)
    for index, row in enumerate(rows):
        if row.image.ndim != 4 or len(row.image) != len(SEQUENCES):
            raise InputError(f"panel, {row.title}: expected an image (4, X, Y, Z), found shape {row.image.shape}")
        shape = row.image.shape[1:]
        if row.classes is not None and row.classes.shape != shape:
            raise InputError(f"panel, {row.title}: expected a label map {shape}, found {row.classes.shape}")
        # Rows that show one image share the slice of the first of them that has a label map.
        same = [r.classes for r in rows if _memory(r.image) == _memory(row.image) and r.classes is not None]
        guide, spacing = _to_lps(same[0] if same else np.zeros(shape, np.uint8), _affine(row))
        volumes = [_to_lps(channel, _affine(row))[0] for channel in row.image]
        overlay = None if row.classes is None else _to_lps(row.classes, _affine(row))[0]
        box = _brain_box([guide, *volumes])
        centre = _focus(guide[box], volumes[0][box])
        for column, (name, volume) in enumerate(zip(SEQUENCES, volumes, strict=True)):
            axes: Axes = grid[index][column]
            chosen = None if overlay is None else overlay[box]
            _show(axes, volume[box], chosen, 0, centre, spacing, _window(volume), outline=False, letters=column == 0)
            if index == 0:
                axes.set_title(name, fontsize=12)
        grid[index][0].set_ylabel(row.title, fontsize=12)
    _class_legend(figure)
    _footer(figure, banner)
    return _save(figure, path)


def write_rounds(
    path: Path, rows: Sequence[RoundRow], *, sequences: Sequence[str] = ("T1c", "FLAIR"), title: str = "", banner: str
) -> Path:
    """Axial slices by round: phantom, synthetic volume and the change between them, for each of `sequences`.

    Outlines are the public label map on the phantom and the ensemble's answer on the synthetic volume; the slice is
    where the label map is largest. Phantom and synthetic share their grey values; all changes share their colours. The
    picture's description for those who cannot see it is in the PNG's text (`Description`).

    Args:
        path: of the PNG.
        rows: one a round.
        sequences: which to show, of `labels.SEQUENCES`.
        title: first line.
        banner: as in `write_preview`.

    Raises:
        InputError: no rows, or a row whose arrays do not fit each other.
    """
    if not rows:
        raise InputError("rounds: expected at least one round, found none")
    for row in rows:
        shape = row.labels.shape
        if row.phantom.shape != (4, *shape) or row.synthetic.shape != (4, *shape) or row.ensemble.shape != shape:
            raise InputError(
                f"round {row.round}: expected phantom and synthetic (4, X, Y, Z) with class maps (X, Y, Z), found "
                f"{row.phantom.shape}, {row.synthetic.shape}, {shape}, {row.ensemble.shape}"
            )
    chosen = [SEQUENCES.index(name) for name in sequences]
    changes = np.concatenate([np.abs(row.synthetic[chosen] - row.phantom[chosen]).ravel() for row in rows])
    limit = max(float(np.percentile(changes, 99.9)), 0.01)
    largest = float(changes.max())
    told = "Outlines: public labels on the phantom, the hospitals' ensemble on the synthetic volume."
    figure = _figure(2.1 * 3 * len(chosen) + 0.6, 2.25 * len(rows) + 1.7, title=title, subtitle=told, legend=True)
    grid = figure.subplots(len(rows), 3 * len(chosen), squeeze=False)
    shown = None
    for line, row in zip(grid, rows, strict=True):
        guide, spacing = _to_lps(row.labels, row.affine)
        answer, _ = _to_lps(row.ensemble, row.affine)
        box = _brain_box([guide, *(_to_lps(channel, row.affine)[0] for channel in row.phantom)])
        for group, index in enumerate(chosen):
            before, after = (_to_lps(v[index], row.affine)[0][box] for v in (row.phantom, row.synthetic))
            centre, window = _focus(guide[box], before), _window(before)
            first = line[3 * group : 3 * group + 3]
            for axes, volume, labels in zip(first, (before, after), (guide[box], answer[box]), strict=False):
                letters = group == 0 and volume is before
                _show(axes, volume, labels, 0, centre, spacing, window, outline=True, letters=letters)
            shown = first[2].imshow(
                (after - before)[:, :, centre[2]].T,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                aspect=float(spacing[1] / spacing[0]),
                interpolation="nearest",
            )
            first[2].set_axis_off()
        line[0].set_ylabel(f"round {row.round}", fontsize=12)
    for group, name in enumerate(sequences):
        for axes, word in zip(grid[0][3 * group :], ("phantom", "synthetic", "change"), strict=False):
            axes.set_title(f"{name} {word}", fontsize=12)
    assert shown is not None
    bar = figure.colorbar(shown, ax=grid[:, -1], shrink=0.8, aspect=30)
    bar.set_label("change, z-scores", fontsize=11)
    _class_legend(figure)
    _footer(figure, banner)
    numbers = ", ".join(str(row.round) for row in rows)
    alt = (
        f"Axial slices of synthetic volumes beside the phantoms they were made from, in rounds {numbers}; "
        f"{' and '.join(sequences)}. The largest change of a voxel is {largest:.2f} z-scores. {NOT_FOR_CLINICAL_USE}"
    )
    return _save(figure, path, description=alt)


# --- numbers ----------------------------------------------------------------------------------------------------------


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
    figure = _figure(3.7 * columns + 0.5, 2.5 * lines + 1.3, title=title, subtitle=told)
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
        _plain(axes)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
        axes.margins(x=0.03, y=0.12)
    for axes in grid.flat[max(0, len(series) - columns) : len(series)]:
        axes.set_xlabel(x, fontsize=11)
    _footer(figure, banner)
    return _save(figure, path)


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
    figure = _figure(12.0, 0.42 * len(rows) + 1.9, title=title, subtitle=told)
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
        _plain(axes)
    _footer(figure, banner)
    return _save(figure, path)


def write_figures(
    folder: Path,
    *,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    panel: Sequence[PanelRow],
    banner: str = "",
) -> dict[str, Path]:
    """The figures of a distillation run: `comparison.png`, `curves.png`, `panel.png`.

    Args:
        folder: made when absent.
        summary: with `rows` (`evaluation.summarise` by key) and `data`, the words for what was scored.
        history: loss terms by round; no curves are drawn when it holds no numbers.
        panel: real, synthetic, ensemble, student.
        banner: as in `write_preview`.

    Returns:
        Paths by name without ending.
    """
    rows = summary["rows"]
    patients = next(iter(rows.values())).get("patients")
    note = f"{patients} held-out {summary.get('data', 'patients')}" if patients else str(summary.get("data", ""))
    paths = {
        "comparison": write_comparison(
            folder / "comparison.png", rows, title="Every row on the same held-out scans", note=note, banner=banner
        ),
        "panel": write_panel(folder / "panel.png", panel, title="Slices, radiological view", banner=banner),
    }
    if any(math.isfinite(_number(value)) for record in history for key, value in record.items() if key != "round"):
        paths["curves"] = write_training_curves(
            folder / "curves.png", history, title="Distillation by round", banner=banner
        )
    return paths


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
    for name in _TABLE_HEAD:
        table.add_column(name, justify="left" if name == _TABLE_HEAD[0] else "right")
    for cells, key in zip(_cells(rows), rows, strict=True):
        table.add_row(*cells, style="bold" if key == highlight else None)
    return table


def results_markdown(summary: Mapping[str, Any]) -> str:
    """`summary["rows"]` as a Markdown table with its policy below."""
    lines = [_TABLE_HEAD, ["---", *["---:"] * (len(_TABLE_HEAD) - 1)], *_cells(summary["rows"])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    policy = f"{ABSENT_REGION_POLICY} {NOT_FOR_CLINICAL_USE}"
    return f"{table}\n\nMean Dice over patients; interval of the mean; HD95 in mm. {policy}\n"


# --- records ----------------------------------------------------------------------------------------------------------


# --- drawing ----------------------------------------------------------------------------------------------------------


def _to_lps(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip `(X, Y, Z)` so that its axes run left, posterior, superior; also the spacing (3,) in mm."""
    found = io_orientation(affine)
    turn = ornt_transform(found, axcodes2ornt(("L", "P", "S")))
    sizes = voxel_sizes(affine)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = sizes
    return apply_orientation(volume, turn), spacing


def _focus(labels: np.ndarray, volume: np.ndarray) -> tuple[int, int, int]:
    """Slice index per axis: where the label map is largest, else the middle of the nonzero image."""
    tumour = labels > 0
    if tumour.any():
        counts = [tumour.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
        # the middle of a plateau, not its first slice
        return tuple(int(np.median(np.flatnonzero(c == c.max()))) for c in counts)  # type: ignore[return-value]
    inside = volume != 0
    if not inside.any():
        inside = np.ones(volume.shape, dtype=bool)
    ranges = [np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(int((r[0] + r[-1]) // 2) for r in ranges)  # type: ignore[return-value]


def _brain_box(volumes: Sequence[np.ndarray]) -> tuple[slice, ...]:
    """Box around everything that is not zero in any volume, with a margin; the whole grid when all is zero."""
    inside = np.any([volume != 0 for volume in volumes], axis=0)
    box = bounding_box(inside, margin=max(1, round(0.04 * max(inside.shape))))
    return box if box is not None else tuple(slice(0, n) for n in inside.shape)


def _show(
    axes: Axes,
    volume: np.ndarray,
    labels: np.ndarray | None,
    plane: int,
    centre: Sequence[int],
    spacing: np.ndarray,
    window: tuple[float, float],
    *,
    outline: bool,
    letters: bool = True,
) -> None:
    """Draw one plane (0 axial, 1 coronal, 2 sagittal) of an LPS volume with its labels."""
    axis = (2, 1, 0)[plane]
    across, down = ((0, 1), (0, 2), (1, 2))[plane]
    picture = np.take(volume, centre[axis], axis=axis).T
    aspect = float(spacing[down] / spacing[across])
    # Rows run towards posterior (down) in axial pictures and towards superior (up) in the other two.
    origin: Origin = "upper" if plane == 0 else "lower"
    low, high = window
    picture = np.where(picture == 0, low, picture)  # outside the brain: black, for z-scores too
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, origin=origin, aspect=aspect, interpolation="nearest")
    if labels is not None:
        chosen = np.take(labels, centre[axis], axis=axis).T
        _overlay(axes, chosen, origin, aspect, outline=outline)
    if letters:
        left, right = ("R", "L") if plane < 2 else ("A", "P")
        top, bottom = ("A", "P") if plane == 0 else ("S", "I")
        edge = [withStroke(linewidth=2.5, foreground="black")]
        style: dict[str, Any] = {"color": "white", "fontsize": 12, "fontweight": "bold", "path_effects": edge}
        style["transform"] = axes.transAxes
        axes.text(0.02, 0.5, left, ha="left", va="center", **style)
        axes.text(0.98, 0.5, right, ha="right", va="center", **style)
        axes.text(0.5, 0.98, top, ha="center", va="top", **style)
        axes.text(0.5, 0.02, bottom, ha="center", va="bottom", **style)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _overlay(axes: Axes, labels: np.ndarray, origin: Origin, aspect: float, *, outline: bool) -> None:
    """Tint the classes of a picture, or draw their borders only."""
    for index, name in enumerate(CLASSES):
        mask = labels == index
        if not index or not mask.any():
            continue
        colour = CLASS_COLOURS[name]
        if outline:
            # padded, so that a region at the border of the picture keeps a closed outline
            padded = np.pad(mask, 1).astype(float)
            steps = [np.arange(n) - 1 for n in padded.shape]
            axes.contour(steps[1], steps[0], padded, levels=[0.5], colors=[colour], linewidths=1.6)
        else:
            red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
            tint = np.zeros((*mask.shape, 4))
            tint[mask] = (red, green, blue, 0.55)
            axes.imshow(tint, origin=origin, aspect=aspect, interpolation="nearest")


def _window(volume: np.ndarray) -> tuple[float, float]:
    """Grey values shown as black and white: percentiles 0.5 and 99.7 of the nonzero voxels, or zero as black."""
    inside = volume[volume != 0]
    if not inside.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(inside, [0.5, 99.7]))
    return min(low, 0.0) if low >= 0 else low, high if high > low else low + 1


def _memory(image: np.ndarray) -> tuple[int, ...]:
    """Same for two views of the same voxels."""
    return (int(image.__array_interface__["data"][0]), *image.shape)


def _affine(row: PanelRow) -> np.ndarray:
    return np.eye(4) if row.affine is None else np.asarray(row.affine, dtype=float)


def _figure(width: float, height: float, *, title: str = "", subtitle: str = "", legend: bool = False) -> Figure:
    """White figure (inches) with its heading at the top left and room for legend and footer below."""
    figure = Figure(figsize=(width, height), facecolor="white")
    left = 0.12 / width
    figure.text(left, 1 - 0.1 / height, title, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.4 / height, subtitle, ha="left", va="top", fontsize=11, color=INK)
    top = 1 - (0.15 + 0.3 * bool(title) + 0.25 * bool(subtitle)) / height
    bottom = (0.75 if legend else 0.42) / height
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, bottom, 1, top - bottom), w_pad=0.05, h_pad=0.05))
    return figure


def _class_legend(figure: Figure) -> None:
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


def _footer(figure: Figure, banner: str) -> None:
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


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=10)


def _save(figure: Figure, path: Path, *, description: str = "") -> Path:
    FigureCanvasAgg(figure)
    text = {"Description": description} if description else None
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI, metadata=text))
    return path


# --- values -----------------------------------------------------------------------------------------------------------


def _cells(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    table = []
    for key, row in rows.items():
        interval = "{:.2f} to {:.2f}".format(*row["ci95"]["mean"]) if "ci95" in row else "-"
        distance = f"{row['hd95_mm']['mean']:.1f}" if "hd95_mm" in row else "-"
        worst = f"{row['worst_site']} {row['worst_site_mean']:.3f}" if row.get("worst_site") else "-"
        table.append([row_name(key), *(f"{row[column]:.3f}" for column in COLUMNS), interval, distance, worst])
    return table


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else math.nan


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median over a centred window of about a fifteenth of the series (finite values)."""
    half = len(values) // 30
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
