"""An audit's results as rows for a table: each attack beside the claim that it tried to contradict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AuditRow:
    """One attack or one canary audit.

    Attributes:
        target: `teacher:<site>`, `discriminator:<site>`, `student`, ...
        attack: its name.
        auc: area under the curve, where the attack has one.
        auc_low: lower end of its interval.
        auc_high: upper end.
        p_value: of no leak.
        lower_bound: epsilon that was shown at least.
        ceiling: the largest lower bound that so few patients can show.
        claimed: epsilon of the claim, or none where nothing is claimed.
        contradicts: the claim cannot be right.
        members: patients or canaries that were trained on.
        non_members: those that were not.
    """

    target: str
    attack: str
    auc: float | None
    auc_low: float | None
    auc_high: float | None
    p_value: float | None
    lower_bound: float | None
    ceiling: float | None
    claimed: float | None
    contradicts: bool
    members: int | None
    non_members: int | None


def audit_rows(audit: Mapping[str, Any]) -> tuple[AuditRow, ...]:
    """Rows of `audit.json`: the attacks, then the canaries; entries of another form are left out."""
    rows = [_attack(entry) for entry in _entries(audit, "attacks")]
    return tuple(rows + [_canaries(entry) for entry in _entries(audit, "one_run")])


def audit_words(audit: Mapping[str, Any]) -> tuple[str, ...]:
    """What must be said beside the rows: alarms, what an audit means, to whom it belongs, and what was skipped."""
    alarms = [f"ALARM: {line}" for line in _texts(audit.get("alarms"))]
    notes = [str(audit[name]) for name in ("meaning", "not_private") if isinstance(audit.get(name), str)]
    return (*alarms, *notes, *(f"Skipped: {line}" for line in _texts(audit.get("skipped"))))


def _attack(entry: Mapping[str, Any]) -> AuditRow:
    interval = entry.get("auc_interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    shown, claim = _object(entry.get("epsilon")), _object(entry.get("claim"))
    return AuditRow(
        target=str(entry.get("target", "")),
        attack=str(entry.get("attack", "")),
        auc=_number(entry.get("auc")),
        auc_low=_number(low),
        auc_high=_number(high),
        p_value=_number(entry.get("p_value")),
        lower_bound=_number(shown.get("epsilon")),
        ceiling=_number(shown.get("ceiling")),
        claimed=_number(claim.get("epsilon")),
        contradicts=entry.get("contradicts_claim") is True,
        members=_count(entry.get("members")),
        non_members=_count(entry.get("non_members")),
    )


def _canaries(entry: Mapping[str, Any]) -> AuditRow:
    canaries, inserted = _count(entry.get("canaries")), _count(entry.get("inserted"))
    return AuditRow(
        target=str(entry.get("target", "")),
        attack="canaries in one run",
        auc=None,
        auc_low=None,
        auc_high=None,
        p_value=None,
        lower_bound=_number(entry.get("epsilon_lower_bound")),
        ceiling=_number(entry.get("ceiling")),
        claimed=_number(entry.get("claimed_epsilon")),
        contradicts=entry.get("contradicts_claim") is True,
        members=inserted,
        non_members=None if inserted is None or canaries is None else canaries - inserted,
    )


def _entries(audit: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = audit.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _texts(value: Any) -> list[str]:
    return [str(line) for line in value] if isinstance(value, list) else []


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
