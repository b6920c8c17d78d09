"""`protocol.Federation` over an engine: who is asked, who counts as absent, what is remembered of each hospital."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fediod_med.errors import FediodError, ProtocolError
from fediod_med.federation.embedded import check_forward
from fediod_med.federation.flare.egress import REASONS, check_account, check_envelope
from fediod_med.federation.flare.journal import Journal
from fediod_med.federation.flare.names import ACCOUNT_TASK, QUERY_TASK
from fediod_med.privacy.records import Head
from fediod_med.protocol import Query, Reply, SiteFailure, pack, unpack
from fediod_med.records import write_json

logger = logging.getLogger(__name__)

ABSENT_AFTER = 2  # trips missed in a row
_MEMORY = "hospitals.json"


class Courier(Protocol):
    """What carries contents to hospitals and brings back what each of them let out."""

    def carry(
        self, task: str, contents: Mapping[str, Mapping[str, Any]], *, quorum: int, timeout_s: float, grace_s: float
    ) -> dict[str, Mapping[str, Any] | str]:
        """Contents by site; a content or the reason of its absence by site.

        Args:
            task: one of `names.TASKS`.
            contents: by site.
            quorum: good contents after which the rest are waited for during `grace_s` only.
            timeout_s: for all.
            grace_s: see `quorum`.
        """

    def heard(self) -> frozenset[str]:
        """Sites that gave a sign of life since the last call: they look for work, or answered too late."""


class RemoteFederation:
    """Hospitals behind a courier; exact replies are journalled, so that a resumed centre asks nothing twice.

    Args:
        site_names: all hospitals of the run, in order.
        courier: see `Courier`.
        folder: of the run at the centre.
        grace_s: seconds to wait for the others once the quorum has answered.
        settings: plain values that go with every query, such as the working grid.
    """

    def __init__(
        self,
        site_names: tuple[str, ...],
        courier: Courier,
        *,
        folder: Path,
        grace_s: float,
        settings: Mapping[str, float] | None = None,
    ) -> None:
        self._site_names = site_names
        self._courier = courier
        self._folder = folder
        self._grace_s = grace_s
        self._settings = dict(settings or {})
        self.journal = Journal(folder / "journal")
        self.bytes_down = dict.fromkeys(site_names, 0)
        self.bytes_up = dict.fromkeys(site_names, 0)
        self.heads: dict[str, Head] = {}
        self.spent: dict[str, dict[str, Any]] = {}
        self.misses = dict.fromkeys(site_names, 0)
        self._load()

    @property
    def site_names(self) -> tuple[str, ...]:
        """All hospitals of the run, present or not."""
        return self._site_names

    @property
    def absent(self) -> tuple[str, ...]:
        """Hospitals that are not asked any more in this segment, for they missed too many trips in a row."""
        return tuple(site for site in self._site_names if self.misses[site] >= ABSENT_AFTER)

    def ask(self, queries: Mapping[str, Query], *, quorum: int, timeout_s: float) -> dict[str, Reply | SiteFailure]:
        """See `protocol.Federation.ask`; a trip that had ended before a restart is answered from the journal."""
        first = next(iter(queries.values()))
        number, kind = first.round, first.kind
        known = self.journal.ended(number, kind)
        read: dict[str, Reply] = {}
        if known is None:
            packed = {id(query): pack(self._complete(query)) for query in queries.values()}
            messages = self.journal.asked(number, kind, {site: packed[id(query)] for site, query in queries.items()})
            known, read = self._travel(messages, queries, quorum=quorum, timeout_s=timeout_s)
            self._save()
            if sum(isinstance(found, bytes) for found in known.values()) >= min(quorum, len(queries)):
                self.journal.end(number, kind, known)  # otherwise the round ends here, and the trip is made again
        return {
            site: read[site] if site in read else self._read(site, queries[site], known.get(site, "not in the journal"))
            for site in queries
        }

    def accounts(self, *, timeout_s: float) -> dict[str, dict[str, Any]]:
        """Each hospital's privacy record; a hospital that gives none counts as not private."""
        content = {"message": b"", "sequence": None, "hash": None}
        sites = dict.fromkeys(self._site_names, content)
        found = self._courier.carry(ACCOUNT_TASK, sites, quorum=len(sites), timeout_s=timeout_s, grace_s=self._grace_s)
        records: dict[str, dict[str, Any]] = {}
        for site in self._site_names:
            answer = found.get(site, "no reply")
            try:
                if isinstance(answer, str) or set(answer) != {"account"}:
                    raise ProtocolError(f"{site}: expected its privacy record, found {answer}")
                check_account(answer["account"])
                records[site] = dict(answer["account"])
            except FediodError as error:
                logger.warning("%s", error)
                records[site] = {
                    "mode": self.spent.get(site, {}).get("mode", "none"),
                    "epsilon": self.spent.get(site, {}).get("epsilon"),
                    "delta": None,
                    "statement": "This hospital did not send its statement; ask it to verify its ledger.",
                }
        return records

    def _complete(self, query: Query) -> Query:
        """The query with the grid, and with a snapshot each round: any round may be the last of a process."""
        more: dict[str, Any] = dict(self._settings)
        if query.kind == "answer":
            more["snapshot"] = True
        return dataclasses.replace(query, settings={**query.settings, **more})

    def _travel(
        self, messages: Mapping[str, bytes], queries: Mapping[str, Query], *, quorum: int, timeout_s: float
    ) -> tuple[dict[str, bytes | str], dict[str, Reply]]:
        """What came back by site, for the journal; and what was read in the good ones, to be read once only."""
        for site in self._courier.heard():
            self.misses[site] = 0
        asked = [site for site in messages if site not in self.absent]
        if len(asked) < min(quorum, len(messages)):
            asked = list(messages)
        contents = {site: self._content(site, messages[site]) for site in asked}
        for site in asked:
            self.bytes_down[site] += len(messages[site])
        found = self._courier.carry(
            QUERY_TASK, contents, quorum=min(quorum, len(asked)), timeout_s=timeout_s, grace_s=self._grace_s
        )
        outcome: dict[str, bytes | str] = {}
        read: dict[str, Reply] = {}
        for site in messages:
            if site not in contents:
                outcome[site] = "absent"
                continue
            answer = found.get(site, "no reply")
            self.misses[site] = self.misses[site] + 1 if answer == "no reply" else 0
            if isinstance(answer, str):
                outcome[site] = answer
                continue
            if set(answer) == {"refused"}:
                outcome[site] = str(answer["refused"]) if answer["refused"] in REASONS else "refused"
                continue
            try:
                outcome[site], read[site] = self._accept(site, queries[site], answer)
            except FediodError as error:
                logger.warning("%s in round %d: %s", site, queries[site].round, error)
                outcome[site] = type(error).__name__
        return outcome, read

    def _content(self, site: str, message: bytes) -> dict[str, Any]:
        head = self.heads.get(site)
        return {
            "message": message,
            "sequence": None if head is None else head.sequence,
            "hash": None if head is None else head.hash,
        }

    def _accept(self, site: str, query: Query, answer: Mapping[str, Any]) -> tuple[bytes, Reply]:
        """The reply in what a hospital let out, packed and read, once everything about it holds."""
        check_envelope(answer, floor_mode="none")
        payload, mode = answer["payload"], answer["mode"]
        if not isinstance(payload, bytes):
            raise ProtocolError(f"{site}: expected a packed reply, found {type(payload).__name__}")
        head = None if mode == "none" else Head(answer["sequence"], answer["hash"])
        check_forward(site, self.heads.get(site), head)
        reply = self._read(site, query, payload)
        if isinstance(reply, SiteFailure):
            raise ProtocolError(f"{site}: expected a reply to this query, found another message")
        if head is not None:
            self.heads[site] = head
        self.spent[site] = {"mode": mode, "epsilon": answer["epsilon"]}
        self.bytes_up[site] += len(payload)
        return payload, reply

    def _read(self, site: str, query: Query, found: bytes | str) -> Reply | SiteFailure:
        if isinstance(found, str):
            return SiteFailure(site, query.round, found)
        reply = unpack(found)
        if not isinstance(reply, Reply) or (reply.site, reply.kind, reply.round) != (site, query.kind, query.round):
            return SiteFailure(site, query.round, "ProtocolError")
        return reply

    def _save(self) -> None:
        write_json(
            self._folder / _MEMORY,
            {
                "heads": {site: dataclasses.asdict(head) for site, head in self.heads.items()},
                "spent": self.spent,
                "down": self.bytes_down,
                "up": self.bytes_up,
            },
        )

    def _load(self) -> None:
        path = self._folder / _MEMORY
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.heads = {site: Head(**head) for site, head in kept["heads"].items()}
            self.spent, self.bytes_down, self.bytes_up = kept["spent"], kept["down"], kept["up"]
