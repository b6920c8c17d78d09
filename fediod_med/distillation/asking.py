"""Questions to the hospitals, and their good replies as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fediod_med.encodings import FP16
from fediod_med.errors import ProtocolError, SettingsError
from fediod_med.parallel import Workers
from fediod_med.protocol import Federation, Query, Reply, Setting, SiteFailure


class Hospitals:
    """Asks the federation and keeps only good replies; a shortfall of the quorum is an error.

    Of several processes the first asks; all get the replies.
    """

    def __init__(
        self,
        federation: Federation | None,
        sites: Sequence[str],
        workers: Workers,
        *,
        run_id: str,
        quorum: int,
        timeout_s: float,
        encoding: str = FP16,
    ) -> None:
        self._federation = federation
        self._sites = sites
        self._workers = workers
        self._encoding = encoding
        self._run_id = run_id
        self._quorum = quorum
        self._timeout_s = timeout_s

    def ask(
        self, kind: str, number: int, tensors: Mapping[str, Tensor], **settings: Setting
    ) -> dict[str, Mapping[str, Tensor]]:
        """The same query to every hospital."""
        query = Query(kind, self._run_id, number, tensors, {"encoding": self._encoding, **settings})
        return self.ask_each(dict.fromkeys(self._sites, query))

    def pull_back(self, number: int, gradients: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """Each hospital's own logit gradient, back to x."""
        return self.ask_each(
            {
                site: Query(
                    "pull_back", self._run_id, number, {"logit_gradient": gradient}, {"encoding": self._encoding}
                )
                for site, gradient in gradients.items()
            }
        )

    def ask_each(self, queries: Mapping[str, Query]) -> dict[str, Mapping[str, Tensor]]:
        """A query of its own to each hospital; tensors of the good replies by hospital.

        Raises:
            ProtocolError: fewer good replies than the quorum.
        """
        return self._workers.led(partial(self._good_replies, queries))

    def _good_replies(self, queries: Mapping[str, Query]) -> dict[str, Mapping[str, Tensor]]:
        assert self._federation is not None  # checked at the start of `distill`
        outcome = self._federation.ask(queries, quorum=self._quorum, timeout_s=self._timeout_s)
        good = {
            site: reply.tensors
            for site, query in queries.items()
            if isinstance(reply := outcome.get(site), Reply)
            and (reply.kind, reply.site, reply.round) == (query.kind, site, query.round)
        }
        if len(good) < min(self._quorum, len(queries)):
            reasons = {f.site: f.reason for f in outcome.values() if isinstance(f, SiteFailure)}
            failures = [f"{site} ({reasons.get(site, 'no fitting reply')})" for site in queries if site not in good]
            kind = next(iter(queries.values())).kind
            raise ProtocolError(
                f"{kind}: expected replies from {self._quorum} hospitals, found {len(good)}; failed: "
                f"{', '.join(failures)}; see their logs and resume"
            )
        return good


def site_names(federation: Federation | None) -> list[str]:
    """Names of the hospitals, for the first process; `SettingsError` where it has none."""
    if federation is None:
        raise SettingsError("distillation: expected the hospitals at the first process, found none")
    return list(federation.site_names)


def stack_answers(
    answers: Mapping[str, Mapping[str, Tensor]], sites: Sequence[str], counts: Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Probabilities `(K, B, C, D, H, W)` renormalised after fp16, realism `(K, B)` if any, counts `(K, C)`."""
    present = [site for site in sites if site in answers]
    probs = torch.stack([answers[site]["probs"] for site in present]).to(device)
    probs = probs / probs.sum(dim=2, keepdim=True)
    with_realism = all("realism" in answers[site] for site in present)
    realism = torch.stack([answers[site]["realism"] for site in present]).to(device) if with_realism else None
    return probs, realism, counts[[sites.index(site) for site in present]].to(device)
