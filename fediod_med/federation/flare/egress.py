"""What a hospital lets out, by its own file: names, dtypes and sizes, read from the bytes that would leave.

The rules belong to the hospital (`local/privacy.json` of its kit) and are checked after everything else has run,
without trust in the code that made the reply.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fediod_med import errors
from fediod_med.encodings import inflate
from fediod_med.errors import ProtocolError, SettingsError
from fediod_med.protocol import REPLY_FIELDS, Reply, unpack

MODES = ("none", "gradient", "dp-sgd")  # from the weakest promise to the strongest
REASONS = frozenset(name for name in vars(errors) if name.endswith(("Error", "Exceeded")))
"""Names under which a hospital may say why it refused; nothing else about a refusal leaves."""

ENVELOPE = frozenset({"payload", "mode", "sequence", "hash", "epsilon"})
ACCOUNT: Mapping[str, type | tuple[type, ...]] = {
    "mode": str,
    "epsilon": float,
    "epsilon_prv": float,
    "budget": float,
    "delta": float,
    "patients": int,
    "ledger_head": dict,
    "policy": str,
    "statement": str,
}
"""Fields of a hospital's privacy record; all but `mode` may be None or missing."""

LONGEST_STATEMENT = 4000  # characters
_HEADER_KEYS = {"kind", "round", "site", "type"}
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FieldRule:
    """One tensor that may leave.

    Attributes:
        dtypes: safetensors names: `F16`, and where compact replies are allowed `U8` (probabilities) or `F8_E4M3`
            (gradients).
        max_values: their largest number.
    """

    dtypes: tuple[str, ...]
    max_values: int


@dataclass(frozen=True)
class Outgoing:
    """What was found in a reply that may leave."""

    kind: str
    round: int
    size: int


_PARTS: Mapping[str, FieldRule] = {
    "scale": FieldRule(("F32",), 1),
    "box": FieldRule(("I64",), 6),
    "shape": FieldRule(("I64",), 5),
}


