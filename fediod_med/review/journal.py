"""The events of a store held in memory, so that a page reads only what is new since it last asked."""

from __future__ import annotations

import threading

from fediod_med.review.events import GENESIS, Event, current_of
from fediod_med.review.store import ReviewStore


class Journal:
    """A store's events, read on from where the last call ended; safe for several threads.

    Other processes may append meanwhile: every call compares the head. A store that no longer goes on from what is held
    (another file in its place) is read anew.
    """

    def __init__(self, store: ReviewStore) -> None:
        """Hold the events of `store`, none at first."""
        self.store = store
        self._events: list[Event] = []
        self._by_run: dict[str, list[Event]] = {}
        self._current: dict[str, tuple[int, tuple[Event, ...]]] = {}
        self._lock = threading.Lock()

    def events(self, run: str | None = None) -> tuple[Event, ...]:
        """All events, or those of a run, in the order they were written.

        Raises:
            InputError: the store cannot be read.
        """
        with self._lock:
            self._read_on()
            return tuple(self._events if run is None else self._by_run.get(run, ()))

    def current(self, run: str) -> tuple[Event, ...]:
        """The reviews of a run that hold now; see `events.current_of`."""
        events = self.events(run)
        with self._lock:
            held = self._current.get(run)
            if held is None or held[0] != len(events):
                held = len(events), current_of(events)
                self._current[run] = held
            return held[1]

    def _read_on(self) -> None:
        number, digest = (self._events[-1].sequence, self._events[-1].hash) if self._events else (-1, GENESIS)
        head = self.store.head
        if head == (number, digest):
            return
        new = self.store.events(after=number) if head[0] > number else ()
        if not new or new[0].previous != digest:
            self._events.clear()
            self._by_run.clear()
            self._current.clear()
            new = self.store.events()
        for event in new:
            self._events.append(event)
            self._by_run.setdefault(event.run, []).append(event)
