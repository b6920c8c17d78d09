"""Lesions against shapes whose measures are known, a brute-force search, and turned images of the same patient."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import pdist
from skimage.measure import marching_cubes

from fediod_med.data.layouts import find_subjects
from fediod_med.data.nifti.reading import read_label, read_subject
from fediod_med.errors import GeometryError
from fediod_med.labels import REGIONS, get_scheme
from fediod_med.lesions import (
    Lesion,
    face_centres,
    find_midline,
    largest_diameter,
    measure_lesions,
    planar_diameters,
    without_small_lesions,
)

SPACING = (2.0, 1.0, 3.0)
AFFINE = np.array([[2.0, 0, 0, -30], [0, 1.0, 0, -10], [0, 0, 3.0, 5], [0, 0, 0, 1]])


def box_map(*boxes: tuple[slice, slice, slice], shape=(31, 20, 14), label: int = 2) -> np.ndarray:
    classes = np.zeros(shape, dtype=np.uint8)
    for box in boxes:
        classes[box] = label
    return classes


def only(classes: np.ndarray, affine: np.ndarray = AFFINE, region: str = "WT", **more) -> Lesion:
    (lesion,) = measure_lesions(classes, affine, **more).regions[region]
    return lesion


def test_a_box_has_the_measures_of_a_box() -> None:
    lesion = only(box_map((slice(3, 8), slice(4, 16), slice(5, 7))))
    assert lesion.voxels == 5 * 12 * 2
    assert lesion.volume_ml == pytest.approx(120 * 6 / 1000)
    # 10 x 12 x 6 mm. Between the faces 10 mm apart, from corner voxel to corner voxel: 11 mm across and 3 mm up.
    assert lesion.diameter_mm == pytest.approx(np.sqrt(10**2 + 11**2 + 3**2))
    assert lesion.axial_diameter_mm == pytest.approx(np.hypot(10, 11))
    assert lesion.axial_slice in (5, 6)
    assert lesion.centroid_mm == pytest.approx((2 * 5 - 30, 9.5 - 10, 3 * 5.5 + 5))
    assert lesion.box == ((3, 7), (4, 15), (5, 6))
    assert not lesion.touches_border


def test_one_voxel_is_as_long_as_its_longest_edge() -> None:
    lesion = only(box_map((slice(3, 4), slice(4, 5), slice(5, 6))))
    assert (lesion.voxels, lesion.diameter_mm, lesion.axial_diameter_mm) == (1, 3.0, 2.0)
    assert lesion.axial_perpendicular_mm == pytest.approx(1.0)


def test_a_rod_in_the_slice_measures_its_length_and_width() -> None:
    lesion = only(box_map((slice(2, 3), slice(3, 18), slice(4, 5))))
    assert lesion.axial_diameter_mm == pytest.approx(15.0)
    assert lesion.axial_perpendicular_mm == pytest.approx(2.0)


def test_a_ball_measures_its_diameter_in_every_direction() -> None:
    grid = np.indices((41, 41, 41)) - 20.2
    lesion = only(np.where((grid**2).sum(0) <= 15**2, 3, 0).astype(np.uint8), np.eye(4), "ET")
    assert lesion.volume_ml == pytest.approx(4 / 3 * np.pi * 15**3 / 1000, rel=0.01)
    for measure in (lesion.diameter_mm, lesion.axial_diameter_mm, lesion.axial_perpendicular_mm):
        assert measure == pytest.approx(30, abs=1)  # a face lies within half a voxel of a centre inside


def test_corners_connect_and_gaps_separate() -> None:
    touching = box_map((slice(2, 4), slice(2, 4), slice(2, 4)), (slice(4, 6), slice(4, 6), slice(4, 6)))
    assert len(measure_lesions(touching, AFFINE).regions["WT"]) == 1
    apart = box_map((slice(2, 4), slice(2, 4), slice(2, 4)), (slice(5, 8), slice(2, 4), slice(2, 4)))
    found = measure_lesions(apart, AFFINE).regions["WT"]
    assert [lesion.voxels for lesion in found] == [12, 8]  # largest first


def test_regions_are_measured_apart() -> None:
    classes = box_map((slice(2, 12), slice(2, 12), slice(2, 12)))
    classes[3:5, 3:5, 3:5] = 3
    classes[8:10, 8:10, 8:10] = 3
    classes[9, 9, 9] = 1
    found = measure_lesions(classes, AFFINE).regions
    assert tuple(found) == REGIONS
    assert {region: [lesion.voxels for lesion in lesions] for region, lesions in found.items()} == {
        "TC": [8, 8],
        "WT": [1000],
        "ET": [8, 7],
    }


def test_a_lesion_at_the_border_is_whole_and_marked() -> None:
    inner = only(box_map((slice(1, 6), slice(1, 6), slice(1, 6))))
    outer = only(box_map((slice(0, 5), slice(0, 5), slice(0, 5))))
    last = only(box_map((slice(10, 31), slice(5, 20), slice(9, 14))))
    assert outer.touches_border and last.touches_border and not inner.touches_border
    same = ("voxels", "volume_ml", "diameter_mm", "axial_diameter_mm", "axial_perpendicular_mm")
    assert all(getattr(inner, name) == pytest.approx(getattr(outer, name)) for name in same)
    assert last.voxels == 21 * 15 * 5
    assert only(np.full((3, 4, 5), 2, dtype=np.uint8)).voxels == 60


def test_nothing_found_is_no_lesion() -> None:
    found = measure_lesions(np.zeros((4, 4, 4), dtype=np.uint8), AFFINE)
    assert found.regions == dict.fromkeys(REGIONS, ())
    assert found.as_dict()["regions"]["WT"] == {"count": 0, "listed": [], "not_listed_ml": 0}


def test_json_lists_the_largest_and_sums_the_rest() -> None:
    classes = np.zeros((30, 3, 3), dtype=np.uint8)
    classes[1:29:2, 1, 1] = 2
    classes[4, 1, 1] = 2  # joins two neighbours
    told = json.loads(json.dumps(measure_lesions(classes, np.eye(4)).as_dict(limit=3)))["regions"]["WT"]
    assert told["count"] == 13
    assert [lesion["voxels"] for lesion in told["listed"]] == [3, 1, 1]
    assert told["not_listed_ml"] == pytest.approx(0.010)


# ---------------------------------------------------------------- side

BRAIN = np.zeros((61, 20, 10), dtype=bool)
BRAIN[10:50, 2:18, 1:9] = True  # middle between 29 and 30


@pytest.mark.parametrize(
    ("first", "stop", "side"),
    [(12, 20, "left"), (35, 45, "right"), (25, 35, "midline"), (12, 48, "bilateral"), (29, 49, "right")],
)
def test_side_is_that_of_the_patient(first: int, stop: int, side: str) -> None:
    classes = box_map((slice(first, stop), slice(5, 9), slice(3, 6)), shape=BRAIN.shape)
    assert only(classes, np.eye(4), brain=BRAIN).side == side
    mirrored = np.diag([-1.0, 1, 1, 1])
    assert only(classes[::-1], mirrored, brain=BRAIN[::-1]).side == side


def test_stray_voxels_do_not_move_the_midline() -> None:
    noisy = BRAIN.copy()
    noisy[0, 0, 0] = noisy[60, 3, 3] = noisy[57, 3, 3] = True
    assert find_midline(BRAIN.shape, np.eye(4), noisy).index == 29.5
    assert find_midline(BRAIN.shape, np.eye(4)).decided_by == "image box"
    assert find_midline(BRAIN.shape, np.eye(4), np.zeros_like(BRAIN)).index == 30


def test_another_shape_of_brain_is_refused() -> None:
    with pytest.raises(GeometryError, match=r"\(4, 4, 4\)"):
        measure_lesions(np.zeros((5, 4, 4), dtype=np.uint8), AFFINE, brain=np.zeros((4, 4, 4), dtype=bool))


# ---------------------------------------------------------------- second routes


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.02, 0.6))
def test_diameters_equal_a_search_over_all_pairs(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 5, 4)) < density
    mask[2, 2, 2] = True
    points, normals = face_centres(mask)
    assert largest_diameter(points * SPACING) == pytest.approx(pdist(points * SPACING).max())
    for level in np.flatnonzero(mask.any(axis=(0, 1))):
        flat = (points * SPACING)[(normals != 2) & (points[:, 2] == level)][:, :2]
        longest, across = planar_diameters(flat)
        assert longest == pytest.approx(pdist(flat).max())
        assert 0 < across <= longest + 1e-9


def test_the_perpendicular_equals_a_dense_search() -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        points = rng.normal(size=(20, 2)) * (4, 1.5)
        longest, across = planar_diameters(points)
        distances = np.linalg.norm(points[:, None] - points, axis=-1)
        a, b = np.unravel_index(distances.argmax(), distances.shape)
        along = (points[b] - points[a]) / longest
        turned = np.stack([points @ along, points @ [-along[1], along[0]]], axis=1)
        pairs = list(itertools.combinations(range(len(points)), 2))
        best = 0.0
        for t in np.linspace(turned[:, 0].min(), turned[:, 0].max(), 401):
            # every edge between two points that the line at t crosses bounds the hull there
            heights = [
                turned[i, 1] + (t - turned[i, 0]) / (turned[j, 0] - turned[i, 0]) * (turned[j, 1] - turned[i, 1])
                for i, j in pairs
                if (turned[i, 0] - t) * (turned[j, 0] - t) <= 0
            ]
            best = max(best, max(heights) - min(heights))
        assert best <= across + 1e-9
        assert across == pytest.approx(best, rel=0.01)


def test_surface_points_are_those_of_marching_cubes() -> None:
    blob = ndimage.gaussian_filter(np.random.default_rng(0).random((18, 16, 14)), 2)
    mask = blob > np.quantile(blob, 0.8)
    vertices, *_ = marching_cubes(np.pad(mask, 1).astype(float), 0.5)
    ours = {tuple(point) for point in np.round(face_centres(mask)[0] + 1, 3)}
    assert ours == {tuple(point) for point in np.round(vertices.astype(float), 3)}


def test_turning_the_image_changes_no_measure(rng: np.random.Generator) -> None:
    classes = (ndimage.gaussian_filter(rng.random((20, 18, 16)), 2) > 0.505).astype(np.uint8) * 2
    brain = np.zeros(classes.shape, dtype=bool)
    brain[2:17] = True
    before = measure_lesions(classes, AFFINE, brain=brain).regions["WT"]
    assert len(before) > 1
    for order in itertools.permutations(range(3)):
        # new index i' = T i: permuted, then the first axis reversed
        turned = np.transpose(classes, order)[::-1]
        change = np.zeros((4, 4))
        for new, old in enumerate(order):
            change[old, new] = 1
        change[:3, 0] *= -1
        change[order[0], 3] = classes.shape[order[0]] - 1
        change[3, 3] = 1
        after = measure_lesions(turned, AFFINE @ change, brain=np.transpose(brain, order)[::-1]).regions["WT"]
        assert sorted(lesion.voxels for lesion in after) == sorted(lesion.voxels for lesion in before)
        for one, other in zip(sorted(before, key=_place), sorted(after, key=_place), strict=True):
            assert one.centroid_mm == pytest.approx(other.centroid_mm)
            assert one.diameter_mm == pytest.approx(other.diameter_mm)
            assert one.axial_diameter_mm == pytest.approx(other.axial_diameter_mm)
            assert one.side == other.side


def _place(lesion: Lesion) -> tuple[float, ...]:
    return tuple(round(x, 3) for x in lesion.centroid_mm)


def test_real_lesions_add_up_to_the_region(shared_data: Path) -> None:
    subject = find_subjects(shared_data / "brats18_2mm", "brats2018", require_label=True)[0]
    classes = read_label(subject, get_scheme("brats2018"))
    volume = read_subject(subject)
    found = measure_lesions(classes, volume.affine, brain=(volume.array != 0).any(axis=0))
    assert found.midline.decided_by == "brain box"
    assert sum(lesion.voxels for lesion in found.regions["WT"]) == np.count_nonzero(classes)
    largest = found.regions["WT"][0]
    assert largest.axial_perpendicular_mm <= largest.axial_diameter_mm <= largest.diameter_mm


def test_small_lesions_are_taken_out_but_never_the_largest():
    classes = np.zeros((20, 20, 20), np.uint8)
    classes[2:6, 2:6, 2:6] = 2  # 64 voxels
    classes[3, 3, 3] = 3
    classes[10:12, 10:12, 10:12] = 1  # 8
    classes[15, 15, 15] = 3  # touches the next at a corner: one lesion of 2
    classes[16, 16, 16] = 2
    affine = np.diag([10.0, 10.0, 1.0, 1.0])  # 0.1 ml a voxel
    cleaned, count, removed_ml = without_small_lesions(classes, affine, smallest_ml=0.5)
    assert count == 1
    assert removed_ml == pytest.approx(0.2)
    assert cleaned[15, 15, 15] == 0 and cleaned[16, 16, 16] == 0
    assert np.count_nonzero(cleaned) == 72 and cleaned[3, 3, 3] == 3
    cleaned, count, _ = without_small_lesions(classes, affine, smallest_ml=100.0)
    assert count == 2 and np.count_nonzero(cleaned) == 64
    assert without_small_lesions(classes, affine, smallest_ml=0.2)[1] == 0  # at least: 0.2 ml stays
    assert without_small_lesions(classes, affine, smallest_ml=0.0)[0] is classes
    empty = np.zeros((4, 4, 4), np.uint8)
    assert without_small_lesions(empty, affine, smallest_ml=1.0)[1:] == (0, 0.0)
    assert np.count_nonzero(classes) == 74  # the input is not touched