def default_rules(*, batch: int, size: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Rules for `batch` volumes of edge `size`, as plain data for `privacy.json`; a hospital may narrow them."""
    values = batch * 4 * size**3
    gradient = {"dtypes": ["F16", "F8_E4M3"], "max_values": values}
    return {
        "describe": {"class_counts": {"dtypes": ["F16"], "max_values": 4}},
        "answer": {
            "probs": {"dtypes": ["F16", "U8"], "max_values": values},
            "realism": {"dtypes": ["F16"], "max_values": batch},
            "x_gradient": gradient,
        },
        "pull_back": {"x_gradient": gradient},
    }


def read_rules(fields: Mapping[str, Any], where: str) -> dict[str, dict[str, FieldRule]]:
    """Rules from plain data.

    Raises:
        SettingsError: a kind or field that no reply has, or a rule that is none.
    """
    rules: dict[str, dict[str, FieldRule]] = {}
    for kind, listed in fields.items():
        if kind not in REPLY_FIELDS or not isinstance(listed, Mapping) or set(listed) - REPLY_FIELDS[kind]:
            raise SettingsError(f"{where}: expected fields of {', '.join(REPLY_FIELDS)}, found {kind}: {listed}")
        for name, rule in listed.items():
            if (
                not isinstance(rule, Mapping)
                or set(rule) != {"dtypes", "max_values"}
                or not isinstance(rule["dtypes"], list)
                or not all(isinstance(dtype, str) for dtype in rule["dtypes"])
                or type(rule["max_values"]) is not int
            ):
                raise SettingsError(f"{where}: {kind}.{name}: expected dtypes and max_values, found {rule}")
        rules[kind] = {name: FieldRule(tuple(rule["dtypes"]), rule["max_values"]) for name, rule in listed.items()}
    return rules


def check_payload(payload: object, rules: Mapping[str, Mapping[str, FieldRule]], *, site: str) -> Outgoing:
    """Read the bytes of a reply and hold them against the rules.

    Args:
        payload: what `protocol.pack` made of a `Reply`.
        rules: by kind of reply and field, see `read_rules`.
        site: whose name the reply must bear.

    Raises:
        ProtocolError: anything that the rules do not name, of another dtype, or larger; says what.
    """
    if not isinstance(payload, bytes):
        raise ProtocolError(f"reply: expected bytes, found {type(payload).__name__}")
    message = unpack(payload)  # well-formed, finite, and every byte accounted for
    data = inflate(payload)
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = entries.pop("__metadata__")
    header = json.loads(metadata["fediod_message"])
    if not isinstance(message, Reply) or message.site != site:
        raise ProtocolError(f"reply: expected a reply of {site}, found another message")
    if set(metadata) != {"fediod_message"} or set(header) != _HEADER_KEYS:
        raise ProtocolError(f"{message.kind}: undeclared header fields {sorted({*metadata, *header} - _HEADER_KEYS)}")
    if message.kind not in rules:
        raise ProtocolError(f"{message.kind}: this site lets no such reply out")
    fields = rules[message.kind]
    for name, entry in entries.items():
        owner, slash, part = name.partition("/")
        if owner not in fields or (slash and part not in _PARTS):
            raise ProtocolError(f"{message.kind}: undeclared field {name!r}")
        rule = _PARTS[part] if slash else fields[owner]
        count = math.prod(entry["shape"])
        if entry["dtype"] not in rule.dtypes:
            raise ProtocolError(
                f"{message.kind}.{name}: expected dtype {' or '.join(rule.dtypes)}, found {entry['dtype']}"
            )
        if count > rule.max_values:
            raise ProtocolError(f"{message.kind}.{name}: expected at most {rule.max_values} values, found {count}")
    return Outgoing(message.kind, message.round, len(payload))


def check_envelope(envelope: Mapping[str, Any], *, floor_mode: str) -> None:
    """Hold what travels beside a payload against its fixed form: mode, ledger head, epsilon spent.

    Raises:
        ProtocolError: another field, another type, or a mode weaker than `floor_mode`, the least that the site allows.
    """
    if set(envelope) != ENVELOPE:
        raise ProtocolError(f"reply: undeclared or missing fields {sorted(set(envelope) ^ ENVELOPE)}")
    mode, sequence, digest, epsilon = (envelope[name] for name in ("mode", "sequence", "hash", "epsilon"))
    if mode not in MODES or MODES.index(mode) < MODES.index(floor_mode):
        raise ProtocolError(f"reply: expected mode {floor_mode} or stronger, found {mode!r}")
    if mode == "none":
        good = sequence is None and digest is None and epsilon is None
    else:
        good = type(sequence) is int and sequence >= 0 and isinstance(digest, str) and bool(_HASH.fullmatch(digest))
        good = good and type(epsilon) is float and math.isfinite(epsilon)
    if not good:
        raise ProtocolError("reply: expected the ledger's head and a finite epsilon, or neither in mode none")


def check_account(account: object) -> None:
    """Hold a hospital's privacy record against its fixed form.

    Raises:
        ProtocolError: another field or type, or more text than a statement has.
    """
    if not isinstance(account, Mapping):
        raise ProtocolError(f"privacy record: expected fields, found {type(account).__name__}")
    undeclared = set(account) - set(ACCOUNT)
    if undeclared or account.get("mode") not in MODES:
        raise ProtocolError(f"privacy record: undeclared fields {sorted(undeclared)} or no mode")
    for name, value in account.items():
        if value is not None and type(value) is not ACCOUNT[name]:
            raise ProtocolError(f"privacy record: {name}: expected {ACCOUNT[name]}, found {type(value).__name__}")
        if isinstance(value, str) and len(value) > LONGEST_STATEMENT:
            raise ProtocolError(f"privacy record: {name}: expected at most {LONGEST_STATEMENT} characters")
    head = account.get("ledger_head")
    if head is not None and (set(head) != {"sequence", "hash"} or not _HASH.fullmatch(str(head["hash"]))):
        raise ProtocolError("privacy record: expected the ledger's head, found something else")
