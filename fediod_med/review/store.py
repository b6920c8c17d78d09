"""Reviews on disk: an append-only table in SQLite, hash-chained, shared by any number of threads and processes.

SQLite's write-ahead log lets pages read while one writes; `synchronous=FULL` means that what was answered is on disk.
Triggers refuse to change, delete or replace an event. Whoever can open the file can drop the triggers; `verify` then
finds the break in the chain. Only a cut-off end or a chain rewritten as a whole cannot be seen from the file alone:
note the head (number and hash), as exports do, and give it to `verify`.

The file must lie on a local disk: SQLite's log does not work over network file systems.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fediod_med import __version__
from fediod_med.errors import InputError, SettingsError
from fediod_med.review.events import (
    COLUMNS,
    GENESIS,
    Event,
    Review,
    canonical,
    check_who_and_what,
    current_of,
    plain_detail,
    problems_of_chain,
)

_APPLICATION_ID = 0x66726576  # "frev"
_BUSY_S = 30.0
_TRIGGERS = ("events_are_not_changed", "events_are_not_deleted", "events_are_appended")
_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS events (
        sequence INTEGER PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, submission TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL, time TEXT NOT NULL, reviewer TEXT NOT NULL, run TEXT NOT NULL, "case" TEXT NOT NULL,
        arm TEXT NOT NULL, mask_sha256 TEXT NOT NULL, image_sha256 TEXT NOT NULL, verdict TEXT NOT NULL,
        rating_tc INTEGER, rating_wt INTEGER, rating_et INTEGER, comment TEXT NOT NULL, tags TEXT NOT NULL,
        seconds REAL NOT NULL, supersedes TEXT NOT NULL, detail TEXT NOT NULL, version TEXT NOT NULL,
        origin TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE) STRICT""",
    'CREATE INDEX IF NOT EXISTS events_by_subject ON events (reviewer, run, "case", arm)',
    """CREATE TRIGGER IF NOT EXISTS events_are_not_changed BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'reviews are append-only'); END""",
    """CREATE TRIGGER IF NOT EXISTS events_are_not_deleted BEFORE DELETE ON events
        BEGIN SELECT RAISE(ABORT, 'reviews are append-only'); END""",
    # INSERT OR REPLACE would delete without the trigger above: an event may only follow the newest one.
    """CREATE TRIGGER IF NOT EXISTS events_are_appended BEFORE INSERT ON events
        WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence) + 1, 0) FROM events)
            OR EXISTS (SELECT 1 FROM events WHERE event_id = NEW.event_id OR submission = NEW.submission
                OR hash = NEW.hash)
            OR (NEW.sequence > 0
                AND NEW.previous IS NOT (SELECT hash FROM events WHERE sequence = NEW.sequence - 1))
        BEGIN SELECT RAISE(ABORT, 'reviews are append-only'); END""",
)
_SELECT = 'SELECT "' + '", "'.join(COLUMNS) + '" FROM events'
_INSERT = f"INSERT INTO events VALUES ({', '.join('?' * len(COLUMNS))})"


@dataclass(frozen=True)
class StoreCheck:
    """What `ReviewStore.verify` found.

    Attributes:
        ok: nothing is wrong.
        problems: what is, in sentences.
        events: number of events.
        head: hash of the newest event; `GENESIS` when there is none.
    """

    ok: bool
    problems: tuple[str, ...]
    events: int
    head: str


