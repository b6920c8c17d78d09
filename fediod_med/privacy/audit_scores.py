"""Tests of a privacy audit on scores and distances: can an attacker tell training patients from others?

Scores are higher where the attacker believes in membership. One score is one patient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import ndtri

from fediod_med.errors import PrivacyError
from fediod_med.privacy.audit import (
    audit_ceiling,
    clopper_pearson,
    epsilon_lower_bound,
    mu_lower_bound,
    require_confidence,
    require_delta,
)

_BISECTIONS = 60


@dataclass(frozen=True)
class TailRate:
    """True positives of an attack that may accuse few non-members only.

    Attributes:
        fpr: rate of false accusations that was allowed.
        tpr: share of members found at it.
        interval: of `tpr`, Clopper-Pearson.
        false_positives_allowed: whole non-members; 0 means that `fpr` is finer than the number of non-members can show.
    """

    fpr: float
    tpr: float
    interval: tuple[float, float]
    false_positives_allowed: int


@dataclass(frozen=True)
class EpsilonBound:
    """A lower bound on epsilon from a threshold that was chosen on other trials.

    Attributes:
        epsilon: lower bound; 0 when nothing was shown.
        ceiling: the bound that a perfect attack on as many trials would give.
        mu: lower bound on the mu of a Gaussian mechanism, for mechanisms known to be Gaussian.
        members: trials in the world with the patient, after the split.
        non_members: trials in the world without.
    """

    epsilon: float
    ceiling: float
    mu: float
    members: int
    non_members: int


@dataclass(frozen=True)
class NearestNeighbour:
    """Whether synthetic volumes lie nearer to training patients than to as many patients that nobody trained on.

    Attributes:
        synthetic: volumes.
        patients: on each side.
        share_nearer_train: synthetic volumes whose nearest patient is a training patient; 1/2 expected without copying.
        median: of the distance to the nearest training and nearest held-out patient.
        first_percentile: of the same.
        p_value: one-sided, over exchanges of training and held-out patients.
        smallest_p: the least p-value that this number of patients can give.
    """

    synthetic: int
    patients: int
    share_nearer_train: float
    median: tuple[float, float]
    first_percentile: tuple[float, float]
    p_value: float
    smallest_p: float


# --- scores of members and others -------------------------------------------------------------------------------------


def auc(members: Sequence[float], non_members: Sequence[float]) -> float:
    """Probability that a member scores above a non-member, ties counting half (Mann and Whitney).

    Raises:
        PrivacyError: no scores on one side, or one that is not finite.
    """
    inside, outside = _scores(members, "members"), _scores(non_members, "non-members")
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    wins = ranks[: len(inside)].sum() - len(inside) * (len(inside) + 1) / 2
    return float(wins / (len(inside) * len(outside)))


def auc_interval(
    members: Sequence[float], non_members: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the AUC, score type (Newcombe 2006, Statistics in Medicine 25:559, method 5).

    Solves `|AUC - t| = z sqrt(V(t))` for t, with
    `V(t) = t (1 - t) [1 + (N - 1) ((1 - t) / (2 - t) + t / (1 + t))] / (m n)` and N the mean of m and n. Bootstrap and
    DeLong intervals shrink to a point when the scores separate perfectly, which few patients often do by chance; this
    one stays wide.

    Raises:
        PrivacyError: as `auc`, or a confidence outside (0, 1).
    """
    require_confidence(confidence)
    area, sizes = auc(members, non_members), (len(members), len(non_members))
    z = float(ndtri(0.5 + confidence / 2))
    return _auc_limit(area, *sizes, z), 1 - _auc_limit(1 - area, *sizes, z)


def auc_p_value(members: Sequence[float], non_members: Sequence[float]) -> float:
    """One-sided p-value of "members do not score higher" (Mann-Whitney; exact for few scores without ties)."""
    inside, outside = _scores(members, "members"), _scores(non_members, "non-members")
    if len(set(inside) | set(outside)) == 1:
        return 1.0
    return float(stats.mannwhitneyu(inside, outside, alternative="greater").pvalue)


