"""A hospital's side of the federation: the only place where a `Reply` is made, and the gate the only way out of it.

The node holds the frozen teacher and the hospital's own discriminator. It answers queries about synthetic volumes;
scans, weights and optimiser state stay here, and what leaves is sealed by the site's privacy gate.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fediod_med.devices import autocast_over
from fediod_med.encodings import FP16, check_encoding
from fediod_med.ensemble import mirrored_logits
from fediod_med.errors import ProtocolError
from fediod_med.federation.critic import Critic
from fediod_med.privacy.gate import Gate, Sealed
from fediod_med.privacy.mechanisms import presence_rows
from fediod_med.privacy.records import Head
from fediod_med.protocol import Query, Reply, pack

PROBABILITY_FLOOR = 1e-6  # what noise made negative becomes this before the classes are renormalised


@dataclass
class _Pending:
    """The teacher's graph between the two trips of a round."""

    run_id: str
    round: int
    x: Tensor
    logits: Tensor


class SiteNode:
    """Answers the centre's queries for one hospital.

    In mode `dp-sgd` the networks are private, and every answer is post-processing that costs nothing; in mode
    `gradient` each reply is one vector, clipped, noised and charged; in mode `none` replies leave as they are. Class
    counts are one noisy release in both private modes.

    Args:
        name: hospital.
        teacher: frozen segmenter, `(B, 4, D, H, W)` to logits `(B, 4, D, H, W)`, or classifier, to logits `(B, C)`.
        presence: `(patients, C)`, 1 where a training patient shows a class.
        critic: the hospital's discriminator; without one, adversarial queries are refused.
        gate: the hospital's privacy gate.
        permits: ledger entries that paid for the teacher; empty unless the mode is `dp-sgd`.
        device: where to compute.
        sequences: channels of what the centre may ask about.
        spatial_dims: its axes, 3 for volumes, 2 for images.
    """

    def __init__(
        self,
        name: str,
        teacher: nn.Module,
        presence: Tensor,
        *,
        critic: Critic | None,
        gate: Gate,
        permits: tuple[str, ...] = (),
        device: torch.device,
        sequences: int = 4,
        spatial_dims: int = 3,
    ) -> None:
        self._sequences, self._spatial_dims = sequences, spatial_dims
        self.name = name
        self._teacher = teacher.to(device).eval().requires_grad_(False)
        self._presence = presence
        self._critic = critic
        self._gate = gate
        self._permits = permits
        self._device = device
        self._pending: _Pending | None = None

    def handle(self, query: Query) -> Sealed:
        """Answer one query with the bytes of a `Reply`, sealed by the gate.

        Raises:
            ProtocolError: unknown kind, wrong shape, no discriminator, or a pull-back without its answer.
            PrivacyError: the gate refuses; nothing was computed if the budget is the reason.
        """
        if query.kind == "describe":
            return self._describe()
        if self._gate.mode == "gradient":
            return self._release(query)
        kinds, permits = {"teacher"}, [*self._permits]
        if query.kind == "answer" and query.settings.get("adversarial", False) and self._critic is not None:
            kinds.add("discriminator")
            permits += self._critic.permits
        return self._gate.pass_through(
            lambda: pack(self._reply(query), encoding=_encoding(query)),
            permits=permits,
            kinds=frozenset(kinds),
            floor_mode=self._gate.mode,
        )

    def witness(self, head: Head) -> None:
        """Refuse to go on when the centre has seen a later state of this site's ledger than the site has."""
        self._gate.witness(head)

    def recall(self, answered: Query) -> None:
        """Rebuild the teacher's graph of an `answer` whose reply has left already; only its pull-back can follow.

        Raises:
            ProtocolError: wrong shape.
        """
        self._ask_teacher(self._volumes(answered), answered)

    def _reply(self, query: Query) -> Reply:
        if query.kind == "answer":
            return self._answer(query)
        if query.kind == "pull_back":
            return self._pull_back(query)
        raise ProtocolError(f"{self.name}: unknown query {query.kind!r}")

    def _describe(self) -> Sealed:
        """Patients that show each class, `(4,)`: one release, with noise in the private modes, clamped at 0."""
        scale = math.sqrt(self._presence.shape[1])

        def seal(values: np.ndarray) -> bytes:
            counts = torch.from_numpy(np.clip(values * scale, 0, None)).float()
            return pack(Reply("describe", self.name, 0, {"class_counts": counts}))

        # The counts do not depend on the run: one release serves every run there will be.
        return self._gate.release(
            "counts",
            query_id="counts",
            query_digest=hashlib.sha256(b"patients by class").hexdigest(),
            compute=lambda: presence_rows(self._presence.numpy()),
            seal=seal,
        )

    def _release(self, query: Query) -> Sealed:
        """Mode `gradient`: every tensor of a reply in one vector, clipped together, noised and charged."""
        shapes: dict[str, torch.Size] = {}

        def compute() -> np.ndarray:
            reply = self._reply(query)
            shapes.update({name: tensor.shape for name, tensor in reply.tensors.items()})
            return torch.cat([tensor.detach().double().flatten().cpu() for tensor in reply.tensors.values()]).numpy()

        def seal(values: np.ndarray) -> bytes:
            parts = torch.from_numpy(values).split([shape.numel() for shape in shapes.values()])
            tensors = {
                name: part.reshape(shape).float() for (name, shape), part in zip(shapes.items(), parts, strict=True)
            }
            if "probs" in tensors:
                positive = tensors["probs"].clamp_min(PROBABILITY_FLOOR)
                tensors["probs"] = positive / positive.sum(dim=1, keepdim=True)
            return pack(Reply(query.kind, self.name, query.round, tensors), encoding=_encoding(query))

        sealed = self._gate.release(
            query.kind,
            query_id=f"{query.run_id}/{query.round}/{query.kind}",
            query_digest=hashlib.sha256(pack(query)).hexdigest(),
            compute=compute,
            seal=seal,
        )
        if query.kind == "answer" and not self.holds(query):  # replayed from the ledger: its pull-back may still come
            self._ask_teacher(self._volumes(query), query)
        return sealed

    def _answer(self, query: Query) -> Reply:
        """Class probabilities of the teacher; with `adversarial`, realism and the gradient of the discriminator."""
        x = self._volumes(query)
        tensors: dict[str, Tensor] = {}
        if query.settings.get("adversarial", False):
            if self._critic is None:
                raise ProtocolError(f"{self.name}: asked for its discriminator, but has none")
            tensors |= self._critic.judge(x, query)
        tensors["probs"] = torch.softmax(self._ask_teacher(x, query), dim=1)
        return Reply("answer", self.name, query.round, tensors)

    def _volumes(self, query: Query) -> Tensor:
        x = query.tensors["x"].to(self._device)
        if x.dim() != 2 + self._spatial_dims or x.shape[1] != self._sequences:
            axes = ", ".join("DHW"[-self._spatial_dims :])
            raise ProtocolError(
                f"{self.name}: expected x of shape (B, {self._sequences}, {axes}), found {tuple(x.shape)}"
            )
        return x

    def _ask_teacher(self, x: Tensor, query: Query) -> Tensor:
        """Logits `(B, C, ...)` without a graph; the graph is held for the pull-back where one will come."""
        differentiate = bool(query.settings.get("differentiate", False))
        with torch.set_grad_enabled(differentiate), autocast_over(x.device, x.shape[2:]):
            leaf = x.detach().requires_grad_(differentiate)
            mirrored = bool(query.settings.get("mirrored", False))
            logits: Tensor = mirrored_logits(self._teacher, leaf) if mirrored else self._teacher(leaf).float()
        if differentiate:
            self._pending = _Pending(query.run_id, query.round, leaf, logits)
        return logits.detach()

    def holds(self, query: Query) -> bool:
        """Whether the teacher's graph of this query's round is at hand, so that its pull-back can be answered."""
        held = self._pending
        return held is not None and (held.run_id, held.round) == (query.run_id, query.round)

    def _pull_back(self, query: Query) -> Reply:
        """`J^T g`: the centre's gradient with respect to this teacher's logits, carried back to the volume."""
        pending, held = self._pending, self.holds(query)
        self._pending = None
        if pending is None or not held:
            raise ProtocolError(f"{self.name}: pull_back of round {query.round} without its answer; ask again")
        gradient = query.tensors["logit_gradient"].to(self._device)
        if gradient.shape != pending.logits.shape:
            raise ProtocolError(
                f"{self.name}: expected logit_gradient of shape {tuple(pending.logits.shape)}, "
                f"found {tuple(gradient.shape)}"
            )
        (x_gradient,) = torch.autograd.grad(pending.logits, pending.x, grad_outputs=gradient)
        return Reply("pull_back", self.name, query.round, {"x_gradient": x_gradient})


def _encoding(query: Query) -> str:
    """How the centre wants the reply written; a function of what is released anyway, so it costs no privacy."""
    return check_encoding(query.settings.get("encoding", FP16))
