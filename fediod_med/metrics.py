"""Agreement of two label maps: Dice and 95 % Hausdorff distance under a written policy for absent regions.

Policy (BraTS 2017-2022 convention): a region absent from both maps is a perfect answer (Dice 1, HD95 0 mm); a region
present in exactly one of them is a complete miss (Dice 0, HD95 373.13 mm). A mean therefore never skips a patient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from numpy.typing import ArrayLike

from fediod_med.errors import InputError
from fediod_med.labels import REGIONS, region_masks

ABSENT_HD95_MM = math.hypot(240.0, 240.0, 155.0)
"""Penalty in mm for a region found in only one of two maps: the diagonal of the 240x240x155 mm BraTS volume."""

ABSENT_REGION_POLICY = (
    "A region absent from prediction and reference scores Dice 1 and HD95 0 mm; absent from exactly one of them it "
    f"scores Dice 0 and HD95 {ABSENT_HD95_MM:.2f} mm (diagonal of the 240x240x155 mm BraTS volume). "
    "Means over non-empty references are given beside the means over all patients."
)


class RegionScore(TypedDict):
    """Scores of one region of one patient."""

    dice: float
    hd95: float
    reference_empty: bool


def dice(pred_mask: ArrayLike, ref_mask: ArrayLike) -> float:
    """Dice coefficient `2 |P and R| / (|P| + |R|)` of two masks (Dice 1945, Ecology 26(3)).

    Args:
        pred_mask: mask of any shape, nonzero = inside; array or CPU tensor.
        ref_mask: mask of the same shape.

    Returns:
        A number from 0 to 1; 1 when both masks are empty, 0 when exactly one is.

    Raises:
        InputError: the shapes differ.
    """
    pred, ref = _pair(pred_mask, ref_mask)
    total = int(np.count_nonzero(pred)) + int(np.count_nonzero(ref))
    return 2.0 * int(np.count_nonzero(pred & ref)) / total if total else 1.0


def hd95(pred_mask: ArrayLike, ref_mask: ArrayLike, spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance between the surfaces of two masks.

    The larger of the two directed 95th percentiles (Huttenlocher et al. 1993, IEEE TPAMI 15(9)), computed by MONAI on
    the bounding box of both masks; a voxel belongs to the surface when a face neighbour is outside the mask.

    Args:
        pred_mask: mask `(D, H, W)`, nonzero = inside; array or CPU tensor.
        ref_mask: mask of the same shape.
        spacing: voxel size per axis in mm.

    Returns:
        Distance in mm; 0 when both masks are empty, `ABSENT_HD95_MM` when exactly one is.

    Raises:
        InputError: the shapes differ, or `spacing` does not give one positive size per axis.
    """
    pred, ref = _pair(pred_mask, ref_mask)
    if len(spacing) != pred.ndim or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise InputError(f"HD95: expected {pred.ndim} positive voxel sizes in mm, found {tuple(spacing)}")
    box = bounding_box(pred | ref, margin=1)
    if box is None:
        return 0.0
    pred, ref = pred[box], ref[box]
    if not pred.any() or not ref.any():
        return ABSENT_HD95_MM
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own deprecated argument; nothing here can avoid it.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*", category=FutureWarning)
        distance = compute_hausdorff_distance(
            torch.from_numpy(pred)[None, None],
            torch.from_numpy(ref)[None, None],
            include_background=True,  # the default drops channel 0, which here is the mask itself
            percentile=95,
            spacing=[float(s) for s in spacing],
        )
    return float(distance.item())


def region_scores(pred_classes: ArrayLike, ref_classes: ArrayLike, spacing: Sequence[float]) -> dict[str, RegionScore]:
    """Dice and HD95 of the nested regions TC, WT and ET.

    Args:
        pred_classes: class map `(D, H, W)` with values 0 to 3 (background, NCR, ED, ET).
        ref_classes: class map of the same shape.
        spacing: voxel size per axis in mm.

    Returns:
        One `RegionScore` (`dice`, `hd95` in mm, `reference_empty`) per region, in the order TC, WT, ET.

    Raises:
        InputError: the shapes differ, or `spacing` does not give one positive size per axis.
    """
    pred, ref = np.asarray(pred_classes), np.asarray(ref_classes)
    if pred.shape != ref.shape:
        raise InputError(f"scores: expected two label maps of one shape, found {pred.shape} and {ref.shape}")
    box = bounding_box((pred != 0) | (ref != 0), margin=1)
    if box is not None:
        pred, ref = pred[box], ref[box]
    pred_masks, ref_masks = region_masks(pred), region_masks(ref)
    return {
        region: RegionScore(
            dice=dice(pred_masks[region], ref_masks[region]),
            hd95=hd95(pred_masks[region], ref_masks[region], spacing),
            reference_empty=not ref_masks[region].any(),
        )
        for region in REGIONS
    }


def bounding_box(mask: np.ndarray, *, margin: int = 0) -> tuple[slice, ...] | None:
    """Smallest box around the nonzero voxels of a mask of any shape, grown by `margin` voxels inside the array.

    Returns:
        One slice per axis, or none when the mask is empty.
    """
    box = []
    for axis, size in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not len(inside):
            return None
        box.append(slice(max(int(inside[0]) - margin, 0), min(int(inside[-1]) + 1 + margin, size)))
    return tuple(box)


def _pair(pred_mask: ArrayLike, ref_mask: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    pred, ref = np.asarray(pred_mask).astype(bool), np.asarray(ref_mask).astype(bool)
    if pred.shape != ref.shape:
        raise InputError(f"scores: expected two masks of one shape, found {pred.shape} and {ref.shape}")
    return pred, ref
