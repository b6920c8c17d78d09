"""All hospitals inside one process, for simulation, tests and the demo.

Queries and replies are packed and unpacked exactly as an engine would send them: no autograd graph, dtype or shared
memory survives that a network would lose, so both ways fail alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fediod_med.errors import FediodError, ProtocolError
from fediod_med.federation.node import SiteNode
from fediod_med.privacy.records import Head
from fediod_med.protocol import Query, Reply, SiteFailure, pack, unpack

logger = logging.getLogger(__name__)


class EmbeddedFederation:
    """`protocol.Federation` over nodes in this process; counts the bytes that would have travelled.

    Attributes:
        bytes_down: from the centre, by site.
        bytes_up: to the centre, by site.
        heads: the newest state of each site's ledger that the centre has seen; a witness against a ledger set back.
    """

    def __init__(self, nodes: Mapping[str, SiteNode], *, heads: Mapping[str, Head] | None = None) -> None:
        """Nodes by hospital name; `heads` that the centre has seen before."""
        self._nodes = dict(nodes)
        self.bytes_down = dict.fromkeys(self._nodes, 0)
        self.bytes_up = dict.fromkeys(self._nodes, 0)
        self.heads: dict[str, Head] = dict(heads or {})

    @property
    def site_names(self) -> tuple[str, ...]:
        """Hospitals in the order given."""
        return tuple(self._nodes)

    def ask(
        self,
        queries: Mapping[str, Query],
        *,
        quorum: int,
        timeout_s: float,
    ) -> dict[str, Reply | SiteFailure]:
        """Ask each named site in turn; see `protocol.Federation.ask`.

        In one process every site is waited for and no call can be abandoned: `quorum` and `timeout_s` have no effect.
        """
        return {site: self._ask_one(site, query) for site, query in queries.items()}

    def _remember(self, site: str, head: Head | None) -> None:
        """Keep the newest head of a site's ledger; one that goes backwards is a ledger set back."""
        check_forward(site, self.heads.get(site), head)
        if head is not None:
            self.heads[site] = head

    def _ask_one(self, site: str, query: Query) -> Reply | SiteFailure:
        sent = pack(query)  # a query that cannot be sent is the centre's own error, no failure of the site
        self.bytes_down[site] += len(sent)
        try:
            received = unpack(sent)
            assert isinstance(received, Query)  # for the type checker; `unpack` keeps the type
            sealed = self._nodes[site].handle(received)
            self.bytes_up[site] += len(sealed.payload)
            self._remember(site, sealed.head)
            reply = unpack(sealed.payload)
            assert isinstance(reply, Reply)
        except FediodError as error:
            logger.warning("site %s failed in round %d: %s", site, query.round, error)
            return SiteFailure(site, query.round, type(error).__name__)
        return reply


def check_forward(site: str, before: Head | None, head: Head | None) -> None:
    """Refuse a ledger that is behind what the centre has seen of it; `ProtocolError` then."""
    if before is not None and (
        head is None or head.sequence < before.sequence or (head.sequence == before.sequence and head != before)
    ):
        raise ProtocolError(f"{site}: its ledger was at record {before.sequence} before, and is behind it now")
