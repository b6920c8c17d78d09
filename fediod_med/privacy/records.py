"""One line of a ledger: canonical JSON, chained by SHA-256 to the line before it, signed by the site's key."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fediod_med.errors import PrivacyError

GENESIS = "0" * 64

_MECHANISM = frozenset({"noise_multiplier", "sample_rate", "steps", "clip_norm", "sensitivity"})
EVENTS: Mapping[str, frozenset[str]] = {
    "open": frozenset({"policy"}),
    "charge": frozenset({"kind", "query", "digest"}) | _MECHANISM,
    "done": frozenset({"charge", "payload"}),
    "train": frozenset({"kind", "run", "digest"}) | _MECHANISM,
    "trained": frozenset({"permit", "weights"}),
}
"""What a record of each event states: a policy taken up, a release paid for, its payload stored, a training paid for,
its weights."""


@dataclass(frozen=True)
class Head:
    """The newest record: its number, from 0, and its hash."""

    sequence: int
    hash: str


@dataclass(frozen=True)
class Record:
    """One line.

    Attributes:
        sequence: from 0, without gaps.
        time: UTC, whole seconds.
        event: see `EVENTS`.
        previous: hash of the line before; `GENESIS` for the first.
        policy: digest of the policy in force.
        code: version of this package.
        insecure: noise from a reproducible source; such a ledger never verifies.
        body: the event's own fields.
        hmac: HMAC-SHA256, under the site's key, of all the above.
        hash: SHA-256 of all the above, the HMAC included, so that no byte can change unseen even without the key.
    """

    sequence: int
    time: str
    event: str
    previous: str
    policy: str
    code: str
    insecure: bool
    body: Mapping[str, Any]
    hmac: str = ""
    hash: str = ""

    def line(self) -> bytes:
        """The record as it stands in the file, newline included."""
        return canonical(_fields(self)) + b"\n"

    def signed(self, key: bytes) -> Record:
        """The same record with its HMAC and hash."""
        signature = _hmac(self, key)
        with_hmac = Record(**{**_fields(self), "hmac": signature, "hash": ""})
        return Record(**{**_fields(with_hmac), "hash": _hash(with_hmac)})


def canonical(value: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, no spaces, ASCII and finite numbers: parsing and writing again gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_record(line: bytes, where: str) -> Record:
    """Read one line, newline included.

    Raises:
        PrivacyError: torn, not a record, not canonical, or its hash is not that of its content.
    """
    if not line.endswith(b"\n"):
        raise PrivacyError(
            f"{where}: the last line is incomplete: a process was killed while it wrote; nothing left on its strength. "
            "The hospital's next run sets it aside, once the witness confirms that all lines before it are there"
        )
    try:
        record = Record(**json.loads(line))
        same = record.line() == line
        complete = set(record.body) == EVENTS[record.event]
        intact = hmac.compare_digest(_hash(record), record.hash)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PrivacyError(f"{where}: expected a ledger record, found something else; {RESTORE}") from error
    if not (same and complete and intact):
        raise PrivacyError(f"{where}: this record was changed after it was written; {RESTORE}")
    return record


def read_chain(data: bytes, after: Head, *, key: bytes | None, where: str) -> Iterator[Record]:
    """The records of `data`, each checked against the one before it, and against the key where one is given.

    Args:
        data: whole lines.
        after: what the first line must follow; `Head(-1, GENESIS)` at the start of a file.
        key: of the site; without it signatures are not checked.
        where: the file, for messages.

    Raises:
        PrivacyError: at the first line that is damaged, out of order or signed by another key.
    """
    for line in io.BytesIO(data):  # lines end at newlines only
        place = f"{where}, line {after.sequence + 2}"
        record = parse_record(line, place)
        if record.sequence != after.sequence + 1 or record.previous != after.hash:
            raise PrivacyError(f"{place}: a record is missing, doubled or out of order; {RESTORE}")
        if key is not None and not hmac.compare_digest(_hmac(record, key), record.hmac):
            raise PrivacyError(f"{place}: not signed by this site's key; use the key folder that it was opened with")
        after = Head(record.sequence, record.hash)
        yield record


RESTORE = "restore the file from a copy that reaches the witness, or take new patients: the budget cannot start anew"


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _hmac(record: Record, key: bytes) -> str:
    return hmac.new(key, canonical({**_fields(record), "hmac": "", "hash": ""}), hashlib.sha256).hexdigest()


def _hash(record: Record) -> str:
    return hashlib.sha256(canonical({**_fields(record), "hash": ""})).hexdigest()
