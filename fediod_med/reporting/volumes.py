"""Several volumes in one picture: real, synthetic and predicted side by side, or synthetic ones by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from fediod_med.errors import InputError
from fediod_med.labels import SEQUENCES
from fediod_med.reporting.slices import brain_box, draw_slice, focus, grey_window, to_lps
from fediod_med.reporting.style import class_legend, footer, new_figure, save
from fediod_med.resources import NOT_FOR_CLINICAL_USE


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
    figure = new_figure(9.2, 2.3 * len(rows) + 1.3, title=title, legend=True)
    grid = figure.subplots(len(rows), len(SEQUENCES), squeeze=False)
    for index, row in enumerate(rows):
        if row.image.ndim != 4 or len(row.image) != len(SEQUENCES):
            raise InputError(f"panel, {row.title}: expected an image (4, X, Y, Z), found shape {row.image.shape}")
        shape = row.image.shape[1:]
        if row.classes is not None and row.classes.shape != shape:
            raise InputError(f"panel, {row.title}: expected a label map {shape}, found {row.classes.shape}")
        # Rows that show one image share the slice of the first of them that has a label map.
        same = [r.classes for r in rows if _memory(r.image) == _memory(row.image) and r.classes is not None]
        guide, spacing = to_lps(same[0] if same else np.zeros(shape, np.uint8), _affine(row))
        volumes = [to_lps(channel, _affine(row))[0] for channel in row.image]
        overlay = None if row.classes is None else to_lps(row.classes, _affine(row))[0]
        box = brain_box([guide, *volumes])
        centre = focus(guide[box], volumes[0][box])
        for column, (name, volume) in enumerate(zip(SEQUENCES, volumes, strict=True)):
            axes: Axes = grid[index][column]
            chosen = None if overlay is None else overlay[box]
            window = grey_window(volume)
            draw_slice(axes, volume[box], chosen, 0, centre, spacing, window, outline=False, letters=column == 0)
            if index == 0:
                axes.set_title(name, fontsize=12)
        grid[index][0].set_ylabel(row.title, fontsize=12)
    class_legend(figure)
    footer(figure, banner)
    return save(figure, path)


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
        _require_fitting(row)
    chosen = [SEQUENCES.index(name) for name in sequences]
    changes = np.concatenate([np.abs(row.synthetic[chosen] - row.phantom[chosen]).ravel() for row in rows])
    limit = max(float(np.percentile(changes, 99.9)), 0.01)
    largest = float(changes.max())
    told = "Outlines: public labels on the phantom, the hospitals' ensemble on the synthetic volume."
    figure = new_figure(2.1 * 3 * len(chosen) + 0.6, 2.25 * len(rows) + 1.7, title=title, subtitle=told, legend=True)
    grid = figure.subplots(len(rows), 3 * len(chosen), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        shown = _draw_round(line, row, chosen, limit)
    for group, name in enumerate(sequences):
        for axes, word in zip(grid[0][3 * group :], ("phantom", "synthetic", "change"), strict=False):
            axes.set_title(f"{name} {word}", fontsize=12)
    bar = figure.colorbar(shown, ax=grid[:, -1], shrink=0.8, aspect=30)
    bar.set_label("change, z-scores", fontsize=11)
    class_legend(figure)
    footer(figure, banner)
    numbers = ", ".join(str(row.round) for row in rows)
    alt = (
        f"Axial slices of synthetic volumes beside the phantoms they were made from, in rounds {numbers}; "
        f"{' and '.join(sequences)}. The largest change of a voxel is {largest:.2f} z-scores. {NOT_FOR_CLINICAL_USE}"
    )
    return save(figure, path, description=alt)


def _require_fitting(row: RoundRow) -> None:
    shape = row.labels.shape
    if row.phantom.shape != (4, *shape) or row.synthetic.shape != (4, *shape) or row.ensemble.shape != shape:
        raise InputError(
            f"round {row.round}: expected phantom and synthetic (4, X, Y, Z) with class maps (X, Y, Z), found "
            f"{row.phantom.shape}, {row.synthetic.shape}, {shape}, {row.ensemble.shape}"
        )


def _draw_round(line: np.ndarray, row: RoundRow, chosen: Sequence[int], limit: float) -> AxesImage:
    """Fill a line of axes, three for each chosen sequence; gives one of the pictures of a change, -limit to limit."""
    guide, spacing = to_lps(row.labels, row.affine)
    answer, _ = to_lps(row.ensemble, row.affine)
    box = brain_box([guide, *(to_lps(channel, row.affine)[0] for channel in row.phantom)])
    for group, index in enumerate(chosen):
        before, after = (to_lps(v[index], row.affine)[0][box] for v in (row.phantom, row.synthetic))
        centre, window = focus(guide[box], before), grey_window(before)
        first = line[3 * group : 3 * group + 3]
        for axes, volume, labels in zip(first, (before, after), (guide[box], answer[box]), strict=False):
            letters = group == 0 and volume is before
            draw_slice(axes, volume, labels, 0, centre, spacing, window, outline=True, letters=letters)
        shown: AxesImage = first[2].imshow(
            (after - before)[:, :, centre[2]].T,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect=float(spacing[1] / spacing[0]),
            interpolation="nearest",
        )
        first[2].set_axis_off()
    line[0].set_ylabel(f"round {row.round}", fontsize=12)
    return shown


def _memory(image: np.ndarray) -> tuple[int, ...]:
    """Same for two views of the same voxels."""
    return (int(image.__array_interface__["data"][0]), *image.shape)


def _affine(row: PanelRow) -> np.ndarray:
    return np.eye(4) if row.affine is None else np.asarray(row.affine, dtype=float)
