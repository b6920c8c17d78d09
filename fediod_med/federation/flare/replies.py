"""The replies of a hospital that have left, kept so that a query that comes again is answered with the same bytes.

A lost acknowledgement, a restarted server or an impatient scheduler all repeat a query. Answering it anew would take
another step of the discriminator and, in mode `gradient`, spend budget for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fediod_med.durable import write_atomically
from fediod_med.errors import ProtocolError

KEEP_ROUNDS = 2
LOCK_PATIENCE_S = 20.0  # for the process of an ended job to let go
_QUERY, _REPLY = "query", "reply"


@dataclass(frozen=True)
class Envelope:
    """A sealed reply as it travels.

    Attributes:
        payload: bytes of a `protocol.Reply`, sealed by the gate.
        mode: of the gate.
        sequence: of the ledger's newest record; None in mode `none`.
        hash: of that record; None in mode `none`.
        epsilon: spent so far, by the enforced accountant; None in mode `none`.
    """

    payload: bytes
    mode: str
    sequence: int | None
    hash: str | None
    epsilon: float | None


class ReplyStore:
    """Replies of one run, by round and kind.

    Args:
        folder: of the run at this hospital.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "replies"

    def find(self, number: int, kind: str, digest: str) -> Envelope | None:
        """The reply that has left, or None.

        Raises:
            ProtocolError: this round had another query of the same kind: a second answer would be a second release.
        """
        path = self._path(number, kind, _REPLY)
        if not path.is_file():
            return None
        head, _, payload = path.read_bytes().partition(b"\n")
        stored = json.loads(head)
        if stored.pop("digest") != digest:
            raise ProtocolError(f"{kind}: round {number} was answered for another query; a round has one of a kind")
        return Envelope(payload=payload, **stored)

    def keep(self, number: int, kind: str, digest: str, envelope: Envelope) -> None:
        """Write a reply down, whole or not at all, before it leaves; replies of older rounds are dropped."""
        head = {name: value for name, value in asdict(envelope).items() if name != "payload"} | {"digest": digest}
        data = json.dumps(head).encode() + b"\n" + envelope.payload
        write_atomically(self._path(number, kind, _REPLY), lambda temporary: temporary.write_bytes(data))
        for path in self._folder.glob("*-*.*"):
            if 0 < int(path.name.partition("-")[0]) <= number - KEEP_ROUNDS:
                path.unlink(missing_ok=True)

    def keep_query(self, number: int, kind: str, data: bytes) -> None:
        """Write down the query of an answer, from which the teacher's graph can be rebuilt."""
        write_atomically(self._path(number, kind, _QUERY), lambda temporary: temporary.write_bytes(data))

    def query(self, number: int, kind: str) -> bytes | None:
        """What `keep_query` wrote, or None."""
        path = self._path(number, kind, _QUERY)
        return path.read_bytes() if path.is_file() else None

    def _path(self, number: int, kind: str, what: str) -> Path:
        return self._folder / f"{number:06d}-{kind}.{what}"


@contextlib.contextmanager
def only_process(folder: Path, *, patience_s: float = LOCK_PATIENCE_S) -> Iterator[None]:
    """Hold a run's folder for one process of the hospital.

    Raises:
        ProtocolError: another process still answers for this run after `patience_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise ProtocolError(f"{folder}: another process of this site answers for the run") from error
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
