"""The preview of one segmented scan, in three planes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from fediod_med.errors import InputError
from fediod_med.labels import REGIONS, SEQUENCES
from fediod_med.reporting.slices import PLANES, brain_box, draw_slice, focus, grey_window, to_lps
from fediod_med.reporting.style import class_legend, footer, new_figure, save


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
    labels, spacing = to_lps(classes, affine)
    volumes = {name: to_lps(image, affine)[0] for name, image in images.items()}
    box = brain_box([labels, *volumes.values()])
    labels, volumes = labels[box], {name: volume[box] for name, volume in volumes.items()}
    centre = focus(labels, next(iter(volumes.values())))
    extent = np.array(labels.shape) * spacing
    widths = [extent[0], extent[0], extent[1]]
    height = max(extent[1], extent[2])
    scale = 11.0 / (sum(widths) + 60)
    figure = new_figure(11.0, scale * height * len(volumes) + 1.6, title=title, subtitle=subtitle, legend=True)
    grid = figure.subplots(len(volumes), 3, squeeze=False, gridspec_kw={"width_ratios": widths})
    for row, (name, volume) in enumerate(volumes.items()):
        window = grey_window(volume)
        for plane, axes in enumerate(grid[row]):
            draw_slice(axes, volume, labels, plane, centre, spacing, window, outline=row > 0)
            if row == 0:
                axes.set_title(PLANES[plane], fontsize=12)
        grid[row][0].set_ylabel(name, fontsize=12)
    class_legend(figure)
    footer(figure, banner)
    return save(figure, path)


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
