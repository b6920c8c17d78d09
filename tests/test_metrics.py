"""Dice and HD95 on named toy pairs with exact scores, and the bounding-box shortcut against the long way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance

from fediod_med.errors import InputError
from fediod_med.metrics import ABSENT_HD95_MM, bounding_box, dice, hd95, region_scores

SHAPE = (12, 10, 8)


def block(start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


EMPTY = np.zeros(SHAPE, dtype=bool)
BLOCK = block((2, 2, 2), (6, 6, 6))
HALF = block((4, 2, 2), (8, 6, 6))  # shares half of BLOCK
PAIRS = {
    "both empty": (EMPTY, EMPTY, 1.0, 0.0),
    "empty prediction": (EMPTY, BLOCK, 0.0, ABSENT_HD95_MM),
    "empty reference": (BLOCK, EMPTY, 0.0, ABSENT_HD95_MM),
    "equal": (BLOCK, BLOCK, 1.0, 0.0),
    "half overlap": (HALF, BLOCK, 0.5, 2.0),
    "disjoint voxels": (block((0, 0, 0), (1, 1, 1)), block((3, 4, 0), (4, 5, 1)), 0.0, 5.0),
    "prediction inside": (block((2, 2, 2), (6, 6, 4)), BLOCK, 2 * 32 / 96, 2.0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_named_pairs_score_exactly(name: str) -> None:
    pred, ref, expected_dice, expected_hd95 = PAIRS[name]
    assert dice(pred, ref) == pytest.approx(expected_dice, abs=1e-12)
    assert hd95(pred, ref, (1, 1, 1)) == pytest.approx(expected_hd95, abs=1e-6)


def test_penalty_is_the_diagonal_of_the_brats_volume() -> None:
    assert pytest.approx(373.13, abs=0.005) == ABSENT_HD95_MM


@pytest.mark.parametrize(("axis", "spacing"), [(0, (0.5, 1, 5)), (1, (0.5, 1, 5)), (2, (0.5, 1, 5))])
def test_shift_by_one_voxel_costs_that_axis_spacing(axis: int, spacing: tuple[float, ...]) -> None:
    # The two faces across `axis` move by one voxel; 32 of 56 surface voxels, so the 95th percentile sees them.
    assert hd95(np.roll(BLOCK, 1, axis), BLOCK, spacing) == pytest.approx(spacing[axis], abs=1e-6)


def test_percentile_ignores_a_few_stray_voxels() -> None:
    pred = block((1, 1, 1), (9, 9, 7))
    stray = pred.copy()
    stray[11, 9, 7] = True
    assert hd95(stray, pred, (1, 1, 1)) == 0.0


def test_dice_accepts_tensors() -> None:
    assert dice(torch.from_numpy(HALF), torch.from_numpy(BLOCK)) == 0.5


def test_different_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="one shape"):
        dice(BLOCK, BLOCK[:-1])
    with pytest.raises(InputError, match="one shape"):
        region_scores(BLOCK, BLOCK[:-1], (1, 1, 1))


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, math.nan)])
def test_impossible_spacing_is_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="voxel sizes"):
        hd95(BLOCK, BLOCK, spacing)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*:FutureWarning")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), density=st.floats(0.002, 0.5), border=st.booleans())
def test_cropping_never_changes_hd95(seed: int, density: float, border: bool) -> None:
    rng = np.random.default_rng(seed)
    pred, ref = rng.random((2, 11, 9, 7)) < density
    if not border:
        for mask in (pred, ref):
            mask[:2] = mask[-3:] = False
    pred[5, 4, 3] = ref[4, 4, 4] = True
    spacing = [1.5, 1.0, 3.0]
    whole = compute_hausdorff_distance(
        torch.from_numpy(pred)[None, None],
        torch.from_numpy(ref)[None, None],
        include_background=True,
        percentile=95,
        spacing=spacing,
    )
    padded = hd95(np.pad(pred, 6), np.pad(ref, 6), spacing)
    assert hd95(pred, ref, spacing) == pytest.approx(whole.item(), abs=1e-5)
    assert padded == pytest.approx(whole.item(), abs=1e-5)


def test_hd95_is_symmetric() -> None:
    pred, ref = PAIRS["prediction inside"][:2]
    assert hd95(pred, ref, (1, 2, 3)) == hd95(ref, pred, (1, 2, 3))


def test_regions_nest_and_absent_regions_follow_the_policy() -> None:
    ref = np.zeros(SHAPE, dtype=np.uint8)
    ref[1:9, 1:9, 1:7] = 2
    ref[2:6, 2:6, 2:6] = 1
    pred = ref.copy()
    pred[2, 2, 2] = 3  # one false enhancing voxel, inside the core
    scores = region_scores(pred, ref, (1, 1, 1))
    assert list(scores) == ["TC", "WT", "ET"]
    assert scores["WT"] == {"dice": 1.0, "hd95": 0.0, "reference_empty": False}
    assert scores["TC"] == {"dice": 1.0, "hd95": 0.0, "reference_empty": False}
    assert scores["ET"] == {"dice": 0.0, "hd95": ABSENT_HD95_MM, "reference_empty": True}


def test_region_scores_of_two_empty_maps_are_perfect() -> None:
    scores = region_scores(np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8), (1, 1, 1))
    assert all(s == {"dice": 1.0, "hd95": 0.0, "reference_empty": True} for s in scores.values())


def test_bounding_box_grows_inside_the_array_only() -> None:
    assert bounding_box(block((0, 3, 2), (2, 5, 8)), margin=1) == (slice(0, 3), slice(2, 6), slice(1, 8))
    assert bounding_box(EMPTY) is None
