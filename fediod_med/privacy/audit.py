"""Bounds of a privacy audit: what the errors of an attack say about epsilon, and with which confidence.

Every epsilon here is a lower bound. An audit can refute a claimed epsilon, and finds bugs; it never proves a claim.
Each bound has a ceiling, the value that a perfect attack with as many trials would reach: a claim above the ceiling
cannot be refuted at all. Logarithms are natural. Scores are turned into such counts in `audit_scores`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats
from scipy.special import ndtri

from fediod_med.errors import PrivacyError

_BISECTIONS = 60


# --- one rate, two rates ----------------------------------------------------------------------------------------------


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a binomial rate (Clopper and Pearson 1934), each side at half the error.

    Raises:
        PrivacyError: no trials, more successes than trials, or a confidence outside (0, 1).
    """
    require_confidence(confidence)
    if trials < 1 or not 0 <= successes <= trials:
        raise PrivacyError(f"audit: expected 0 <= successes <= trials and trials >= 1, found {successes} of {trials}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(stats.beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def epsilon_lower_bound(
    true_positives: int,
    members: int,
    false_positives: int,
    non_members: int,
    *,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Least epsilon that fits the outcome of a membership attack (Kairouz, Oh and Viswanath 2015; Jagielski 2020).

    `max(0, ln((TPR_lo - delta) / FPR_hi), ln((TNR_lo - delta) / FNR_hi))`. Both statements use the same two one-sided
    bounds, so together they fail with probability at most `1 - confidence`.

    Args:
        true_positives: members that the attack named.
        members: independent trials with the patient; the attack was fixed before them.
        false_positives: non-members that the attack named.
        non_members: independent trials without the patient.
        delta: of the claim.
        confidence: of the bound.

    Raises:
        PrivacyError: counts, delta or confidence out of range.
    """
    require_delta(delta)
    tpr_low, _ = clopper_pearson(true_positives, members, confidence=confidence)
    _, fpr_high = clopper_pearson(false_positives, non_members, confidence=confidence)
    return max(0.0, _log_ratio(tpr_low - delta, fpr_high), _log_ratio(1 - fpr_high - delta, 1 - tpr_low))


def mu_lower_bound(
    true_positives: int, members: int, false_positives: int, non_members: int, *, confidence: float = 0.95
) -> float:
    """Least mu of a Gaussian mechanism that fits an attack: `Phi^-1(TPR_lo) - Phi^-1(FPR_hi)`, at least 0.

    Holds for mechanisms that are mu-GDP (Dong, Roth and Su 2022, arXiv 1905.02383) and is much tighter for them than
    `epsilon_lower_bound`. Arguments and errors as there.
    """
    tpr_low, _ = clopper_pearson(true_positives, members, confidence=confidence)
    _, fpr_high = clopper_pearson(false_positives, non_members, confidence=confidence)
    if tpr_low == 0 or fpr_high == 1:
        return 0.0
    return max(0.0, float(ndtri(tpr_low) - ndtri(fpr_high)))


def audit_ceiling(
    members: int, non_members: int | None = None, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """`epsilon_lower_bound` of an attack without a single error; `non_members` as many as members when omitted."""
    others = members if non_members is None else non_members
    return epsilon_lower_bound(members, members, 0, others, delta=delta, confidence=confidence)


def largest_auc(epsilon: float, delta: float) -> float:
    """Largest AUC that any attack can have against an (epsilon, delta)-DP mechanism, members and others exchangeable.

    Area under `min(e^eps x + delta, 1 - e^-eps (1 - delta - x), 1)` (Kairouz, Oh and Viswanath 2015, theorem 2.1); for
    delta 0 it is `e^eps / (1 + e^eps)`.

    Raises:
        PrivacyError: negative epsilon, or delta outside [0, 1).
    """
    require_delta(delta)
    if not epsilon >= 0:
        raise PrivacyError(f"audit: expected epsilon of 0 or more, found {epsilon}")
    shrink = math.exp(-epsilon)
    x = (1 - delta) * shrink / (1 + shrink)  # where the two lines meet, written so that a large epsilon is harmless
    below = (1 - delta) * x / (2 * (1 + shrink)) + delta * x
    return below + (1 - x) - shrink * (1 - delta - x) ** 2 / 2


# --- one training with many canaries ----------------------------------------------------------------------------------


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest chance of at least `correct` right guesses if the training is (epsilon, delta)-DP.

    `P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i` with `B ~ Bin(r, e^eps / (1 + e^eps))` (main theorem of
    Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

    Args:
        canaries: m, each inserted by its own fair coin.
        guesses: r of them on which the attacker commits.
        correct: v right ones.
        epsilon: of the claim.
        delta: of the claim.

    Raises:
        PrivacyError: not `0 <= v <= r <= m` with `m >= 1`, negative epsilon, or delta outside [0, 1).
    """
    require_delta(delta)
    if not (0 <= correct <= guesses <= canaries and canaries >= 1):
        raise PrivacyError(f"audit: expected correct <= guesses <= canaries, found {correct}, {guesses} and {canaries}")
    if not epsilon >= 0:
        raise PrivacyError(f"audit: expected epsilon of 0 or more, found {epsilon}")
    right = 1 / (1 + math.exp(-epsilon))
    p_value = float(stats.binom.sf(correct - 1, guesses, right))
    if delta > 0 and correct > 0:
        below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
        p_value += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(1.0, p_value)


def one_run_epsilon(
    canaries: int, guesses: int, correct: int, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """Largest epsilon that one training with canaries refutes; arguments and errors as `one_run_p_value`."""
    require_confidence(confidence)

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


# --- checks, shared with audit_scores ---------------------------------------------------------------------------------


def _log_ratio(numerator: float, denominator: float) -> float:
    """A Clopper-Pearson upper bound is never 0, so only the numerator can leave the domain."""
    return math.log(numerator / denominator) if numerator > 0 else 0.0


def require_confidence(confidence: float) -> None:
    """Refuse (`PrivacyError`) a confidence outside (0, 1)."""
    if not 0 < confidence < 1:
        raise PrivacyError(f"audit: expected a confidence above 0 and below 1, found {confidence}")


def require_delta(delta: float) -> None:
    """Refuse (`PrivacyError`) a delta outside [0, 1)."""
    if not 0 <= delta < 1:
        raise PrivacyError(f"audit: expected delta from 0 to below 1, found {delta}")
