"""An audit by canaries in a single training: insert each with probability 1/2, guess which went in, bound epsilon.

Knows neither networks nor scans: training and scoring are callables.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fediod_med.errors import PrivacyError
from fediod_med.privacy.audit import one_run_epsilon

Canary = TypeVar("Canary")
Model = TypeVar("Model")


@dataclass(frozen=True)
class OneRunAudit:
    """What one training with canaries showed.

    Attributes:
        canaries: m, each inserted with probability 1/2.
        inserted: how many were.
        guesses: r, on how many the attacker committed; fixed beforehand.
        correct: v, right guesses.
        epsilon_lower_bound: largest refuted epsilon.
        ceiling: the bound if every guess were right.
        delta: of the claim.
        confidence: of the bound.
        claimed_epsilon: what the training promises, or none.
        contradicts_claim: the bound exceeds the claim.
    """

    canaries: int
    inserted: int
    guesses: int
    correct: int
    epsilon_lower_bound: float
    ceiling: float
    delta: float
    confidence: float
    claimed_epsilon: float | None
    contradicts_claim: bool


def fair_coins(count: int) -> list[bool]:
    """Independent fair coins from the operating system."""
    return [bool(secrets.randbits(1)) for _ in range(count)]


def one_run_audit(
    train_fn: Callable[[Sequence[Canary]], Model],
    canaries: Sequence[Canary],
    *,
    score_fn: Callable[[Model, Canary], float],
    guesses: int | None = None,
    delta: float = 1e-5,
    confidence: float = 0.95,
    claimed_epsilon: float | None = None,
    coins: Callable[[int], Sequence[bool]] = fair_coins,
) -> OneRunAudit:
    """Insert each canary with probability 1/2 into one training, guess which went in, and bound epsilon.

    Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), algorithm 1: the half of the guesses with the highest scores
    says "in", the half with the lowest "out", the rest abstains.

    Args:
        train_fn: trains on the canaries it is given (and whatever else it holds), each as one patient. The declared
            number of patients, and with it the sampling rate, must not depend on how many it is given.
        canaries: m; the more unlike anything else, the more they show.
        score_fn: higher where the model seems to know the canary; minus the loss, say.
        guesses: r, fixed beforehand; all canaries when omitted. Fewer guesses are surer ones.
        delta: of the claim.
        confidence: of the bound.
        claimed_epsilon: of the training, for the verdict.
        coins: source of the insertions; secret until the guesses are made.

    Raises:
        PrivacyError: no canary, more guesses than canaries, or a score that is not finite.
    """
    committed = len(canaries) if guesses is None else guesses
    if not 1 <= committed <= len(canaries):
        raise PrivacyError(f"canaries: expected guesses from 1 to their number {len(canaries)}, found {committed}")
    inserted = list(coins(len(canaries)))
    if len(inserted) != len(canaries):
        raise PrivacyError(f"canaries: expected {len(canaries)} coins, found {len(inserted)}")
    model = train_fn([canary for canary, chosen in zip(canaries, inserted, strict=True) if chosen])
    scores = np.array([score_fn(model, canary) for canary in canaries], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise PrivacyError("canaries: expected finite scores, found NaN or Inf; did the training diverge?")
    order = np.argsort(scores, kind="stable")
    out, into = order[: committed // 2], order[len(order) - (committed - committed // 2) :]
    correct = sum(not inserted[i] for i in out) + sum(inserted[i] for i in into)
    bound, ceiling = (
        one_run_epsilon(len(canaries), committed, right, delta=delta, confidence=confidence)
        for right in (correct, committed)
    )
    return OneRunAudit(
        canaries=len(canaries),
        inserted=sum(inserted),
        guesses=committed,
        correct=correct,
        epsilon_lower_bound=bound,
        ceiling=ceiling,
        delta=delta,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        contradicts_claim=claimed_epsilon is not None and bound > claimed_epsilon,
    )
