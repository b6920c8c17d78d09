"""How much noise each part of a site's work needs, so that all of it together stays within the site's budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scipy.optimize import brentq

from fediod_med.errors import PrivacyError
from fediod_med.privacy.accounting import gaussian_epsilon, rdp_epsilon
from fediod_med.privacy.mechanisms import Mechanism

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Part:
    """One planned part: `steps` steps at `sample_rate`, which may spend `share` of the total `mu^2`."""

    sample_rate: float
    steps: int
    share: float = 1.0


def subsampled_mu(mechanism: Mechanism) -> float:
    """Gaussian-DP `mu` of a mechanism.

    `sqrt(T) / sigma` without subsampling (exact), otherwise the central limit `q sqrt(T (e^(1/sigma^2) - 1))`
    (Bu et al. 1911.11607, corollary 5.4). It divides a budget; it never decides whether one is kept.
    """
    if mechanism.sample_rate == 1:
        return math.sqrt(mechanism.steps) / mechanism.noise_multiplier
    growth = math.expm1(min(700.0, mechanism.noise_multiplier**-2))
    return mechanism.sample_rate * math.sqrt(mechanism.steps * growth)


def noise_for_mu(mu: float, sample_rate: float, steps: int) -> float:
    """The noise multiplier at which `subsampled_mu` equals `mu`."""
    if sample_rate == 1:
        return math.sqrt(steps) / mu
    return 1 / math.sqrt(math.log1p(mu**2 / (sample_rate**2 * steps)))


def plan_noise(parts: Mapping[str, Part], *, epsilon: float, delta: float) -> dict[str, Mechanism]:
    """Noise for every part, so that all parts together cost at most `epsilon` by the enforced accountant.

    The total `mu^2` is found by root finding; part i gets `share_i` of it.

    Args:
        parts: by kind; shares are positive and sum to 1.
        epsilon: budget, kept from below within 1e-3.
        delta: of the budget.

    Raises:
        PrivacyError: no part, shares that do not sum to 1, or a budget that no noise can meet.
    """
    shares = [part.share for part in parts.values()]
    if not parts or min(shares) <= 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise PrivacyError(f"noise plan: expected positive shares that sum to 1, found {shares}; adjust the shares")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"noise plan: expected a positive finite epsilon, found {epsilon}")

    def plan(log_mu: float) -> dict[str, Mechanism]:
        mu = math.exp(log_mu)
        return {
            kind: Mechanism(
                noise_for_mu(mu * math.sqrt(part.share), part.sample_rate, part.steps), part.sample_rate, part.steps
            )
            for kind, part in parts.items()
        }

    def cost(log_mu: float) -> float:
        return rdp_epsilon(list(plan(log_mu).values()), delta)

    return plan(_largest_within(cost, epsilon, start=math.log(_gaussian_mu_for(epsilon, delta))))


def noise_multiplier_for(epsilon: float, delta: float, *, sample_rate: float, steps: int) -> float:
    """The noise multiplier of a single part that may spend the whole budget; errors as in `plan_noise`."""
    plan = plan_noise({"part": Part(sample_rate, steps)}, epsilon=epsilon, delta=delta)
    return plan["part"].noise_multiplier


def _gaussian_mu_for(epsilon: float, delta: float) -> float:
    """The `mu` at which the closed form gives `epsilon`."""
    low, high = math.log(1e-6), math.log(1e4)
    return math.exp(brentq(lambda log_mu: gaussian_epsilon(math.exp(log_mu), delta) - epsilon, low, high, xtol=1e-6))


def _largest_within(cost: Callable[[float], float], limit: float, *, start: float) -> float:
    """An argument whose increasing `cost` lies within `TOLERANCE` below `limit`; found by bracketing around `start`."""
    tolerance = min(TOLERANCE, limit / 1000)
    low, low_gap = start, cost(start) - limit
    for _ in range(40):
        if low_gap <= 0:
            break
        low -= 0.5
        low_gap = cost(low) - limit
    else:
        raise PrivacyError(f"noise plan: no noise keeps the cost at or below epsilon {limit}; ask for a larger epsilon")
    high, high_gap = low, low_gap
    while high_gap <= 0:
        high += 0.25
        high_gap = cost(high) - limit
    while low_gap < -tolerance:
        # Regula falsi towards the middle of the tolerance, kept away from the ends so that both always move.
        share = (-tolerance / 2 - low_gap) / (high_gap - low_gap)
        middle = low + min(max(share, 0.02), 0.9) * (high - low)
        gap = cost(middle) - limit
        if gap <= 0:
            low, low_gap = middle, gap
        else:
            high, high_gap = middle, gap
    return low
