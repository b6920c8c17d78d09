"""What a history of mechanisms costs: epsilon at a given delta, by several independent routes. Pure functions.

Renyi DP (Opacus) is enforced, because a fixed set of orders is a valid filter for adaptively chosen mechanisms; PRV
(Opacus) is the tighter number to report; for releases without subsampling the closed form is exact; Google's
dp-accounting is a second implementation where it is installed. Opacus and dp-accounting are imported on first use.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fediod_med.errors import PrivacyError
from fediod_med.privacy.mechanisms import Array, Mechanism

ORDERS: tuple[float, ...] = (
    *(1 + i / 10 for i in range(1, 100)),
    *range(12, 65),
    *(80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096),
)
"""Renyi orders of the filter; fixed, because a filter may not choose its orders by what it has seen."""

PRV_ERROR = 0.01
_NO_OPACUS = "privacy accounting: needs opacus, which is not installed; pip install 'fediod-med[privacy]'"


@dataclass(frozen=True)
class EpsilonReport:
    """Epsilon of one history at one delta.

    Attributes:
        rdp: the enforced upper bound.
        prv: PRV upper bound; `None` where the numerical method fails (epsilon in the hundreds).
        exact: closed form; `None` when a mechanism is subsampled.
        dp_accounting: PLD upper bound by Google's library; `None` where it was not asked for or is not installed.
    """

    rdp: float
    prv: float | None
    exact: float | None
    dp_accounting: float | None


def merged(history: Sequence[Mechanism]) -> list[Mechanism]:
    """The same history with equal mechanisms joined; composition does not depend on the order."""
    steps: Counter[tuple[float, float]] = Counter()
    for part in history:
        steps[part.noise_multiplier, part.sample_rate] += part.steps
    return [Mechanism(noise, rate, count) for (noise, rate), count in steps.items()]


def renyi_divergences(history: Sequence[Mechanism]) -> Array:
    """Renyi DP of the composition at each of `ORDERS`: the sum over mechanisms (Mironov et al. 1908.10530)."""
    try:
        from opacus.accountants.analysis.rdp import compute_rdp
    except ImportError as error:
        raise PrivacyError(_NO_OPACUS) from error
    total = np.zeros(len(ORDERS))
    for part in merged(history):
        total += np.asarray(
            compute_rdp(q=part.sample_rate, noise_multiplier=part.noise_multiplier, steps=part.steps, orders=[*ORDERS])
        )
    return total


def epsilon_of_renyi(divergences: Array, delta: float) -> float:
    """Epsilon of Renyi divergences at `ORDERS` (Balle et al. 1905.09982, theorem 21); never below 0."""
    orders = np.array(ORDERS)
    epsilons = divergences - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float(np.nan_to_num(epsilons, nan=math.inf).min()))


def rdp_epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """Epsilon by Renyi DP; 0 for an empty history."""
    _check_delta(delta)
    return epsilon_of_renyi(renyi_divergences(history), delta) if history else 0.0


def prv_epsilon(history: Sequence[Mechanism], delta: float, error: float = PRV_ERROR) -> float:
    """Upper bound by privacy loss random variables (Gopi et al. 2106.02848), at most `error` above its estimate.

    Raises:
        PrivacyError: the numerical method fails, which happens when epsilon is in the hundreds.
    """
    _check_delta(delta)
    if not history:
        return 0.0
    try:
        from opacus.accountants import PRVAccountant
    except ImportError as error:
        raise PrivacyError(_NO_OPACUS) from error
    accountant = PRVAccountant()
    accountant.history = [(m.noise_multiplier, m.sample_rate, m.steps) for m in merged(history)]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quadrature and the orders of its domain estimate
            epsilon = float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, OverflowError, MemoryError, IndexError) as failure:
        raise PrivacyError(f"PRV accountant: no result for {history[:3]} ({failure}); the RDP bound stands") from None
    if not math.isfinite(epsilon):
        raise PrivacyError(f"PRV accountant: no finite result for {history[:3]}; the RDP bound stands")
    return max(0.0, epsilon)


def gaussian_mu(history: Sequence[Mechanism]) -> float:
    """`mu` of the composed Gaussian mechanisms: `sqrt(sum steps / noise_multiplier^2)` (Dong et al. 1905.02383).

    Raises:
        PrivacyError: a mechanism is subsampled; the closed form then does not apply.
    """
    if any(part.sample_rate != 1 for part in history):
        raise PrivacyError("closed form: expected sample rate 1 throughout, found subsampling; use RDP or PRV")
    return math.sqrt(sum(part.steps / part.noise_multiplier**2 for part in history))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """`Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2)` (Balle and Wang 1805.06530, theorem 8), mu > 0."""
    first = float(log_ndtr(-epsilon / mu + mu / 2))
    second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return math.exp(first) * -math.expm1(min(0.0, second - first))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon at which `gaussian_delta(mu, epsilon)` equals delta; 0 where none is needed."""
    _check_delta(delta)
    if mu <= 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    # delta(eps) < Phi(-eps/mu + mu/2), and Phi(-t) <= exp(-t^2/2) / 2.
    highest = mu * (mu / 2 + math.sqrt(2 * math.log(1 / delta)))
    return float(brentq(lambda eps: gaussian_delta(mu, eps) - delta, 0.0, highest, xtol=1e-12))


def dp_accounting_epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """Upper bound by Google's privacy loss distributions, add-or-remove pairs.

    Raises:
        PrivacyError: dp-accounting is not installed.
    """
    _check_delta(delta)
    if not has_dp_accounting():
        raise PrivacyError("second accountant: dp-accounting is not installed; pip install dp-accounting")
    if not history:
        return 0.0
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for part in merged(history):
        event = dp_accounting.GaussianDpEvent(part.noise_multiplier)
        if part.sample_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(part.sample_rate, event)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, part.steps))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def has_dp_accounting() -> bool:
    """Whether the second accountant is installed."""
    return importlib.util.find_spec("dp_accounting") is not None


def epsilon_report(
    history: Sequence[Mechanism], delta: float, *, error: float = PRV_ERROR, with_dp_accounting: bool = False
) -> EpsilonReport:
    """All accounts of one history; `EpsilonReport` says when a field is `None`."""
    try:
        prv: float | None = prv_epsilon(history, delta, error)
    except PrivacyError:
        prv = None
    plain = all(part.sample_rate == 1 for part in history)
    return EpsilonReport(
        rdp=rdp_epsilon(history, delta),
        prv=prv,
        exact=gaussian_epsilon(gaussian_mu(history), delta) if plain else None,
        dp_accounting=dp_accounting_epsilon(history, delta) if with_dp_accounting and has_dp_accounting() else None,
    )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta: expected a number between 0 and 1, found {delta}")
