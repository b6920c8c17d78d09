"""The key folder of a site: its key, and what is known of every ledger that was opened with it.

`ledger.key`, and in `universes/` one witness and one lock for each ledger, named after its first patient universe. The
folder lies apart from the ledgers and is never shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fediod_med.errors import PrivacyError
from fediod_med.privacy.policy import replace_synced, sync_folder
from fediod_med.privacy.records import Head, canonical

KEY, UNIVERSES = "ledger.key", "universes"
_READABLE_BY_OTHERS = 0o077


@dataclass(frozen=True)
class Witness:
    """What the key folder knows of a ledger.

    Attributes:
        head: a record that the ledger must contain.
        folder: where the ledger was last.
        universes: ids of all patient sets that it was opened with.
        patients: `patient_hashes` of everybody whom it ever covered; `None` if an earlier version left them out.
        progress: by permit, the newest update that its training was let make.
    """

    head: Head
    folder: str
    universes: frozenset[str]
    patients: frozenset[str] | None
    progress: Mapping[str, int] = field(default_factory=dict)


def ledger_key(key_folder: Path) -> bytes:
    """The site's key, 32 bytes from the operating system; made at the first call, readable by its owner only.

    Raises:
        PrivacyError: a damaged key, one that others may read, or one that is lost although it has signed ledgers.
    """
    path = key_folder / KEY
    if not path.exists():
        _make_key(path)
    key = path.read_bytes()
    if len(key) != 32:
        raise PrivacyError(f"{path}: expected a key of 32 bytes, found {len(key)}; restore it from a copy")
    if path.stat().st_mode & _READABLE_BY_OTHERS:
        raise PrivacyError(f"{path}: others may read this key; chmod 600 {path}")
    return key


def patient_hashes(patient_ids: Iterable[str], key: bytes) -> frozenset[str]:
    """HMAC-SHA256 of each patient id, cut to 128 bits, hex: tells who is known, and names nobody without the key."""
    return frozenset(
        hmac.new(key, b"fediod patient\0" + name.encode(), hashlib.sha256).hexdigest()[:32] for name in patient_ids
    )


def read_witness(path: Path) -> Witness | None:
    """A stored witness, or `None` where there is none.

    Raises:
        PrivacyError: the file is not a witness.
    """
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_bytes())
        patients = raw.get("patients")
        return Witness(
            head=Head(int(raw["sequence"]), str(raw["hash"])),
            folder=str(raw.get("folder", "")),
            universes=frozenset(map(str, raw.get("universes", [path.stem]))),
            patients=None if patients is None else frozenset(map(str, patients)),
            progress={str(permit): int(number) for permit, number in raw.get("progress", {}).items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PrivacyError(f"{path}: expected a witness, found something else; restore it") from error


def write_witness(path: Path, witness: Witness) -> None:
    """Store a witness, atomically and synced, readable by its owner only."""
    raw = {
        "sequence": witness.head.sequence,
        "hash": witness.head.hash,
        "folder": witness.folder,
        "universes": sorted(witness.universes),
        "patients": None if witness.patients is None else sorted(witness.patients),
        "progress": dict(witness.progress),
    }
    replace_synced(path, canonical(raw), 0o600)


def find_witness(key_folder: Path, *, universe: str, patients: frozenset[str]) -> Path | None:
    """The witness of the ledger that covers any of these patients; `None` when all are new to this key.

    Args:
        key_folder: of the site.
        universe: id of the patient set.
        patients: its `patient_hashes`.

    Raises:
        PrivacyError: several ledgers cover some of them, or an earlier version did not record whom a ledger covers.
    """
    known = _witnesses(key_folder)
    found = [
        path for path, witness in known.items()
        if universe in witness.universes or not patients.isdisjoint(witness.patients or ())
    ]  # fmt: skip
    if len(found) > 1:
        folders = " and ".join(known[path].folder or str(path) for path in found)
        raise PrivacyError(
            f"{key_folder}: some of these patients have spent in the ledger at {folders}, and two budgets cannot be "
            "joined; open each ledger with its own patients only"
        )
    unknown = [path for path, witness in known.items() if witness.patients is None]
    if unknown and not found:
        raise PrivacyError(
            f"{unknown[0]}: an earlier version did not record whom this ledger covers, so these patients may have "
            "spent; open it once with the patients that it was made for"
        )
    return found[0] if found else None


def head_of(key_folder: Path, universe: str) -> Head | None:
    """Newest witnessed record of the ledger of a patient set; `None` when this key folder knows of none."""
    for witness in _witnesses(key_folder).values():
        if universe in witness.universes:
            return witness.head
    return None


@contextlib.contextmanager
def finding(key_folder: Path) -> Iterator[Path]:
    """Folder of the witnesses, for one process at a time: between looking for a ledger and beginning one."""
    folder = key_folder / UNIVERSES
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def _witnesses(key_folder: Path) -> dict[Path, Witness]:
    found = {path: read_witness(path) for path in sorted((key_folder / UNIVERSES).glob("*.json"))}
    return {path: witness for path, witness in found.items() if witness is not None}


def _make_key(path: Path) -> None:
    # In this order: another process may have made both since the caller looked, the key first.
    if (path.parent / UNIVERSES).exists() and not path.exists():
        raise PrivacyError(
            f"{path}: the key is missing, and it has signed ledgers: {path.parent / UNIVERSES} knows them. Restore it "
            "from a copy; with another key these patients would begin a budget anew"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{KEY}.{os.getpid()}.{threading.get_ident()}.part")
    replace_synced(temporary, os.urandom(32), 0o600)
    with contextlib.suppress(FileExistsError):  # another process was first: its key counts
        os.link(temporary, path)
    temporary.unlink()
    sync_folder(path.parent)
