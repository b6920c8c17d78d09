"""Lets a hospital's request for work wait at the server until there is some, instead of coming again and again.

The engine answers a request at once, with a task or with "try again later". Asked often, it costs every process of the
run a handful of messages and a checked signature each time; asked seldom, every trip waits. A request that is held for
a while costs neither, and needs no port at the hospital.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

HOLD_S = 1.0  # below the 5 s after which the engine's client gives a request up, and short enough to end a run promptly


class WorkBell:
    """Rings for hospitals that have work; safe to use from many threads.

    Args:
        hold_s: the longest that a request is held.
    """

    def __init__(self, *, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._changed = threading.Condition()
        self._due: set[str] = set()
        self._closed = False

    def ring(self, site: str) -> None:
        """There is work for this hospital."""
        with self._changed:
            self._due.add(site)
            self._changed.notify_all()

    def taken(self, site: str) -> None:
        """This hospital has been given its work."""
        with self._changed:
            self._due.discard(site)

    def silence(self) -> None:
        """There is no work for anybody any more."""
        with self._changed:
            self._due.clear()

    def close(self) -> None:
        """Hold nobody from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, site: str) -> bool:
        """Return when there is work for this hospital, or no more to wait for; whether there is work."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or site in self._due, timeout=self._hold_s)
            return site in self._due


def hold_requests(answer: Callable[..., tuple[str, Any, Any]], bell: WorkBell) -> Callable[..., tuple[str, Any, Any]]:
    """The engine's answer to a request for work, given no sooner than there is some or the bell's patience is over.

    Args:
        answer: takes the engine's client, whose `name` is the hospital's, and its context; gives the name of a task or
            of a special reply, and two values more.
        bell: see `WorkBell`.
    """

    def held(client: Any, fl_ctx: Any) -> tuple[str, Any, Any]:
        due = bell.wait(str(client.name))
        found = answer(client, fl_ctx)
        if due:
            bell.taken(str(client.name))  # a task whose reply is lost is given again when the hospital comes back
        return found

    return held
