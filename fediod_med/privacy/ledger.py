"""A site's ledger on disk: append-only, synced before it is acted on, locked against other processes.

In `folder`: `ledger.jsonl`, `policy.json`, `payloads/`. In `key_folder`, which lies elsewhere and is never shared:
`ledger.key` and, for each patient universe, a witness of the newest record and the lock. A ledger that is shorter than
its witness, or missing although its patients are known, is a hard stop: losing a file never starts a budget anew.
Whoever can rewrite both folders can rewrite history; the head that travels with every message is the witness outside.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fediod_med import __version__
from fediod_med.errors import PrivacyError
from fediod_med.privacy.history import History, policy_body
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import PrivacyPolicy, replace_synced, sync_folder, write_all, write_policy
from fediod_med.privacy.records import RESTORE, Head, Record, canonical, read_chain

LEDGER, POLICY, PAYLOADS, KEY = "ledger.jsonl", "policy.json", "payloads", "ledger.key"
_READABLE_BY_OTHERS = 0o077


@dataclass(frozen=True)
class Witness:
    """What the key folder knows of a ledger.

    Attributes:
        head: a record that the ledger must contain.
        progress: by permit, the newest update that its training was let make.
    """

    head: Head
    progress: Mapping[str, int]


def ledger_key(key_folder: Path) -> bytes:
    """The site's key, 32 bytes from the operating system; made at the first call, readable by its owner only.

    Raises:
        PrivacyError: a damaged key, or one that others may read.
    """
    path = key_folder / KEY
    if not path.exists():
        key_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{KEY}.{os.getpid()}.{threading.get_ident()}.part")
        replace_synced(temporary, os.urandom(32), 0o600)
        with contextlib.suppress(FileExistsError):  # another process was first: its key counts
            os.link(temporary, path)
        temporary.unlink()
        sync_folder(key_folder)
    key = path.read_bytes()
    if len(key) != 32:
        raise PrivacyError(f"{path}: expected a key of 32 bytes, found {len(key)}; restore it from a copy")
    if path.stat().st_mode & _READABLE_BY_OTHERS:
        raise PrivacyError(f"{path}: others may read this key; chmod 600 {path}")
    return key


class PrivacyLedger:
    """One site's records; see the module. Use `PrivacyLedger.open`.

    Everything that reads and then writes does so inside `with ledger.locked():`.
    """

    def __init__(self, folder: Path, key_folder: Path, policy: PrivacyPolicy, *, insecure: bool = False) -> None:
        if key_folder.resolve().is_relative_to(folder.resolve()):
            raise PrivacyError(f"{key_folder}: the key folder must not lie inside the ledger's folder; move it")
        self.folder = folder
        self.policy = policy
        self._digest = policy.digest()
        self.history = History()
        self._insecure = insecure
        self._path = folder / LEDGER
        self._key = ledger_key(key_folder)
        known = key_folder / "universes"
        known.mkdir(mode=0o700, exist_ok=True)
        self._witness = known / f"{policy.universe}.json"
        self._lock_path = known / f"{policy.universe}.lock"
        self._size = 0
        self._last_line = b""
        self._threads = threading.RLock()
        self._depth = 0

    @classmethod
    def open(
        cls, folder: Path, *, key_folder: Path, policy: PrivacyPolicy, insecure: bool = False
    ) -> PrivacyLedger:  # fmt: skip
        """Open a site's ledger, or begin it if these patients were never seen with this key.

        A changed policy for the same patients is recorded and continues what was spent.

        Raises:
            PrivacyError: mode none; the ledger is missing, damaged, shortened, or of other patients; the policy file
                was edited.
        """
        if policy.mode == "none":
            raise PrivacyError(f"{policy.site}: mode none has no ledger; use Gate.unprotected")
        if not policy.universe.isalnum():
            raise PrivacyError(f"{policy.site}: expected a universe id as policy.universe_id gives it")
        (folder / PAYLOADS).mkdir(parents=True, exist_ok=True)
        ledger = cls(folder, key_folder, policy, insecure=insecure)
        with ledger.locked():
            ledger._take_up_policy()
        return ledger

    @property
    def head(self) -> Head:
        """The newest record."""
        return self.history.head

    def spent(self) -> list[Mechanism]:
        """Everything that was charged, equal mechanisms joined."""
        return self.history.spent()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclusive over threads and processes; on entry the records of others are read and the witness is checked."""
        with self._threads:
            if self._depth:
                yield  # inside a release already
                return
            # Opened anew each time: a descriptor inherited over a fork would share its lock with the parent.
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
            self._depth += 1
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._refresh()
                yield
            finally:
                self._depth -= 1
                os.close(descriptor)

    def append(self, event: str, body: Mapping[str, Any]) -> Record:
        """Write one record, sync it, and move the witness; only inside `locked()`.

        Raises:
            PrivacyError: the record contradicts the history, or could not be written; nothing was charged then.
        """
        if not self._depth:
            raise PrivacyError("ledger: append outside of locked()")
        if event != "open" and self.history.policy != self.policy:
            raise PrivacyError(f"{self.folder}: another process took up another policy meanwhile; open the gate again")
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        head = self.head
        record = Record(
            head.sequence + 1, time, event, head.hash, self._digest, __version__, self._insecure, dict(body)
        ).signed(self._key)  # fmt: skip
        try:
            self._take_in(record)
            self._write(record.line())
        except BaseException:
            self._forget()  # memory may be ahead of the file
            raise
        self._move_witness()
        return record

    def progress(self, permit: str) -> int:
        """Number of the newest update that a training was let make; 0 before the first. Only inside `locked()`."""
        return self._progress().get(permit, 0)

    def advance(self, permit: str, number: int) -> None:
        """Remember, synced, that a training makes update `number`; only inside `locked()`."""
        self._put_witness(Witness(self.head, {**self._progress(), permit: number}))

    def store(self, payload: bytes) -> str:
        """Keep a sealed payload for replay, synced; its SHA-256."""
        name = hashlib.sha256(payload).hexdigest()
        replace_synced(self.folder / PAYLOADS / name, payload)
        return name

    def load(self, name: str) -> bytes:
        """A stored payload; `PrivacyError` when it is missing or changed."""
        path = self.folder / PAYLOADS / name
        payload = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(payload).hexdigest() != name:
            raise PrivacyError(f"{path}: expected the payload that the ledger names, found another or none; restore it")
        return payload

    def hash_at(self, sequence: int) -> str | None:
        """Hash of one record, or `None` when there is none of that number."""
        return self.history.hashes[sequence] if 0 <= sequence < len(self.history.hashes) else None

    def _write(self, line: bytes) -> None:
        first = not self._path.exists()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            write_all(descriptor, line)
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, self._size - len(line))  # nothing was done on its strength yet
            raise PrivacyError(f"{self._path}: could not be written ({error.strerror}); nothing left") from error
        finally:
            os.close(descriptor)
        if first:
            sync_folder(self.folder)

    def _refresh(self) -> None:
        """Read what other processes appended, and check that nothing that was read before has changed or gone."""
        known = len(self._last_line)
        data = b""
        if self._path.exists():
            with self._path.open("rb") as handle:
                handle.seek(self._size - known)
                data = handle.read()
        if data[:known] != self._last_line:
            raise PrivacyError(f"{self._path}: was shortened or rewritten while in use; {RESTORE}")
        try:
            for record in read_chain(data[known:], self.head, key=self._key, where=str(self._path)):
                self._take_in(record)
        except BaseException:
            self._forget()
            raise
        self._check_same_patients()
        self._check_witness()

    def _take_in(self, record: Record) -> None:
        self.history.add(record)
        self._last_line = record.line()
        self._size += len(self._last_line)

    def _forget(self) -> None:
        """Read everything again at the next `locked()`."""
        self.history, self._size, self._last_line = History(), 0, b""

    def _check_witness(self) -> None:
        head, seen = self.head, self._read_witness()
        witness = None if seen is None else seen.head
        if witness is None:
            if head.sequence > 0:
                raise PrivacyError(f"{self._witness}: the witness of this ledger is missing; restore the key folder")
        elif head.sequence < 0:
            raise PrivacyError(f"{self._path}: missing, although these patients have spent before; {RESTORE}")
        elif self.hash_at(witness.sequence) != witness.hash:
            raise PrivacyError(
                f"{self._path}: expected record {witness.sequence} as witnessed, found {head.sequence + 1} records "
                f"that do not contain it: an older or another copy; {RESTORE}"
            )
        if head.sequence >= 0 and witness != head:
            self._move_witness()

    def _read_witness(self) -> Witness | None:
        if not self._witness.exists():
            return None
        try:
            raw = json.loads(self._witness.read_bytes())
            progress = {str(permit): int(number) for permit, number in raw.get("progress", {}).items()}
            return Witness(Head(int(raw["sequence"]), str(raw["hash"])), progress)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PrivacyError(f"{self._witness}: expected a witness, found something else; restore it") from error

    def _progress(self) -> Mapping[str, int]:
        witness = self._read_witness()
        return {} if witness is None else witness.progress

    def _move_witness(self) -> None:
        self._put_witness(Witness(self.head, self._progress()))

    def _put_witness(self, witness: Witness) -> None:
        raw = {"sequence": witness.head.sequence, "hash": witness.head.hash, "progress": dict(witness.progress)}
        replace_synced(self._witness, canonical(raw), 0o600)

    def _take_up_policy(self) -> None:
        path = self.folder / POLICY
        known = {policy.canonical() for policy in self.history.policies} | {self.policy.canonical()}
        if path.exists() and path.read_bytes() not in known:
            raise PrivacyError(f"{path}: not a policy that this ledger took up; restore it, it is never edited by hand")
        if self.head.sequence < 0 or self.history.policy != self.policy:
            self.append("open", policy_body(self.policy))
        if not path.exists() or path.read_bytes() != self.policy.canonical():
            write_policy(path, self.policy)

    def _check_same_patients(self) -> None:
        if self.head.sequence < 0:
            return
        before = self.history.policy
        if (before.site, before.universe) != (self.policy.site, self.policy.universe):
            raise PrivacyError(
                f"{self.folder}: holds the ledger of site {before.site} and other patients; give {self.policy.site} "
                "and these patients a folder of their own"
            )
