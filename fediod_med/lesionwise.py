"""Lesion-wise Dice and HD95 by the rules of the BraTS 2023 challenges: a missed or invented lesion costs a whole one.

Rules, as the organisers published them (Saluja et al., "BraTS 2023 lesion-wise performance metrics", and their
evaluation tool), for each region:

1. Reference components (26 neighbours) whose dilations touch are one lesion; the dilation decides only that and step 2.
2. Every predicted component that meets a lesion's dilation is matched with it, one component with several lesions if
   need be. The lesion's scores compare it with all its matched components together, undilated.
3. A lesion without a match is missed (Dice 0, HD95 374 mm). Lesions of at most 50 mm3 (gliomas) are left out, found or
   missed, but what is matched with them is not false. A predicted component of any size without a match is false.
4. Mean Dice and HD95 run over lesions and false components, which count as 0 and 374 mm; 1 and 0 mm if there are none.

Dilation counts voxels, not mm: the rules are written for 1 mm images. HD95 weights each surface element by its area, as
the challenge's tool does (surface-distance; Nikolov et al. 2021, J Med Internet Res 23(7)), so it differs by up to
about a voxel from `metrics.hd95`, whose surface voxels all count alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.utils import get_edge_surface_distance
from numpy.typing import ArrayLike
from scipy import ndimage

from fediod_med.errors import InputError
from fediod_med.labels import REGIONS, region_masks
from fediod_med.metrics import bounding_box, dice

MISS_HD95_MM = 374.0
"""Distance charged for a missed lesion and for a false component."""


@dataclass(frozen=True)
class LesionRules:
    """What a challenge chose.

    Attributes:
        dilation: steps in voxels over face and edge neighbours (18).
        smallest_mm3: reference lesions up to this volume are left out.
    """

    dilation: int
    smallest_mm3: float


RULES: Mapping[str, LesionRules] = {
    "BraTS-GLI": LesionRules(3, 50.0),
    "BraTS-SSA": LesionRules(3, 50.0),
    "BraTS-PED": LesionRules(3, 50.0),
    "BraTS-MEN": LesionRules(1, 50.0),
    "BraTS-MET": LesionRules(1, 2.0),
}
GLIOMA = RULES["BraTS-GLI"]
LESIONWISE_POLICY = (
    "Lesion-wise scores follow the BraTS 2023 glioma rules: dilation 3 voxels, reference lesions up to 50 mm3 left "
    f"out, a missed lesion or false component counts Dice 0 and HD95 {MISS_HD95_MM:.0f} mm."
)


@dataclass(frozen=True)
class LesionwiseScore:
    """Lesion-wise scores of one region of one patient.

    Attributes:
        dice: 0 to 1.
        hd95: mm, 0 to 374.
        n_tp: reference lesions above the volume limit that were found.
        n_fp: predicted components that match no reference lesion.
        n_fn: reference lesions above the volume limit that were missed.
    """

    dice: float
    hd95: float
    n_tp: int
    n_fp: int
    n_fn: int


def lesionwise_scores(
    pred_classes: ArrayLike, ref_classes: ArrayLike, spacing: Sequence[float], *, rules: LesionRules = GLIOMA
) -> dict[str, LesionwiseScore]:
    """Lesion-wise scores of the regions TC, WT and ET of two class maps `(X, Y, Z)`; `spacing` in mm.

    Raises:
        InputError: the shapes differ, or `spacing` does not give one positive size per axis.
    """
    pred, ref = np.asarray(pred_classes), np.asarray(ref_classes)
    if pred.shape != ref.shape:
        raise InputError(f"lesion-wise scores: expected two label maps of one shape, found {pred.shape}, {ref.shape}")
    box = bounding_box((pred != 0) | (ref != 0), margin=rules.dilation + 1)
    if box is not None:
        pred, ref = pred[box], ref[box]
    pred_masks, ref_masks = region_masks(pred), region_masks(ref)
    return {region: score_lesions(pred_masks[region], ref_masks[region], spacing, rules=rules) for region in REGIONS}


def score_lesions(
    pred_mask: np.ndarray, ref_mask: np.ndarray, spacing: Sequence[float], *, rules: LesionRules = GLIOMA
) -> LesionwiseScore:
    """Lesion-wise scores of one region: two boolean masks `(X, Y, Z)`, `spacing` in mm; errors as above."""
    pred, ref = np.asarray(pred_mask, dtype=bool), np.asarray(ref_mask, dtype=bool)
    if pred.ndim != 3 or pred.shape != ref.shape:
        raise InputError(f"lesion-wise scores: expected two masks of one shape, found {pred.shape} and {ref.shape}")
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise InputError(f"lesion-wise scores: expected 3 positive voxel sizes in mm, found {tuple(spacing)}")
    components, n_components = ndimage.label(pred, structure=np.ones((3, 3, 3)))
    # The dilation of a lesion is exactly the dilated component that holds it, so one labelling serves steps 1 and 2.
    near = ndimage.generate_binary_structure(3, 2)
    reach, n_lesions = ndimage.label(
        ndimage.binary_dilation(ref, structure=near, iterations=rules.dilation), structure=np.ones((3, 3, 3))
    )
    voxel_mm3 = math.prod(float(s) for s in spacing)
    matched: set[int] = set()
    dices: list[float] = []
    distances: list[float] = []
    found = 0
    for lesion in range(1, n_lesions + 1):
        inside = reach == lesion
        touching = np.unique(components[inside])
        touching = touching[touching != 0]
        matched.update(touching.tolist())
        body = ref & inside
        if np.count_nonzero(body) * voxel_mm3 <= rules.smallest_mm3:
            continue
        found += bool(len(touching))
        answer = np.isin(components, touching)
        dices.append(dice(answer, body))
        distances.append(surface_hd95(answer, body, spacing) if len(touching) else MISS_HD95_MM)
    false = n_components - len(matched)
    counted = len(dices) + false
    return LesionwiseScore(
        dice=sum(dices) / counted if counted else 1.0,
        hd95=(sum(distances) + MISS_HD95_MM * false) / counted if counted else 0.0,
        n_tp=found,
        n_fp=false,
        n_fn=len(dices) - found,
    )


def surface_hd95(pred_mask: np.ndarray, ref_mask: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance with surface elements weighted by their area.

    Surface elements lie between eight voxels; distances and areas come from MONAI's port of surface-distance.

    Args:
        pred_mask: not empty, `(X, Y, Z)` boolean.
        ref_mask: likewise, same shape.
        spacing: voxel size per axis in mm.

    Returns:
        mm; the larger of the two directions.
    """
    box = bounding_box(pred_mask | ref_mask)
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own deprecated argument; nothing here can avoid it.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*", category=FutureWarning)
        edges, distances, areas = get_edge_surface_distance(
            torch.from_numpy(np.ascontiguousarray(pred_mask[box])),
            torch.from_numpy(np.ascontiguousarray(ref_mask[box])),
            spacing=[float(s) for s in spacing],
            use_subvoxels=True,
            symmetric=True,
        )
    directed = []
    for edge, distance, area in zip(edges, distances, areas, strict=True):
        order = torch.argsort(distance)
        share = torch.cumsum(area[edge][order].double(), dim=0)
        at = int(torch.searchsorted(share, 0.95 * float(share[-1])))
        directed.append(float(distance[order[min(at, len(order) - 1)]]))
    return max(directed)
