"""How far reviewers agree with one another, and what their ratings have to do with Dice.

Written out here because the core needs no statistics package for it; checked in the tests against scikit-learn and
against Krippendorff's published example. Intervals come from resampling cases with replacement (percentile bootstrap,
Efron 1979): with few cases they are wide, and a little too narrow still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import REGIONS
from fediod_med.review.events import RATINGS, VERDICTS, Event

Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["none", "linear", "quadratic"]

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Agreement:
    """A coefficient with its interval.

    Attributes:
        value: the coefficient; NaN where it is not defined, as when every rating is the same.
        low: lower end of the 95 % interval.
        high: upper end.
        cases: it rests on.
        p_value: of no association, where a test belongs to it.
    """

    value: float
    low: float
    high: float
    cases: int
    p_value: float | None = None


@dataclass(frozen=True)
class RatingMatrix:
    """Ratings of one region, or verdicts, by reviewer and item.

    Attributes:
        reviewers: of the rows.
        items: run, case and arm of the columns.
        values: `(reviewers, items)` float, NaN where somebody did not rate; verdicts as 1 (reject) to 4 (accept).
    """

    reviewers: tuple[str, ...]
    items: tuple[tuple[str, str, str], ...]
    values: np.ndarray


def rating_matrix(reviews: Iterable[Event], what: str) -> RatingMatrix:
    """Current reviews as a matrix.

    Args:
        reviews: at most one per reviewer, run, case and arm; see `ReviewStore.current`.
        what: TC, WT, ET, or `verdict`.

    Raises:
        SettingsError: another `what`.
    """
    if what not in (*REGIONS, "verdict"):
        raise SettingsError(f"agreement: expected one of {', '.join(REGIONS)} or verdict, found {what!r}")
    found: dict[tuple[str, tuple[str, str, str]], float] = {}
    for event in reviews:
        value = len(VERDICTS) - VERDICTS.index(event.verdict) if what == "verdict" else event.ratings.get(what)
        if value is not None:
            found[event.reviewer, (event.run, event.case, event.arm)] = float(value)
    reviewers = tuple(sorted({reviewer for reviewer, _ in found}))
    items = tuple(sorted({item for _, item in found}))
    values = np.full((len(reviewers), len(items)), np.nan)
    row, column = ({key: number for number, key in enumerate(keys)} for keys in (reviewers, items))
    for (reviewer, item), rating in found.items():
        values[row[reviewer], column[item]] = rating
    return RatingMatrix(reviewers, items, values)


def weighted_kappa(
    first: Sequence[float],
    second: Sequence[float],
    *,
    categories: Sequence[float] = RATINGS,
    weights: Weights = "quadratic",
) -> float:
    """Cohen's weighted kappa of two reviewers: `1 - sum(w o) / sum(w e)` (Cohen 1968, Psychol Bull 70(4)).

    `o` are the observed shares of pairs of ratings, `e` the shares expected from the reviewers' own frequencies, and
    `w` grows with the distance between the ranks of the categories: with its square when `quadratic`.

    Args:
        first: one rating per item.
        second: the other reviewer's, same items; items where either is NaN are left out.
        categories: in order.
        weights: `none` counts every disagreement alike.

    Returns:
        At most 1; NaN without items, or where no disagreement could be expected.

    Raises:
        InputError: lengths differ, or a rating is no category.
    """
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != two.shape or one.ndim != 1:
        raise InputError(f"kappa: expected two lists of one length, found {one.shape} and {two.shape}")
    both = ~(np.isnan(one) | np.isnan(two))
    if not both.any():
        return math.nan
    size = len(categories)
    first_rank, second_rank = (_ranks(values[both], categories) for values in (one, two))
    observed = np.bincount(first_rank * size + second_rank, minlength=size * size).reshape(size, size) / both.sum()
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)
    cost = {"none": (distance > 0).astype(float), "linear": distance, "quadratic": distance**2}[weights]
    chance = float((cost * expected).sum())
    return 1.0 - float((cost * observed).sum()) / chance if chance > 0 else math.nan


def krippendorff_alpha(ratings: np.ndarray, *, level: Level = "ordinal") -> float:
    """Krippendorff's alpha: `1 - D_o / D_e`, for any number of reviewers and with missing ratings.

    Coincidences of pairs of values within items, each item's pairs weighted by `1 / (m_u - 1)`; items with one rating
    tell nothing. The ordinal metric is the square of the number of ratings between two ranks (Krippendorff 2011,
    "Computing Krippendorff's Alpha-Reliability").

    Args:
        ratings: `(reviewers, items)`, NaN where missing.
        level: of measurement.

    Returns:
        At most 1; NaN without two ratings of one item, or when all ratings are the same.

    Raises:
        InputError: not a matrix.
    """
    values = np.asarray(ratings, dtype=float)
    if values.ndim != 2:
        raise InputError(f"alpha: expected a matrix (reviewers, items), found shape {values.shape}")
    ranks = np.unique(values[~np.isnan(values)])
    if not ranks.size:
        return math.nan
    counts = np.stack([(values == rank).sum(axis=0) for rank in ranks], axis=1).astype(float)
    counts = counts[counts.sum(axis=1) >= 2]
    weighted = counts / (counts.sum(axis=1, keepdims=True) - 1)
    coincidences = weighted.T @ counts - np.diag(weighted.sum(axis=0))
    totals = coincidences.sum(axis=0)
    paired = float(totals.sum())
    if not paired:
        return math.nan
    distance = _distances(ranks, totals, level)
    expected = float((np.outer(totals, totals) * distance).sum()) / (paired - 1)
    return 1.0 - float((coincidences * distance).sum()) / expected if expected > 0 else math.nan


def alpha_with_interval(
    ratings: np.ndarray, *, level: Level = "ordinal", seed: int = 0, resamples: int = RESAMPLES
) -> Agreement:
    """`krippendorff_alpha` with a bootstrap interval over items."""
    values = np.asarray(ratings, dtype=float)
    told = (~np.isnan(values)).sum(axis=0) >= 2
    low, high = _bootstrap(
        lambda rows: krippendorff_alpha(values[:, told][:, rows], level=level), int(told.sum()), seed, resamples
    )
    return Agreement(krippendorff_alpha(values, level=level), low, high, int(told.sum()))


def pairwise_kappa(
    matrix: RatingMatrix, *, weights: Weights = "quadratic", seed: int = 0, resamples: int = RESAMPLES
) -> Mapping[tuple[str, str], Agreement]:
    """Weighted kappa of every pair of reviewers who rated an item in common, with a bootstrap interval over items."""
    found = {}
    for (i, first), (j, second) in combinations(enumerate(matrix.reviewers), 2):
        one, two = matrix.values[i], matrix.values[j]
        shared = np.flatnonzero(~(np.isnan(one) | np.isnan(two)))
        if not len(shared):
            continue
        one, two = one[shared], two[shared]
        low, high = _bootstrap(
            lambda rows, a=one, b=two: weighted_kappa(a[rows], b[rows], weights=weights),  # type: ignore[misc]
            len(shared),
            seed,
            resamples,
        )
        found[first, second] = Agreement(weighted_kappa(one, two, weights=weights), low, high, len(shared))
    return found


def ratings_with_dice(
    reviews: Iterable[Event], dice: Mapping[tuple[str, str], float], region: str
) -> tuple[tuple[str, str, float, float], ...]:
    """Case, model, mean rating over reviewers and Dice, for every rated segmentation whose Dice is known.

    Args:
        reviews: current ones of one run; their arms are models. Blinded ones get them by `queue.blinded_ratings`.
        dice: by case and model.
        region: TC, WT or ET.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for event in reviews:
        if region in event.ratings and (event.case, event.arm) in dice:
            found.setdefault((event.case, event.arm), []).append(event.ratings[region])
    return tuple((*key, float(np.mean(ratings)), dice[key]) for key, ratings in sorted(found.items()))


