"""Checks a ledger from its file and its policy alone, recomputing everything that it claims."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fediod_med.errors import PrivacyError
from fediod_med.privacy.accounting import EpsilonReport, epsilon_report, rdp_epsilon
from fediod_med.privacy.history import History
from fediod_med.privacy.ledger import LEDGER, PAYLOADS, POLICY
from fediod_med.privacy.policy import TRAINED_KINDS, PrivacyPolicy
from fediod_med.privacy.records import GENESIS, Head, read_chain
from fediod_med.privacy.statement import privacy_statement

_SLACK = 1e-9  # of two evaluations of the same sum


@dataclass(frozen=True)
class KindSpent:
    """What one kind cost on its own; epsilons of kinds do not add up to the total.

    Attributes:
        charges: releases or trainings paid for, retries included.
        finished: of them, answered or trained to the end.
        epsilon: by RDP, of this kind alone.
    """

    charges: int
    finished: int
    epsilon: float


@dataclass(frozen=True)
class Witnessed:
    """What a ledger said when a given record was its newest.

    Attributes:
        policy: in force then.
        epsilon: by RDP, of everything charged until then, at that policy's delta.
    """

    policy: PrivacyPolicy
    epsilon: float


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify_ledger`.

    Attributes:
        ok: nothing is wrong.
        problems: what is wrong, in words.
        policy: in force at the end; `None` when the ledger cannot be read that far.
        head: newest readable record.
        epsilon: of everything charged, at the policy's delta; `None` when there is a problem: no claim then.
        by_kind: see `KindSpent`; empty when there is a problem.
        signed: the signatures were checked, too.
        statement: the claim in one paragraph, or that none is made.
        witnessed: what held at the head that was asked for; `None` without one, or when there is a problem.
        patient_sets: number of patient sets that the ledger went through.
        growth: what was spent after the head that was asked for, in a sentence; empty when nothing was.
    """

    ok: bool
    problems: tuple[str, ...]
    policy: PrivacyPolicy | None
    head: Head | None
    epsilon: EpsilonReport | None
    by_kind: Mapping[str, KindSpent]
    signed: bool
    statement: str
    witnessed: Witnessed | None = None
    patient_sets: int = 1
    growth: str = ""


def verify_ledger(
    folder: Path, *, key: bytes | None = None, head: Head | None = None, with_dp_accounting: bool = True
) -> Verification:
    """Check chain, hashes, order, policy, composition and every stored payload.

    Args:
        folder: of the ledger.
        key: of the site, to check signatures; without it whoever can write the file can also rewrite all of it.
        head: a witness; without one, records missing at the end cannot be noticed. What held then is told, too.
        with_dp_accounting: recompute by Google's accountant as well, where it is installed.
    """
    problems: list[str] = []
    history, then = _read(folder / LEDGER, key, problems, head)
    policy = history.policies[-1] if history.policies else None
    _check_policy_file(folder / POLICY, policy, problems)
    _check_head(head, history, problems)
    for payload in history.payloads.values():
        path = folder / PAYLOADS / payload
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != payload:
            problems.append(f"{path}: missing or changed after it was sealed")
    if history.insecure or (policy is not None and policy.insecure):
        problems.append(f"{folder}: INSECURE: made with reproducible noise; epsilon is void")
    report, by_kind = None, {}
    if not problems and policy is not None and policy.delta is not None:
        report = epsilon_report(history.spent(), policy.delta, with_dp_accounting=with_dp_accounting)
        by_kind = {kind: _kind_spent(history, kind, policy.delta) for kind in sorted(history.counts)}
    newest = history.head if history.hashes else None
    sets = max(1, len({policy.universe for policy in history.policies}))
    growth = ""
    if report is not None and then is not None and head is not None and report.rdp > then.epsilon:
        growth = f"Since record {head.sequence} more was spent: epsilon {then.epsilon:.4g} then, {report.rdp:.4g} now."
    if problems:
        statement = unverified(problems[0])
    else:
        statement = privacy_statement(policy, epsilon=report, head=newest, patient_sets=sets)
    return Verification(
        ok=not problems,
        problems=tuple(problems),
        policy=policy,
        head=newest,
        epsilon=report,
        by_kind=by_kind,
        signed=key is not None,
        statement=statement,
        witnessed=None if problems else then,
        patient_sets=sets,
        growth=growth,
    )


def unverified(problem: str) -> str:
    """What is stated in place of a claim that has a problem."""
    return f"NOT VERIFIED: {problem}. Until this is resolved, no bound on patient leakage is claimed."


def _read(
    path: Path, key: bytes | None, problems: list[str], head: Head | None
) -> tuple[History, Witnessed | None]:  # fmt: skip
    """Everything up to the first problem, and what held at `head`; the budget is checked under each policy in turn."""
    history, then = History(), None
    if not path.is_file():
        problems.append(f"{path}: expected a ledger, found nothing")
        return history, then
    charged = False  # under the policy in force
    try:
        for record in read_chain(path.read_bytes(), Head(-1, GENESIS), key=key, where=str(path)):
            if record.event == "open" and charged:
                _check_budget(history, problems)
                charged = False
            history.add(record)
            charged |= record.event in ("charge", "train")
            if history.head == head and history.policy.delta is not None:
                then = Witnessed(history.policy, rdp_epsilon(history.spent(), history.policy.delta))
    except PrivacyError as error:
        problems.append(str(error))
    if not history.hashes and not problems:
        problems.append(f"{path}: the ledger is empty")
    if charged:
        _check_budget(history, problems)
    return history, then


def _check_budget(history: History, problems: list[str]) -> None:
    policy = history.policy
    if policy.epsilon is None or policy.delta is None:
        return
    epsilon = rdp_epsilon(history.spent(), policy.delta)
    if epsilon > policy.epsilon + _SLACK:
        problems.append(f"{policy.site}: spent epsilon {epsilon:.4f}, the policy allows {policy.epsilon:g}")
    for kind, part in policy.parts.items():
        if kind not in TRAINED_KINDS and history.counts[kind] > part.steps:
            problems.append(f"{policy.site}: {history.counts[kind]} releases of {kind}, the policy allows {part.steps}")


def _check_policy_file(path: Path, policy: PrivacyPolicy | None, problems: list[str]) -> None:
    if not path.is_file():
        problems.append(f"{path}: expected the policy, found nothing")
    elif policy is None or path.read_bytes() != policy.canonical():
        problems.append(f"{path}: not the policy that the ledger names")


def _check_head(head: Head | None, history: History, problems: list[str]) -> None:
    if head is None:
        return
    if not 0 <= head.sequence < len(history.hashes) or history.hashes[head.sequence] != head.hash:
        problems.append(f"ledger: record {head.sequence} was witnessed, and is missing or another now")


def _kind_spent(history: History, kind: str, delta: float) -> KindSpent:
    trained = [permit for permit in history.permits.values() if permit.kind == kind and permit.weights is not None]
    charges = [charge for retries in history.charges.values() for charge in retries if charge.kind == kind]
    answered = [charge for charge in charges if charge.sequence in history.payloads]
    return KindSpent(history.counts[kind], len(trained) + len(answered), rdp_epsilon(history.spent(kind), delta))