def roc(members: Sequence[float], non_members: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of every threshold, from (0, 0) to (1, 1); the area below is `auc`."""
    inside, outside = _scores(members, "members"), _scores(non_members, "non-members")
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    fpr, tpr = ((np.asarray(side)[None] >= thresholds[:, None]).mean(axis=1) for side in (outside, inside))
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def tpr_at_fpr(
    members: Sequence[float], non_members: Sequence[float], *, fpr: float = 0.01, confidence: float = 0.95
) -> TailRate:
    """Members found when at most `floor(fpr * n)` of n non-members are accused (Carlini et al. 2022).

    The threshold is the score of a non-member, so the interval takes it as given: a description, not a bound.

    Raises:
        PrivacyError: as `auc`, or `fpr` outside (0, 1).
    """
    if not 0 < fpr < 1:
        raise PrivacyError(f"audit: expected a false positive rate above 0 and below 1, found {fpr}")
    inside, outside = _scores(members, "members"), np.sort(_scores(non_members, "non-members"))
    allowed = math.floor(fpr * len(outside) + 1e-9)
    found = int((inside > outside[len(outside) - 1 - allowed]).sum())
    interval = clopper_pearson(found, len(inside), confidence=confidence)
    return TailRate(fpr, found / len(inside), interval, allowed)


def membership_epsilon(
    members: Sequence[float],
    non_members: Sequence[float],
    *,
    delta: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> EpsilonBound:
    """Epsilon shown by thresholding scores: the threshold from a random half of each side, the bound from the other.

    Treats scores as independent trials, each with the same chance of being a member. Scores of several patients from
    one training are not quite that, so there the bound indicates; `one_run_epsilon` is exact for one training.

    Args:
        members: scores in the world with.
        non_members: scores in the world without.
        delta: of the claim.
        confidence: of the bound.
        seed: of the split.

    Returns:
        The bound; all zeros when one side has fewer than two scores.

    Raises:
        PrivacyError: as `auc` and `epsilon_lower_bound`.
    """
    require_delta(delta)
    require_confidence(confidence)
    rng = np.random.default_rng(seed)
    inside, outside = (
        rng.permutation(_scores(side, name)) for side, name in ((members, "members"), (non_members, "non-members"))
    )
    if min(len(inside), len(outside)) < 2:
        return EpsilonBound(0.0, 0.0, 0.0, 0, 0)
    cut_in, cut_out = len(inside) // 2, len(outside) // 2
    threshold = _best_threshold(inside[:cut_in], outside[:cut_out], delta, confidence)
    inside, outside = inside[cut_in:], outside[cut_out:]
    counts = (int((inside > threshold).sum()), len(inside), int((outside > threshold).sum()), len(outside))
    return EpsilonBound(
        epsilon_lower_bound(*counts, delta=delta, confidence=confidence),
        audit_ceiling(len(inside), len(outside), delta=delta, confidence=confidence),
        mu_lower_bound(*counts, confidence=confidence),
        len(inside),
        len(outside),
    )


# --- distances --------------------------------------------------------------------------------------------------------


def nearest_neighbour_test(
    to_train: np.ndarray, to_holdout: np.ndarray, *, permutations: int = 10_000, seed: int = 0
) -> NearestNeighbour:
    """Do synthetic volumes lie nearer to training patients than to an equal number of held-out ones?

    The larger side is thinned at random, because the nearest of many is nearer than the nearest of few. Under the
    hypothesis that no patient was copied, training and held-out patients are exchangeable; the statistic is the mean
    over synthetic volumes of (distance to nearest held-out - distance to nearest training patient). All exchanges are
    enumerated when they are at most `permutations`. A heuristic: it says nothing about epsilon.

    Args:
        to_train: `(S, n)` distances of S synthetic volumes to n training patients.
        to_holdout: `(S, m)` to m held-out patients.
        permutations: exchanges to draw where enumeration is too long.
        seed: of thinning and drawing.

    Raises:
        PrivacyError: shapes that do not match, nothing to compare, or distances that are not finite.
    """
    if to_train.ndim != 2 or to_holdout.ndim != 2 or len(to_train) != len(to_holdout) or 0 in to_train.shape:
        raise PrivacyError(f"audit: expected distances (S, n) and (S, m), found {to_train.shape}, {to_holdout.shape}")
    if to_holdout.shape[1] == 0:
        raise PrivacyError("audit: expected held-out patients to compare with, found none; set folds: 2 or more")
    if not (np.isfinite(to_train).all() and np.isfinite(to_holdout).all()):
        raise PrivacyError("audit: expected finite distances, found NaN or Inf")
    rng = np.random.default_rng(seed)
    n = min(to_train.shape[1], to_holdout.shape[1])
    sides = [side[:, np.sort(rng.permutation(side.shape[1])[:n])] for side in (to_train, to_holdout)]
    both = np.concatenate(sides, axis=1)

    def statistic(train: Sequence[int]) -> float:
        chosen = np.zeros(2 * n, dtype=bool)
        chosen[list(train)] = True
        return float((both[:, ~chosen].min(axis=1) - both[:, chosen].min(axis=1)).mean())

    p_value, smallest = _exchange_p(statistic, n, permutations, rng)
    nearest = [side.min(axis=1) for side in sides]
    return NearestNeighbour(
        synthetic=len(both),
        patients=n,
        share_nearer_train=float(((nearest[0] < nearest[1]) + 0.5 * (nearest[0] == nearest[1])).mean()),
        median=(float(np.median(nearest[0])), float(np.median(nearest[1]))),
        first_percentile=(float(np.percentile(nearest[0], 1)), float(np.percentile(nearest[1], 1))),
        p_value=p_value,
        smallest_p=smallest,
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def _auc_limit(area: float, members: int, non_members: int, z: float) -> float:
    """Lower limit of Newcombe's interval, by bisection on [0, area]; the upper one follows by symmetry."""

    def excluded(t: float) -> bool:
        spread = 1 + ((members + non_members) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        return (area - t) ** 2 > z**2 * t * (1 - t) * spread / (members * non_members)

    low, high = 0.0, area
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if excluded(middle) else (low, middle)
    return low


def _best_threshold(inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float) -> float:
    """Threshold with the best bound on these scores, then the best balance; a middle one of equals."""
    values = np.unique(np.concatenate([inside, outside]))
    if len(values) == 1:
        return float(values[0])
    candidates = (values[1:] + values[:-1]) / 2
    merits = []
    for threshold in candidates:
        found, accused = int((inside > threshold).sum()), int((outside > threshold).sum())
        bound = epsilon_lower_bound(found, len(inside), accused, len(outside), delta=delta, confidence=confidence)
        merits.append((bound, found / len(inside) - accused / len(outside)))
    best = [threshold for threshold, merit in zip(candidates, merits, strict=True) if merit == max(merits)]
    return float(best[len(best) // 2])


def _exchange_p(
    statistic: Callable[[Sequence[int]], float], n: int, permutations: int, rng: np.random.Generator
) -> tuple[float, float]:
    """p-value of the first n of 2n against other choices of n, and the least value it can take."""
    observed = statistic(range(n)) - 1e-12  # sums in another order may differ in the last bit
    if math.comb(2 * n, n) <= permutations:
        values = [statistic(chosen) for chosen in itertools.combinations(range(2 * n), n)]
        return float(np.mean(np.array(values) >= observed)), 1 / len(values)
    hits = sum(statistic(rng.permutation(2 * n)[:n].tolist()) >= observed for _ in range(permutations))
    return (hits + 1) / (permutations + 1), 1 / (permutations + 1)


def _scores(values: Sequence[float], side: str) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise PrivacyError(f"audit: expected at least one score of {side}, found shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise PrivacyError(f"audit: expected finite scores of {side}, found NaN or Inf; does the network diverge?")
    return scores