def rating_against_dice(
    ratings: Sequence[float], dice: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Agreement:
    """Kendall's tau-b of ratings and Dice: do reviewers rank segmentations as Dice does?

    Args:
        ratings: one per case, 1 to 4.
        dice: of the same cases; pairs with a NaN are left out.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        Tau from -1 to 1 with its interval and the p-value of no association; NaN with fewer than two cases.

    Raises:
        InputError: lengths differ.
    """
    one, two = np.asarray(ratings, dtype=float), np.asarray(dice, dtype=float)
    if one.shape != two.shape or one.ndim != 1:
        raise InputError(f"rating against Dice: expected one Dice per rating, found {one.shape} and {two.shape}")
    both = ~(np.isnan(one) | np.isnan(two))
    one, two = one[both], two[both]
    value, p_value = _tau(one, two)
    low, high = _bootstrap(lambda rows: _tau(one[rows], two[rows])[0], len(one), seed, resamples)
    return Agreement(value, low, high, len(one), p_value if math.isfinite(p_value) else None)


def _ranks(values: np.ndarray, categories: Sequence[float]) -> np.ndarray:
    """Place of each value among the categories; `InputError` names one that is none."""
    matches = values[:, None] == np.asarray(categories, dtype=float)
    known = matches.any(axis=1)
    if not known.all():
        raise InputError(f"kappa: expected ratings among {list(categories)}, found {values[~known][0]}")
    return np.asarray(matches.argmax(axis=1))


def _tau(one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    from scipy.stats import kendalltau

    if len(one) < 2 or (one == one[0]).all() or (two == two[0]).all():
        return math.nan, math.nan
    found = kendalltau(one, two)
    return float(found.statistic), float(found.pvalue)


def _distances(ranks: np.ndarray, totals: np.ndarray, level: Level) -> np.ndarray:
    if level == "nominal":
        return 1.0 - np.eye(len(ranks))
    if level == "interval":
        return np.asarray(np.subtract.outer(ranks, ranks) ** 2)
    # ratings up to the middle of each rank: their difference counts those between two ranks, ends by half
    middle = np.cumsum(totals) - totals / 2
    return np.asarray(np.subtract.outer(middle, middle) ** 2)


def _bootstrap(statistic: Callable[[np.ndarray], float], size: int, seed: int, resamples: int) -> tuple[float, float]:
    """Percentile interval over resampled rows; draws where the statistic is not defined are left out."""
    if size < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    drawn = np.array([statistic(random.integers(size, size=size)) for _ in range(resamples)])
    known = drawn[np.isfinite(drawn)]
    if len(known) < resamples / 2:
        return math.nan, math.nan
    low, high = np.percentile(known, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)
