"""A hospital's side, without the engine: opens the hospital, answers each query once, says what it has cost."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from fediod_med.devices import pick_device
from fediod_med.errors import FediodError, ProtocolError, SettingsError
from fediod_med.federation.flare.names import RUN_ID
from fediod_med.federation.flare.plan import HospitalPlan
from fediod_med.federation.flare.replies import Envelope, ReplyStore, only_process
from fediod_med.federation.node import SiteNode
from fediod_med.hospitals import Hospital, open_hospital, open_node, privacy_record
from fediod_med.privacy.records import Head
from fediod_med.protocol import Query, unpack
from fediod_med.site_gate import open_gate
from fediod_med.sites import load_site

logger = logging.getLogger(__name__)

_ANSWER, _PULL_BACK = "answer", "pull_back"


class Desk:
    """Answers for one hospital; everything it needs is in the hospital's own files.

    Args:
        plan: see `plan.hospital_plan`.
        name: of the site in the engine's certificates; must be that of the site file.
    """

    def __init__(self, plan: HospitalPlan, *, name: str) -> None:
        self._plan = plan
        self._name = name
        self._hospital: Hospital | None = None
        self._node: SiteNode | None = None
        self._node_of: tuple[str, bool] | None = None  # run, with a discriminator
        self._epsilon: tuple[Head | None, float | None] | None = None

    def answer(self, data: bytes, *, seen: Head | None = None) -> Envelope:
        """Answer one packed query, or repeat the answer that it has had.

        Args:
            data: a packed `protocol.Query`.
            seen: newest state of this hospital's ledger that the centre knows.

        Raises:
            FediodError: whatever the hospital refuses; nothing leaves then but the error's name.
        """
        query = unpack(data)
        if not isinstance(query, Query):
            raise ProtocolError("expected a query, found a reply")
        if not RUN_ID.fullmatch(query.run_id):
            raise ProtocolError(f"run id: expected letters, digits and dashes, found {query.run_id!r}")
        folder, digest = self._folder(query.run_id), hashlib.sha256(data).hexdigest()
        with only_process(folder):
            store = ReplyStore(folder)
            known = store.find(query.round, query.kind, digest)
            if known is not None:
                return known
            node = self._node_for(query)
            if seen is not None:
                node.witness(seen)
            if query.kind == _PULL_BACK and not node.holds(query):
                self._recall(node, store, query)
            envelope = self._sealed(node, query)
            if query.kind == _ANSWER and query.settings.get("differentiate", False):
                store.keep_query(query.round, query.kind, data)
            store.keep(query.round, query.kind, digest, envelope)
        return envelope

    def account(self) -> dict[str, Any]:
        """What the hospital's patients have been charged, and the promise in words (`hospitals.privacy_record`)."""
        return privacy_record(self._opened())

    def _folder(self, run_id: str) -> Path:
        return self._plan.state / run_id

    def _opened(self) -> Hospital:
        if self._hospital is None:
            site = load_site(self._plan.site, data_root=self._plan.data_root)
            if site.site_name != self._name:
                raise SettingsError(
                    f"{self._plan.site}: expected site_name {self._name!r}, as in this kit's certificate, found "
                    f"{site.site_name!r}"
                )
            self._hospital = open_hospital(
                site,
                open_gate(site),
                out=self._plan.state,
                seed=self._plan.seed,
                device=self._plan.device,
                teachers=self._plan.teachers,
                sampler=None,
                on_epoch=lambda _done, _total, _loss: None,
                on_step=lambda _done, _total: None,
            )
        return self._hospital

    def _node_for(self, query: Query) -> SiteNode:
        """The node of this run; its discriminator is begun, and paid for, when the first query asks for it."""
        hospital = self._opened()
        spacing = query.settings.get("spacing", hospital.site.spacing)
        if spacing != hospital.site.spacing:
            raise SettingsError(f"this run works at {spacing} mm, and this site at {hospital.site.spacing} mm")
        before = self._node_of
        adversarial = bool(query.settings.get("adversarial", False))
        if before is not None and before[0] == query.run_id:
            adversarial = adversarial or before[1]
        if self._node is None or before != (query.run_id, adversarial):
            self._node = self._node_of = None
            self._node = open_node(
                hospital,
                out=self._folder(query.run_id),
                seed=self._plan.seed,
                run_id=query.run_id,
                device=pick_device(self._plan.device),
                adversarial=adversarial,
                joins_late=True,
            )
            self._node_of = (query.run_id, adversarial)
        return self._node

    def _recall(self, node: SiteNode, store: ReplyStore, query: Query) -> None:
        """A process that was restarted between the two trips of a round rebuilds the graph that it lost."""
        data = store.query(query.round, _ANSWER)
        answered = None if data is None else unpack(data)
        if isinstance(answered, Query):
            node.recall(answered)

    def _sealed(self, node: SiteNode, query: Query) -> Envelope:
        sealed = node.handle(query)
        head = sealed.head
        if self._epsilon is None or self._epsilon[0] != head:
            self._epsilon = (head, self._opened().gate.spent_epsilon())
        return Envelope(
            payload=sealed.payload,
            mode=sealed.mode,
            sequence=None if head is None else head.sequence,
            hash=None if head is None else head.hash,
            epsilon=self._epsilon[1],
        )


def refusal(error: Exception) -> str:
    """The name under which an error may leave a hospital; its message stays in the hospital's log."""
    known = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, FediodError)]
    return known[0] if known else FediodError.__name__
