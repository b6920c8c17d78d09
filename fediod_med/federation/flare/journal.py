"""The centre's memory of a run between checkpoints: what was asked, word for word, and what came back.

A centre that dies resumes from its checkpoint and walks the same rounds again. Every trip that had ended is answered
from here, and the one that had not is asked again with the same bytes, so that no hospital meets a second query of the
same round: not even where the centre's own arithmetic would not repeat itself to the last bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fediod_med.durable import write_atomically
from fediod_med.errors import ProtocolError

_ASKED, _ENDED = "asked.json", "ended.json"


class Journal:
    """Trips of one run, by round and kind of query.

    Args:
        folder: of the centre, for this run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def asked(self, number: int, kind: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        """Write down what is about to be asked, by site; returns what was written first, if the trip is a repetition.

        Raises:
            ProtocolError: the trip was begun with other hospitals.
        """
        trip = self._trip(number, kind)
        if not (trip / _ASKED).is_file():
            digests = {site: hashlib.sha256(message).hexdigest() for site, message in messages.items()}
            for site, digest in digests.items():
                path = trip / f"{digest}.query"
                if not path.is_file():
                    _write(path, messages[site])
            _write(trip / _ASKED, json.dumps(digests).encode())
        digests = json.loads((trip / _ASKED).read_text(encoding="utf-8"))
        if set(digests) != set(messages):
            raise ProtocolError(
                f"{trip}: this round was begun with {', '.join(digests)}, found {', '.join(messages)}; resume with the "
                f"settings of the run"
            )
        return {site: (trip / f"{digests[site]}.query").read_bytes() for site in messages}

    def ended(self, number: int, kind: str) -> dict[str, bytes | str] | None:
        """What came back by site, a packed reply or the reason of a failure; None while the trip has not ended."""
        trip = self._trip(number, kind)
        if not (trip / _ENDED).is_file():
            return None
        reasons = json.loads((trip / _ENDED).read_text(encoding="utf-8"))
        return {
            site: (trip / f"{site}.reply").read_bytes() if reason is None else str(reason)
            for site, reason in reasons.items()
        }

    def end(self, number: int, kind: str, outcome: Mapping[str, bytes | str]) -> None:
        """Write down how a trip ended, whole or not at all."""
        trip = self._trip(number, kind)
        for site, found in outcome.items():
            if isinstance(found, bytes):
                _write(trip / f"{site}.reply", found)
        reasons = {site: None if isinstance(found, bytes) else found for site, found in outcome.items()}
        _write(trip / _ENDED, json.dumps(reasons).encode())

    def forget(self, through: int) -> None:
        """Drop the trips of all rounds up to `through`, which a checkpoint covers."""
        for trip in self._folder.glob("*-*"):
            if int(trip.name.partition("-")[0]) <= through:
                for path in trip.iterdir():
                    path.unlink()
                trip.rmdir()

    def _trip(self, number: int, kind: str) -> Path:
        return self._folder / f"{number:06d}-{kind}"


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
