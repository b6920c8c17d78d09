"""Lesion-wise scores: worked examples, figures of the challenge's own tool, and a flood fill over single voxels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fediod_med.errors import InputError
from fediod_med.lesionwise import GLIOMA, RULES, LesionRules, lesionwise_scores, score_lesions, surface_hd95

ONE = (1.0, 1.0, 1.0)
Voxel = tuple[int, int, int]


def cube(*corners: Voxel, edge: int = 5, shape: Voxel = (60, 20, 20)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for x, y, z in corners:
        mask[x : x + edge, y : y + edge, z : z + edge] = True
    return mask


# ---------------------------------------------------------------- worked examples


def test_a_perfect_answer_scores_one() -> None:
    mask = cube((5, 5, 5), (40, 5, 5))
    score = score_lesions(mask, mask, ONE)
    assert (score.dice, score.hd95, score.n_tp, score.n_fp, score.n_fn) == (1, 0, 2, 0, 0)


def test_one_of_two_lesions_missed_halves_the_score() -> None:
    score = score_lesions(cube((5, 5, 5)), cube((5, 5, 5), (40, 5, 5)), ONE)
    assert (score.dice, score.hd95, score.n_tp, score.n_fp, score.n_fn) == (0.5, 187, 1, 0, 1)


def test_an_invented_lesion_costs_as_much_as_a_missed_one() -> None:
    score = score_lesions(cube((5, 5, 5), (40, 5, 5)), cube((5, 5, 5)), ONE)
    assert (score.dice, score.hd95, score.n_tp, score.n_fp, score.n_fn) == (0.5, 187, 1, 1, 0)


def test_a_false_component_counts_however_small() -> None:
    pred = cube((5, 5, 5))
    pred[50, 15, 15] = True
    assert score_lesions(pred, cube((5, 5, 5)), ONE).n_fp == 1


def test_a_shifted_cube_scores_its_overlap_and_its_shift() -> None:
    score = score_lesions(cube((7, 5, 5)), cube((5, 5, 5)), (0.5, 1, 1.5))
    assert score.dice == pytest.approx(3 / 5)
    assert score.hd95 == pytest.approx(2 * 0.5)  # two voxels along the 0.5 mm axis


def test_small_reference_lesions_are_left_out_but_their_match_is_not_false() -> None:
    """48 voxels of 1 mm3 are below the limit: found or missed, they count nowhere."""
    small = np.zeros((60, 20, 20), dtype=bool)
    small[40:44, 5:9, 5:8] = True
    ref = cube((5, 5, 5)) | small
    missed, found = score_lesions(cube((5, 5, 5)), ref, ONE), score_lesions(ref, ref, ONE)
    for score in (missed, found):
        assert (score.dice, score.hd95, score.n_tp, score.n_fp, score.n_fn) == (1, 0, 1, 0, 0)
    # at 2 mm along one axis the same voxels measure 96 mm3
    assert score_lesions(cube((5, 5, 5)), ref, (2, 1, 1)).n_fn == 1


def test_the_limit_itself_is_left_out() -> None:
    ref = np.zeros((20, 20, 20), dtype=bool)
    ref[5:10, 5:10, 5:7] = True  # 50 mm3
    assert score_lesions(np.zeros_like(ref), ref, ONE).n_fn == 0
    ref[5, 5, 7] = True
    assert score_lesions(np.zeros_like(ref), ref, ONE).n_fn == 1


def test_near_reference_components_are_one_lesion() -> None:
    """Six voxels apart, dilations of three voxels touch: one lesion; with a dilation of one voxel, two."""
    ref = cube((5, 5, 5), (16, 5, 5))
    pred = cube((5, 5, 5))
    glioma, meningioma = (score_lesions(pred, ref, ONE, rules=RULES[name]) for name in ("BraTS-GLI", "BraTS-MEN"))
    assert (glioma.n_tp, glioma.n_fn) == (1, 0)
    assert glioma.dice == pytest.approx(2 * 125 / (125 + 250))
    assert (meningioma.n_tp, meningioma.n_fn, meningioma.dice) == (1, 1, 0.5)


def test_a_component_near_a_lesion_is_matched_without_overlap() -> None:
    near, far = (score_lesions(cube((x, 5, 5)), cube((5, 5, 5)), ONE) for x in (12, 13))
    assert (near.n_tp, near.n_fp, near.n_fn, near.dice) == (1, 0, 0, 0)  # third voxel beyond the face
    assert near.hd95 == pytest.approx(7)
    assert (far.n_tp, far.n_fp, far.n_fn, far.hd95) == (0, 1, 1, 374)


def test_one_component_may_match_two_lesions() -> None:
    ref = cube((5, 5, 5), (25, 5, 5))
    pred = np.zeros_like(ref)
    pred[5:30, 5:10, 5:10] = True
    score = score_lesions(pred, ref, ONE)
    assert (score.n_tp, score.n_fp, score.n_fn) == (2, 0, 0)
    assert score.dice == pytest.approx(2 * 125 / (125 + 625))


def test_empty_answers() -> None:
    empty, full = np.zeros((60, 20, 20), dtype=bool), cube((5, 5, 5))
    both = score_lesions(empty, empty, ONE)
    assert (both.dice, both.hd95, both.n_tp, both.n_fp, both.n_fn) == (1, 0, 0, 0, 0)
    for pred, ref in ((full, empty), (empty, full)):
        score = score_lesions(pred, ref, ONE)
        assert (score.dice, score.hd95) == (0, 374)


def test_regions_of_class_maps_are_scored_apart() -> None:
    ref = np.zeros((60, 20, 20), dtype=np.uint8)
    ref[5:15, 5:15, 5:15] = 2
    ref[7:12, 7:12, 7:12] = 3
    pred = ref.copy()
    pred[pred == 3] = 1
    scores = lesionwise_scores(pred, ref, ONE)
    assert {region: (s.dice, s.n_fn) for region, s in scores.items()} == {"TC": (1, 0), "WT": (1, 0), "ET": (0, 1)}


def test_masks_of_unlike_shape_and_bad_spacing_are_refused() -> None:
    with pytest.raises(InputError, match="one shape"):
        score_lesions(np.zeros((3, 3, 3)), np.zeros((3, 3, 4)), ONE)
    with pytest.raises(InputError, match="one shape"):
        lesionwise_scores(np.zeros((3, 3, 3)), np.zeros((3, 3, 4)), ONE)
    with pytest.raises(InputError, match="voxel sizes"):
        score_lesions(np.zeros((3, 3, 3)), np.zeros((3, 3, 3)), (1, 1, 0))


# ---------------------------------------------------------------- the challenge's tool


def ball(centre: Voxel, radius: float, shape: Voxel = (40, 36, 32), stretch: float = 1.0) -> np.ndarray:
    x, y, z = np.indices(shape)
    return (x - centre[0]) ** 2 + ((y - centre[1]) / stretch) ** 2 + (z - centre[2]) ** 2 <= radius**2


REF = ball((12, 12, 12), 6) | ball((30, 12, 12), 4) | ball((22, 28, 20), 5, stretch=1.3)
PRED = ball((13, 11, 12), 6.5) | ball((22, 27, 21), 4) | ball((30, 30, 5), 2) | ball((27, 27, 24), 2.5)


@pytest.mark.parametrize(
    ("name", "spacing", "expected"),
    [
        ("BraTS-GLI", (1.0, 1.0, 1.0), (0.239871382637, 250.149830, 1, 1, 1)),
        ("BraTS-MEN", (1.0, 1.0, 1.0), (0.333956925146, 188.183013, 2, 1, 1)),
        ("BraTS-MEN", (0.9, 1.1, 2.0), (0.333956925146, 188.492065, 2, 1, 1)),
        ("BraTS-MET", (0.5, 0.5, 0.5), (0.333956925146, 187.591506, 2, 1, 1)),
    ],
)
def test_figures_of_the_challenge_tool(name: str, spacing: tuple[float, float, float], expected: tuple) -> None:
    """Dice, HD95, TP, FP, FN by the published procedure with cc3d 4.1.1 and surface-distance 0.1."""
    score = score_lesions(PRED, REF, spacing, rules=RULES[name])
    assert (score.n_tp, score.n_fp, score.n_fn) == expected[2:]
    assert score.dice == pytest.approx(expected[0], abs=1e-9)
    assert score.hd95 == pytest.approx(expected[1], abs=1e-5)


# ---------------------------------------------------------------- voxel by voxel

CUBE = [offset for offset in itertools.product((-1, 0, 1), repeat=3) if any(offset)]
NEAR = [offset for offset in CUBE if sum(map(abs, offset)) <= 2]


def shifted(voxel: Voxel, offset: Iterable[int]) -> Voxel:
    x, y, z = (a + b for a, b in zip(voxel, offset, strict=True))
    return x, y, z


def components(voxels: set[Voxel]) -> list[set[Voxel]]:
    left, found = set(voxels), []
    while left:
        group, edge = set(), [left.pop()]
        while edge:
            here = edge.pop()
            group.add(here)
            new = {shifted(here, offset) for offset in CUBE} & left
            left -= new
            edge += new
        found.append(group)
    return found


def grown(voxels: set[Voxel], steps: int) -> set[Voxel]:
    for _ in range(steps):
        voxels = voxels | {shifted(voxel, offset) for voxel in voxels for offset in NEAR}
    return voxels


def touch(one: set[Voxel], other: set[Voxel]) -> bool:
    return any(shifted(voxel, offset) in other for voxel in one for offset in (*CUBE, (0, 0, 0)))


def by_voxels(pred: set[Voxel], ref: set[Voxel], voxel_mm3: float, rules: LesionRules) -> tuple[float, int, int, int]:
    """The rules in the order they are told, on sets of voxels; Dice and counts."""
    lesions: list[set[Voxel]] = []
    for part in components(ref):  # merge what touches once grown, until nothing does
        whole = set(part)
        for other in [o for o in lesions if touch(grown(o, rules.dilation), grown(part, rules.dilation))]:
            lesions.remove(other)
            whole |= other
        lesions.append(whole)
    answers = components(pred)
    used: set[int] = set()
    values, tp, fn = [], 0, 0
    for lesion in lesions:
        reach = grown(lesion, rules.dilation)
        hits = [i for i, answer in enumerate(answers) if answer & reach]
        used |= set(hits)
        if len(lesion) * voxel_mm3 <= rules.smallest_mm3:
            continue
        tp, fn = tp + bool(hits), fn + (not hits)
        joined = set().union(*(answers[i] for i in hits))
        values.append(2 * len(joined & lesion) / (len(joined) + len(lesion)))
    fp = len(answers) - len(used)
    n = len(values) + fp
    return (sum(values) / n if n else 1.0), tp, fp, fn


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    parts=st.tuples(st.integers(0, 4), st.integers(0, 5)),
    dilation=st.integers(1, 2),
    limit=st.sampled_from([0.0, 4.0, 8.0]),
)
def test_a_voxel_by_voxel_count_agrees(seed: int, parts: tuple[int, int], dilation: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (14, 9, 8)
    masks = []
    for count in parts:
        mask = np.zeros(shape, dtype=bool)
        for _ in range(count):
            corner, edge = rng.integers(0, shape), rng.integers(1, 4, size=3)
            mask[tuple(slice(c, c + e) for c, e in zip(corner, edge, strict=True))] = True
        masks.append(mask)
    ref, pred = masks
    sets = [{(int(x), int(y), int(z)) for x, y, z in np.argwhere(mask)} for mask in (pred, ref)]
    rules = LesionRules(dilation, limit)
    score = score_lesions(pred, ref, (1, 1, 2), rules=rules)
    expected = by_voxels(sets[0], sets[1], 2.0, rules)
    assert (score.n_tp, score.n_fp, score.n_fn) == expected[1:]
    assert score.dice == pytest.approx(expected[0])


def test_hd95_is_symmetric_and_scales_with_the_voxel(rng: np.random.Generator) -> None:
    one, other = REF, ball((14, 13, 12), 6)
    assert surface_hd95(one, other, ONE) == surface_hd95(other, one, ONE)
    assert surface_hd95(one, other, (2, 2, 2)) == pytest.approx(2 * surface_hd95(one, other, ONE))


def test_cropping_to_the_tumour_changes_nothing() -> None:
    """A map in the corner of a large image scores as it does alone."""
    large = np.zeros((80, 70, 60), dtype=np.uint8)
    truth = large.copy()
    large[:40, :36, :32][PRED] = 3
    truth[:40, :36, :32][REF] = 3
    assert lesionwise_scores(large, truth, ONE)["ET"] == score_lesions(PRED, REF, ONE, rules=GLIOMA)