class ReviewStore:
    """The reviews in one file; every call opens it anew, so an object may be shared, forked or kept in a cache."""

    def __init__(self, path: Path, *, busy_s: float = _BUSY_S) -> None:
        """Open or begin a store.

        Args:
            path: of the file; its folder is made when absent.
            busy_s: how long to wait for another process that is writing.

        Raises:
            InputError: the file is something else, or cannot be written.
        """
        self.path = path
        self._busy_s = busy_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: expected a place for reviews, could not make its folder ({error})") from error
        with self._connected() as connection:
            self._begin(connection)

    # --- writing ------------------------------------------------------------------------------------------------------

    def submit(self, review: Review) -> Event:
        """Append a review; it supersedes the same reviewer's last one of the same case and arm.

        Sending the same submission again returns the event that it made, and adds nothing.

        Raises:
            SettingsError: the submission key belongs to other content.
            InputError: the store cannot be written.
        """
        draft = _draft(
            "review", review.reviewer, review.run, review.case, review.submission, plain_detail(review.detail)
        )
        draft = replace(
            draft,
            arm=review.arm,
            verdict=review.verdict,
            comment=review.comment,
            tags=tuple(dict.fromkeys(review.tags)),
            seconds=round(float(review.seconds), 3),
            mask_sha256=review.mask_sha256,
            image_sha256=review.image_sha256,
            rating_tc=review.ratings.get("TC"),
            rating_wt=review.ratings.get("WT"),
            rating_et=review.ratings.get("ET"),
        )

        def prepare(connection: sqlite3.Connection) -> Event:
            known = _select(connection, 'reviewer = ? AND run = ? AND "case" = ? AND arm = ?', draft.subject)
            latest = current_of(known)
            return replace(draft, supersedes=latest[-1].event_id if latest else "")

        event, is_new = self._append(draft.submission, prepare)
        if not is_new and not _says_the_same(event, draft):
            raise SettingsError(
                f"submission {draft.submission}: expected the review it was first used for, found another; "
                "reload the page and send again"
            )
        return event

    def record_once(
        self, kind: str, *, reviewer: str, run: str, case: str, submission: str, detail: Mapping[str, Any]
    ) -> Event:
        """Append an assignment or a reveal unless its submission key is known; whoever comes first decides.

        Returns:
            The event under that key, whichever call made it.

        Raises:
            SettingsError: an unknown kind or a bad id.
        """
        if kind not in ("assignment", "reveal"):
            raise SettingsError(f"review event: expected assignment or reveal, found {kind!r}")
        check_who_and_what(reviewer, run, case, "", submission)
        draft = _draft(kind, reviewer, run, case, submission, plain_detail(detail))
        return self._append(submission, lambda _: draft)[0]

    def take_in(self, events: Iterable[Event]) -> int:
        """Append events of another store, or of an earlier export of this one; those known already are left out.

        All or nothing. An imported event keeps its id, time and content, and notes its hash in the other chain.

        Returns:
            How many were added.

        Raises:
            InputError: an event was changed, or contradicts one that is here under the same id or key.
        """
        arriving = list(events)
        broken = [event.sequence for event in arriving if event.digest() != event.hash]
        if broken:
            raise InputError(f"import: expected events as they were exported, found event {broken[0]} changed")
        added = 0
        with self._connected() as connection, _writing(connection):
            for event in arriving:
                known = _select(connection, "event_id = ? OR submission = ?", (event.event_id, event.submission))
                if any(not event.same_content(other) for other in known):
                    raise InputError(f"import: event {event.event_id} is here already, and says something else")
                if not known:
                    _insert(connection, _after(connection, replace(event, origin=event.origin or event.hash)))
                    added += 1
        return added

    # --- reading ------------------------------------------------------------------------------------------------------

    def events(
        self,
        *,
        run: str | None = None,
        case: str | None = None,
        reviewer: str | None = None,
        kind: str | None = None,
        after: int | None = None,
    ) -> tuple[Event, ...]:
        """Events in the order they were written, all or those of a run, case, reviewer or kind, or after a number."""
        named = ("run = ?", run), ('"case" = ?', case), ("reviewer = ?", reviewer), ("kind = ?", kind)
        chosen = {name: value for name, value in (*named, ("sequence > ?", after)) if value is not None}
        with self._connected() as connection:
            return tuple(_select(connection, " AND ".join(chosen), tuple(chosen.values())))

    def current(
        self, *, run: str | None = None, case: str | None = None, reviewer: str | None = None
    ) -> tuple[Event, ...]:
        """The reviews that hold now, the latest of each reviewer, run, case and arm; see `events.current_of`."""
        return current_of(self.events(run=run, case=case, reviewer=reviewer, kind="review"))

    @property
    def head(self) -> tuple[int, str]:
        """Number (-1 when empty) and hash of the newest event: note it elsewhere as a witness."""
        with self._connected() as connection:
            row = connection.execute("SELECT sequence, hash FROM events ORDER BY sequence DESC LIMIT 1").fetchone()
        return (int(row[0]), str(row[1])) if row else (-1, GENESIS)

    def verify(self, *, head: tuple[int, str] | None = None) -> StoreCheck:
        """Walk the chain and check every hash, the order, the triggers and the file itself.

        Args:
            head: a witness (number and hash) noted earlier; without it a cut-off end cannot be noticed.
        """
        problems: list[str] = []
        events: tuple[Event, ...] = ()
        try:
            with self._connected() as connection:
                damage = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)") if row[0] != "ok"]
                names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
                problems += [f"{self.path.name}: damaged ({text})" for text in damage]
                problems += [f"{self.path.name}: the guard {n} was removed" for n in _TRIGGERS if n not in names]
                events = tuple(_select(connection, "", ()))
        except InputError as error:
            problems.append(str(error))
        problems += problems_of_chain(events)
        if head is not None and head[0] >= 0:
            hashes = {event.sequence: event.hash for event in events}
            if hashes.get(head[0]) != head[1]:
                problems.append(f"event {head[0]}: was witnessed, and is missing or another now")
        return StoreCheck(not problems, tuple(problems), len(events), events[-1].hash if events else GENESIS)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _append(self, submission: str, prepare: Callable[[sqlite3.Connection], Event]) -> tuple[Event, bool]:
        """Append what `prepare` makes inside the transaction; or the event that the key made before, and false."""
        with self._connected() as connection, _writing(connection):
            known = _select(connection, "submission = ?", (submission,))
            if known:
                return known[0], False
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            event = _after(connection, replace(prepare(connection), time=now))
            _insert(connection, event)
        return event, True

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=self._busy_s, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: expected a store of reviews, could not use it ({error})") from error

    def _begin(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # one view of both, while another process may be beginning the same store
        found = int(connection.execute("PRAGMA application_id").fetchone()[0])
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        connection.execute("COMMIT")
        if found == _APPLICATION_ID:
            return
        if found or tables:
            raise InputError(f"{self.path}: expected a store of reviews, found another database; choose another file")
        # Changing the journal's mode does not wait for others as writing does.
        patience = time.monotonic() + self._busy_s
        while True:
            try:
                mode = str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
                break
            except sqlite3.OperationalError:
                if time.monotonic() > patience:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise InputError(f"{self.path}: expected a local disk for SQLite's log, found one without; move the file")
        with _writing(connection):
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")


def _draft(kind: str, reviewer: str, run: str, case: str, submission: str, detail: Mapping[str, Any]) -> Event:
    """An event that has no place in a chain yet."""
    return Event(
        sequence=0,
        event_id=str(uuid.uuid4()),
        submission=submission,
        kind=kind,
        time="",
        reviewer=reviewer,
        run=run,
        case=case,
        detail=detail,
        version=__version__,
    )


@contextmanager
def _writing(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction that holds the write lock from its first statement on."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _select(connection: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[Event]:
    rows = connection.execute(f"{_SELECT}{f' WHERE {where}' if where else ''} ORDER BY sequence", values).fetchall()
    return [_event_of(dict(zip(COLUMNS, row, strict=True))) for row in rows]


def _event_of(row: dict[str, Any]) -> Event:
    try:
        return Event(**{**row, "tags": tuple(json.loads(row["tags"])), "detail": json.loads(row["detail"])})
    except (TypeError, ValueError) as error:
        raise InputError(f"event {row['sequence']}: was changed after it was written ({error})") from error


def _after(connection: sqlite3.Connection, event: Event) -> Event:
    """The event as it follows the newest one."""
    last = connection.execute("SELECT sequence, hash FROM events ORDER BY sequence DESC LIMIT 1").fetchone()
    number, previous = (int(last[0]) + 1, str(last[1])) if last else (0, GENESIS)
    return replace(event, sequence=number, previous=previous).sealed()


def _insert(connection: sqlite3.Connection, event: Event) -> None:
    row = {name: getattr(event, name) for name in COLUMNS}
    row |= {"tags": canonical(list(event.tags)), "detail": canonical(event.detail)}
    connection.execute(_INSERT, tuple(row.values()))


def _says_the_same(one: Event, other: Event) -> bool:
    """Whether a submission that arrives again is the same; the clock may have run on."""
    told = ("kind", "arm", "mask_sha256", "image_sha256", "verdict", "ratings", "comment", "tags")
    return one.subject == other.subject and all(getattr(one, name) == getattr(other, name) for name in told)
