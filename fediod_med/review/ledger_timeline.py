"""What a hospital's ledger tells over time: each charge, and what had been spent after it.

Reading the copy in a run folder needs no key: order and hashes are checked, signatures are not. `verified` runs the
full check that `fediod privacy verify` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fediod_med.errors import FediodError, PrivacyError
from fediod_med.privacy.accounting import epsilon_of_renyi, renyi_divergences
from fediod_med.privacy.history import History
from fediod_med.privacy.ledger import LEDGER
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.records import GENESIS, Head, Record, read_chain

_WORDS = {
    "open": "policy taken up",
    "charge": "release paid for",
    "done": "release answered",
    "train": "training paid for",
    "trained": "training finished",
}


@dataclass(frozen=True)
class LedgerEvent:
    """One record of a ledger.

    Attributes:
        sequence: from 0.
        time: UTC, ISO 8601.
        event: `open`, `charge`, `done`, `train` or `trained`.
        words: the same for people.
        kind: what was paid for (`teacher`, `discriminator`, `counts`, ...), or empty.
        noise_multiplier: of the charge.
        sample_rate: of the charge.
        steps: of the charge.
        epsilon: spent in all after this record, by RDP; none while delta is unknown.
    """

    sequence: int
    time: str
    event: str
    words: str
    kind: str
    noise_multiplier: float | None
    sample_rate: float | None
    steps: int | None
    epsilon: float | None


@dataclass(frozen=True)
class LedgerTimeline:
    """A hospital's ledger, up to the first record that makes no sense.

    Attributes:
        site: name.
        events: in order.
        budget: epsilon that the policy in force allows.
        delta: of the policy in force.
        mode: of the policy in force.
        patients: declared.
        problem: why reading stopped, or empty.
    """

    site: str
    events: tuple[LedgerEvent, ...]
    budget: float | None
    delta: float | None
    mode: str
    patients: int | None
    problem: str = ""


@dataclass(frozen=True)
class SiteVerification:
    """What checking one hospital's claim gave.

    Attributes:
        site: name.
        ok: the claim holds.
        statement: in one paragraph.
        problems: what is wrong.
        epsilon: recomputed by RDP.
        epsilon_prv: recomputed by the tighter accountant.
        signed: signatures were checked, too.
    """

    site: str
    ok: bool
    statement: str
    problems: tuple[str, ...]
    epsilon: float | None
    epsilon_prv: float | None
    signed: bool


def ledger_timeline(run: Path, site: str) -> LedgerTimeline:
    """Read `privacy/<site>/ledger.jsonl` of a run folder; never fails: what is wrong becomes `problem`."""
    path = run / "privacy" / site / LEDGER
    history, events, problem = History(), [], ""
    spent = _Spent()
    try:
        data = path.read_bytes()
        for record in read_chain(data, Head(-1, GENESIS), key=None, where=path.name):
            history.add(record)
            events.append(_event(record, history, spent))
    except FileNotFoundError:
        problem = "no ledger: this hospital answered without a privacy promise, or its ledger was not copied"
    except (OSError, PrivacyError) as error:
        problem = str(error)
    if not history.policies:
        return LedgerTimeline(site, (), None, None, "", None, problem or f"{path.name}: the ledger is empty")
    policy = history.policy
    return LedgerTimeline(
        site, tuple(events), policy.epsilon, policy.delta, policy.mode, policy.patients, problem=problem
    )


def verified(run: Path) -> tuple[SiteVerification, ...] | str:
    """Check every claim of a run against its ledger, with the audit beside it; takes seconds.

    Returns:
        One result per hospital, or, in words, why nothing can be checked.
    """
    # loads the accountants and, through them, torch
    from fediod_med.claims import check_claim, find_claims, stated_with_audit

    try:
        claims = find_claims(run)
    except FediodError as error:
        return str(error)
    results = []
    for claim in claims:
        found = check_claim(claim)
        try:
            statement = stated_with_audit(found, run / "audit" / "audit.json")
        except FediodError as error:
            statement = f"{found.statement} {error}"
        epsilon = found.epsilon
        results.append(
            SiteVerification(
                site=claim.site,
                ok=found.ok,
                statement=statement,
                problems=found.problems,
                epsilon=None if epsilon is None else epsilon.rdp,
                epsilon_prv=None if epsilon is None else epsilon.prv,
                signed=found.signed,
            )
        )
    return tuple(results)


class _Spent:
    """Renyi divergences of everything charged so far; they add up, so each record costs one addition."""

    def __init__(self) -> None:
        self.total: np.ndarray | None = None
        self._of_one_step: dict[tuple[float, float], np.ndarray] = {}

    def add(self, mechanism: Mechanism) -> None:
        key = mechanism.noise_multiplier, mechanism.sample_rate
        if key not in self._of_one_step:
            self._of_one_step[key] = np.asarray(renyi_divergences([Mechanism(*key, 1)]))
        cost = self._of_one_step[key] * mechanism.steps
        self.total = cost if self.total is None else self.total + cost

    def epsilon(self, delta: float | None) -> float | None:
        if delta is None:
            return None
        return 0.0 if self.total is None else epsilon_of_renyi(self.total, delta)


def _event(record: Record, history: History, spent: _Spent) -> LedgerEvent:
    body, mechanism, kind = record.body, None, ""
    if record.event in ("charge", "train"):
        mechanism = Mechanism(body["noise_multiplier"], body["sample_rate"], body["steps"])
        kind = str(body["kind"])
        spent.add(mechanism)
    elif record.event == "trained":
        kind = history.permits[str(body["permit"])].kind
    elif record.event == "done":
        charges = (charge for retries in history.charges.values() for charge in retries)
        kind = next((charge.kind for charge in charges if charge.sequence == body["charge"]), "")
    return LedgerEvent(
        sequence=record.sequence,
        time=record.time,
        event=record.event,
        words=_WORDS[record.event],
        kind=kind,
        noise_multiplier=None if mechanism is None else mechanism.noise_multiplier,
        sample_rate=None if mechanism is None else mechanism.sample_rate,
        steps=None if mechanism is None else mechanism.steps,
        epsilon=spent.epsilon(history.policy.delta),
    )
