"""One slice of a volume with its label map, as a radiologist expects to see it: the patient's left on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from fediod_med.labels import CLASSES
from fediod_med.metrics import bounding_box
from fediod_med.reporting.style import CLASS_COLOURS

Origin = Literal["upper", "lower"]
PLANES = ("Axial", "Coronal", "Sagittal")


def to_lps(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip `(X, Y, Z)` so that its axes run left, posterior, superior; also the spacing (3,) in mm."""
    found = io_orientation(affine)
    turn = ornt_transform(found, axcodes2ornt(("L", "P", "S")))
    sizes = voxel_sizes(affine)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = sizes
    return apply_orientation(volume, turn), spacing


def focus(labels: np.ndarray, volume: np.ndarray) -> tuple[int, int, int]:
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


def brain_box(volumes: Sequence[np.ndarray]) -> tuple[slice, ...]:
    """Box around everything that is not zero in any volume, with a margin; the whole grid when all is zero."""
    inside = np.any([volume != 0 for volume in volumes], axis=0)
    box = bounding_box(inside, margin=max(1, round(0.04 * max(inside.shape))))
    return box if box is not None else tuple(slice(0, n) for n in inside.shape)


def draw_slice(
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
    """Draw one plane of an LPS volume with its labels.

    Args:
        axes: emptied of ticks and frame.
        volume: `(X, Y, Z)` in LPS axes, see `to_lps`.
        labels: `(X, Y, Z)` classes, or none.
        plane: 0 axial, 1 coronal, 2 sagittal; index in `PLANES`.
        centre: slice index per axis, see `focus`.
        spacing: `(3,)`, mm.
        window: grey values shown as black and white.
        outline: draw the borders of the classes only, not their area.
        letters: say at the borders where left, right, front, back, top and bottom are.
    """
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


def grey_window(volume: np.ndarray) -> tuple[float, float]:
    """Grey values shown as black and white: percentiles 0.5 and 99.7 of the nonzero voxels, or zero as black."""
    inside = volume[volume != 0]
    if not inside.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(inside, [0.5, 99.7]))
    return min(low, 0.0) if low >= 0 else low, high if high > low else low + 1


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
