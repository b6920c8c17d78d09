"""A site's ledger on disk: append-only, synced before it is acted on, locked against other processes.

In `folder`: `ledger.jsonl`, `policy.json`, `payloads/`. In the key folder (`privacy.keys`), which lies elsewhere and is
never shared: the key, and a witness of the newest record and of the patients. A ledger that is shorter than its
witness, or missing although one of its patients is known, is a hard stop: neither losing a file nor taking in or
dropping a patient starts a budget anew.
Whoever can rewrite both folders can rewrite history; the head that travels with every message is the witness outside.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fediod_med import __version__
from fediod_med.errors import PrivacyError
from fediod_med.privacy.history import History, policy_body
from fediod_med.privacy.keys import (
    UNIVERSES,
    Witness,
    find_witness,
    finding,
    ledger_key,
    patient_hashes,
    read_witness,
    write_witness,
)
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import (
    PrivacyPolicy,
    replace_synced,
    sync_folder,
    universe_id,
    write_all,
    write_policy,
)
from fediod_med.privacy.records import RESTORE, Head, Record, read_chain

logger = logging.getLogger(__name__)

LEDGER, POLICY, PAYLOADS = "ledger.jsonl", "policy.json", "payloads"


def check_unpromised(folder: Path, *, key_folder: Path, site: str, patients: Iterable[str]) -> None:
    """Refuse mode `none` to patients whom a ledger covers.

    Args:
        folder: of the site's ledger, if it has one.
        key_folder: of the site, if it has one.
        site: name, for messages.
        patients: ids of everybody whose data the site would use.

    Raises:
        PrivacyError: one of them was promised a bound, or that cannot be told because the key folder is lost.
    """
    if not (key_folder / UNIVERSES).is_dir():
        if (folder / LEDGER).exists():
            raise PrivacyError(
                f"{site}: {folder} holds a ledger, and {key_folder} no witness of whom it covers; restore the key "
                "folder, or name the folders of another ledger"
            )
        return
    key, ids = ledger_key(key_folder), set(patients)
    found = find_witness(key_folder, universe=universe_id(ids, key), patients=patient_hashes(ids, key))
    witness = None if found is None else read_witness(found)
    if witness is not None:
        raise PrivacyError(
            f"{site}: expected patients without a promise, found some whom the ledger at {witness.folder or folder} "
            "covers; mode none would let out everything that their budget bounds. Set privacy_mode and epsilon as "
            "they were, or take other patients"
        )


class PrivacyLedger:
    """One site's records; see the module. Use `PrivacyLedger.open`.

    Everything that reads and then writes does so inside `with ledger.locked():`.
    """

    def __init__(
        self,
        folder: Path,
        policy: PrivacyPolicy,
        *,
        key: bytes,
        witness: Path,
        patients: frozenset[str],
        insecure: bool = False,
    ) -> None:
        self.folder = folder
        self.policy = policy
        self._patients = patients
        self._digest = policy.digest()
        self.history = History()
        self._insecure = insecure
        self._path = folder / LEDGER
        self._key = key
        self._witness = witness
        self._lock_path = witness.with_suffix(".lock")
        self._size = 0
        self._last_line = b""
        self._threads = threading.RLock()
        self._depth = 0

    @classmethod
    def open(
        cls, folder: Path, *, key_folder: Path, policy: PrivacyPolicy, patients: Iterable[str], insecure: bool = False
    ) -> PrivacyLedger:
        """Open a site's ledger, or begin it if none of these patients was ever seen with this key.

        A changed policy is recorded and continues what was spent. So does a changed set of patients, as long as one of
        them is known: whoever joins is charged with everything that was spent before, and whoever left stays known.
        Per patient the sum of all charges is thus never too small.

        Args:
            folder: of the ledger.
            key_folder: of the site, elsewhere.
            policy: of the patients' universe.
            patients: ids of everybody in the universe.
            insecure: noise comes from a reproducible source.

        Raises:
            PrivacyError: mode none; the ledger is missing, damaged, shortened, or of other patients; one of these
                patients has spent in another ledger; the policy file was edited; the policy names another universe.
        """
        if policy.mode == "none":
            raise PrivacyError(f"{policy.site}: mode none has no ledger; use Gate.unprotected")
        if key_folder.resolve().is_relative_to(folder.resolve()):
            raise PrivacyError(f"{key_folder}: the key folder must not lie inside the ledger's folder; move it")
        key, ids = ledger_key(key_folder), set(patients)
        if policy.universe != universe_id(ids, key):
            raise PrivacyError(
                f"{policy.site}: expected the universe id of these {len(ids)} patients under the key in {key_folder}, "
                "as policy.universe_id gives it, found another"
            )
        hashes = patient_hashes(ids, key)
        with finding(key_folder) as witnesses:
            known = find_witness(key_folder, universe=policy.universe, patients=hashes)
            witness = known or witnesses / f"{policy.universe}.json"
            ledger = cls(folder, policy, key=key, witness=witness, patients=hashes, insecure=insecure)
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
        return self._seen().progress.get(permit, 0)

    def advance(self, permit: str, number: int) -> None:
        """Remember, synced, that a training makes update `number`; only inside `locked()`."""
        seen = self._seen()
        write_witness(self._witness, replace(seen, progress={**seen.progress, permit: number}))

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
        whole = data[known : data.rfind(b"\n") + 1]
        torn = data[known + len(whole) :]
        try:
            for record in read_chain(whole, self.head, key=self._key, where=str(self._path)):
                self._take_in(record)
            self._check_same_patients()
            self._check_witness()
        except BaseException:
            self._forget()
            raise
        if torn:
            self._set_aside(torn)

    def _set_aside(self, torn: bytes) -> None:
        """Take a line without its end out of the ledger, once the witness has confirmed all lines before it.

        Whoever wrote it was killed in the middle, and acts on a record only after it is synced: nothing left on its
        strength. The bytes are kept beside the ledger.
        """
        kept = self._path.with_name(f"{LEDGER}.torn-{hashlib.sha256(torn).hexdigest()[:16]}")
        replace_synced(kept, torn)
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, self._size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        logger.warning("%s: the last line was incomplete, its writer was killed; kept as %s", self._path, kept.name)

    def _take_in(self, record: Record) -> None:
        self.history.add(record)
        self._last_line = record.line()
        self._size += len(self._last_line)

    def _forget(self) -> None:
        """Read everything again at the next `locked()`."""
        self.history, self._size, self._last_line = History(), 0, b""

    def _check_witness(self) -> None:
        head, seen = self.head, read_witness(self._witness)
        if seen is None:
            if head.sequence > 0:
                raise PrivacyError(f"{self._witness}: the witness of this ledger is missing; restore the key folder")
        elif head.sequence < 0:
            raise PrivacyError(
                f"{self._path}: missing, although some of these patients have spent before, in the ledger at "
                f"{seen.folder or self.folder}; name that folder, or {RESTORE}"
            )
        elif self.hash_at(seen.head.sequence) != seen.head.hash:
            raise PrivacyError(
                f"{self._path}: expected record {seen.head.sequence} as witnessed at {seen.folder or self.folder}, "
                f"found {head.sequence + 1} records that do not contain it: an older or another copy; {RESTORE}"
            )
        if head.sequence >= 0 and (seen is None or seen.head != head):
            self._move_witness()

    def _seen(self) -> Witness:
        """The witness as stored; before the first, an empty one of this ledger's patients."""
        seen = read_witness(self._witness)
        return seen or Witness(self.head, "", frozenset({self.policy.universe}), self._patients)

    def _move_witness(self) -> None:
        write_witness(self._witness, replace(self._seen(), head=self.head, folder=str(self.folder.resolve())))

    def _remember_patients(self) -> None:
        """Before anything is charged to patients, the key folder knows that they belong to this ledger, here."""
        seen = self._seen()
        everybody = replace(
            seen,
            folder=str(self.folder.resolve()),
            universes=seen.universes | {self.policy.universe},
            patients=(seen.patients or frozenset()) | self._patients,
        )
        if everybody != seen:
            write_witness(self._witness, everybody)

    def _take_up_policy(self) -> None:
        (self.folder / PAYLOADS).mkdir(parents=True, exist_ok=True)
        path = self.folder / POLICY
        known = {policy.canonical() for policy in self.history.policies} | {self.policy.canonical()}
        if path.exists() and path.read_bytes() not in known:
            raise PrivacyError(f"{path}: not a policy that this ledger took up; restore it, it is never edited by hand")
        if self.head.sequence >= 0:
            self._remember_patients()
        if self.head.sequence < 0 or self.history.policy != self.policy:
            self.append("open", policy_body(self.policy))
        if not path.exists() or path.read_bytes() != self.policy.canonical():
            write_policy(path, self.policy)

    def _check_same_patients(self) -> None:
        if self.head.sequence < 0:
            return
        before = self.history.policy
        known = before.universe == self.policy.universe or self._witness.exists()
        if before.site != self.policy.site or not known:
            raise PrivacyError(
                f"{self.folder}: holds the ledger of site {before.site} and other patients; give {self.policy.site} "
                "and these patients a folder of their own"
            )
