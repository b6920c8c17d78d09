"""Agreement of reviewers: published values, a second implementation, and what is not defined stays undefined."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fediod_med.errors import InputError, SettingsError
from fediod_med.review.agreement import (
    alpha_with_interval,
    krippendorff_alpha,
    pairwise_kappa,
    rating_against_dice,
    rating_matrix,
    ratings_with_dice,
    weighted_kappa,
)
from fediod_med.review.events import Review
from fediod_med.review.store import ReviewStore

NONE = math.nan
# Four observers, twelve units, Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
)


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_the_published_one(level, published) -> None:
    assert krippendorff_alpha(PUBLISHED, level=level) == pytest.approx(published, abs=5e-4)


def test_alpha_of_a_table_worked_out_by_hand() -> None:
    # two reviewers, values 1 2 | 1 2 | 2 2: coincidences o12 = o21 = 2, o22 = 2, n1 = 2, n2 = 4, n = 6
    ratings = np.array([[1, 1, 2], [2, 2, 2]], dtype=float)
    expected = 1 - (6 - 1) * 4 / (2 * 4 * 2)
    assert krippendorff_alpha(ratings, level="nominal") == pytest.approx(expected)
    # with two ranks all metrics differ by a factor only
    assert krippendorff_alpha(ratings, level="ordinal") == pytest.approx(expected)


def test_alpha_at_its_ends() -> None:
    alike = np.array([[1, 2, 3, 4], [1, 2, 3, 4]], dtype=float)
    assert krippendorff_alpha(alike) == 1.0
    assert krippendorff_alpha(alike[:, ::-1] * [[1], [0]] + alike * [[0], [1]]) < 0
    assert math.isnan(krippendorff_alpha(np.full((2, 3), 4.0)))  # no variation: agreement cannot be told from habit
    assert math.isnan(krippendorff_alpha(np.array([[1, NONE], [NONE, 2]])))  # nobody rated the same item
    assert math.isnan(krippendorff_alpha(np.full((0, 0), 1.0)))
    with pytest.raises(InputError, match="matrix"):
        krippendorff_alpha(np.ones(3))


def test_items_that_one_reviewer_rated_change_nothing() -> None:
    more = np.column_stack([PUBLISHED, [NONE, NONE, 4, NONE]])
    assert krippendorff_alpha(more) == pytest.approx(krippendorff_alpha(PUBLISHED))


_LISTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=25)


@settings(max_examples=60, deadline=None)
@given(pairs=_LISTS, weights=st.sampled_from(["none", "linear", "quadratic"]))
def test_kappa_is_that_of_scikit_learn(pairs, weights) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    first, second = zip(*pairs, strict=True)
    ours = weighted_kappa(first, second, weights=weights)
    if math.isnan(ours):
        assert set(first) == set(second) and len(set(first)) == 1
        return
    theirs = metrics.cohen_kappa_score(
        first, second, labels=[1, 2, 3, 4], weights=None if weights == "none" else weights
    )
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_kappa_of_a_table_worked_out_by_hand() -> None:
    # ratings (1,1) (1,2) (2,2) (4,2): squared distances 0 1 0 4, so observed 5/4
    # expected: rows 1:1/2 2:1/4 4:1/4, columns 1:1/4 2:3/4 -> 3/8 + 1/16 + 9/16 + 3/4 = 7/4
    assert weighted_kappa([1, 1, 2, 4], [1, 2, 2, 2]) == pytest.approx(1 - (5 / 4) / (7 / 4))
    assert weighted_kappa([1, 2, NONE], [1, 2, 3]) == 1.0
    assert math.isnan(weighted_kappa([], []))
    with pytest.raises(InputError, match="found 5"):
        weighted_kappa([5], [1])
    with pytest.raises(InputError, match="one length"):
        weighted_kappa([1], [1, 2])


def test_ratings_and_verdicts_become_a_matrix(tmp_path: Path) -> None:
    store = ReviewStore(tmp_path / "reviews.sqlite")

    def rate(reviewer: str, case: str, verdict: str, **ratings: int) -> None:
        store.submit(Review(reviewer=reviewer, run="run", case=case, arm="student", verdict=verdict, ratings=ratings))

    rate("b", "c1", "accept", TC=4, WT=3)
    rate("a", "c1", "reject", TC=1)
    rate("a", "c2", "minor", TC=2)
    rate("a", "c1", "major", TC=2)  # a correction counts in place of the first
    matrix = rating_matrix(store.current(), "TC")
    assert matrix.reviewers == ("a", "b")
    assert matrix.items == (("run", "c1", "student"), ("run", "c2", "student"))
    assert np.array_equal(matrix.values, [[2, 2], [4, NONE]], equal_nan=True)
    assert np.array_equal(rating_matrix(store.current(), "verdict").values, [[2, 3], [4, NONE]], equal_nan=True)
    assert rating_matrix(store.current(), "ET").values.shape == (0, 0)
    with pytest.raises(SettingsError, match="NCR"):
        rating_matrix(store.current(), "NCR")
    (pair,) = pairwise_kappa(matrix)
    assert pair == ("a", "b") and pairwise_kappa(matrix)[pair].cases == 1


def test_ratings_meet_the_dice_of_the_same_segmentation(tmp_path: Path) -> None:
    store = ReviewStore(tmp_path / "reviews.sqlite")
    for reviewer, case, rating in (("a", "c1", 2), ("b", "c1", 3), ("a", "c2", 4), ("a", "c3", 1)):
        store.submit(
            Review(reviewer=reviewer, run="run", case=case, arm="student", verdict="minor", ratings={"WT": rating})
        )
    dice = {("c1", "student"): 0.8, ("c1", "ensemble"): 0.1, ("c2", "student"): 0.9}
    expected = (("c1", "student", 2.5, 0.8), ("c2", "student", 4.0, 0.9))
    assert ratings_with_dice(store.current(), dice, "WT") == expected
    assert ratings_with_dice(store.current(), dice, "ET") == ()


def test_intervals_hold_the_value_and_narrow_with_more_cases(rng) -> None:
    truth = rng.integers(1, 5, size=120)
    readers = np.clip(truth + rng.integers(-1, 2, size=(3, 120)), 1, 4).astype(float)
    few, many = (alpha_with_interval(readers[:, :n], resamples=200) for n in (15, 120))
    for found in (few, many):
        assert found.low < found.value < found.high <= 1
    assert many.high - many.low < few.high - few.low
    assert many.cases == 120
    assert alpha_with_interval(readers, resamples=200) == many  # the same seed, the same interval
    assert math.isnan(alpha_with_interval(readers[:, :1]).low)


def test_ratings_against_dice() -> None:
    rising = rating_against_dice([1, 2, 3, 4], [0.1, 0.5, 0.6, 0.9], resamples=100)
    assert rising.value == pytest.approx(1.0) and rising.cases == 4 and rising.p_value == pytest.approx(1 / 12)
    # tau-b by hand: pairs of (1, 1, 2) with (.2, .4, .3): concordant 1, discordant 1, tied in rating 1
    assert rating_against_dice([1, 1, 2], [0.2, 0.4, 0.3], resamples=10).value == pytest.approx(0.0)
    # ratings 1 1 2 2 with Dice .1 .2 .3 .4: 4 concordant of 6 pairs, 2 tied in rating
    assert rating_against_dice([1, 1, 2, 2], [0.1, 0.2, 0.3, 0.4], resamples=10).value == pytest.approx(
        4 / math.sqrt(4 * 6)
    )
    assert rating_against_dice([1, 2, 3, NONE], [0.1, 0.5, 0.6, 0.0], resamples=10).cases == 3
    for ratings, dice in (([], []), ([4, 4, 4], [0.1, 0.2, 0.3]), ([1], [0.5])):
        assert math.isnan(rating_against_dice(ratings, dice, resamples=10).value)
        assert rating_against_dice(ratings, dice, resamples=10).p_value is None
    with pytest.raises(InputError, match="one Dice per rating"):
        rating_against_dice([1], [0.1, 0.2])
