"""A hospital's side of the federation: the only place where a `Reply` is made.

The node holds the frozen teacher, the hospital's own discriminator and its scans. It answers queries about synthetic
volumes; scans, weights and optimiser state stay here. Privacy mode `none` only: nothing is clipped or noised yet, and
every run through this node is stamped NOT PRIVATE.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose, RandFlip, RandSpatialCrop, SpatialPad
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.devices import autocast
from fediod_med.errors import ProtocolError
from fediod_med.losses import discriminator_adversarial, generator_adversarial
from fediod_med.networks import PatchDiscriminator
from fediod_med.protocol import Query, Reply

logger = logging.getLogger(__name__)

KEEP_SNAPSHOTS = 2  # the centre may die between a site's snapshot and its own: the one before is still needed


@dataclass
class _Pending:
    """The teacher's graph between the two trips of a round."""

    run_id: str
    round: int
    x: Tensor
    logits: Tensor


class SiteNode:
    """Answers the centre's queries for one hospital.

    Args:
        name: hospital.
        teacher: frozen segmenter, `(B, 4, D, H, W)` to logits `(B, 4, D, H, W)`.
        class_counts: `(4,)` patients that show each class.
        real_volumes: preprocessed training scans `(4, D, H, W)` of any size, for the discriminator's real half.
        state_dir: the hospital's own folder for snapshots of its discriminator.
        seed: of initialisation and of the order of real patches.
        device: where to compute.
        batch: real patches per discriminator step.
        width: channels of the discriminator's first layer.
        layers: its strided layers.
        norm: `INSTANCE` or `GROUP`.
        criterion: `hinge`, `bce` or `least_squares`.
        learning_rate: of the discriminator's Adam (betas .5, .999 as in the published code).
    """

    def __init__(
        self,
        name: str,
        teacher: nn.Module,
        class_counts: Tensor,
        *,
        real_volumes: Sequence[Tensor],
        state_dir: Path,
        seed: int,
        device: torch.device,
        batch: int = 2,
        width: int = 16,
        layers: int = 2,
        norm: str = "INSTANCE",
        criterion: str = "hinge",
        learning_rate: float = 2e-4,
    ) -> None:
        self.name = name
        self._teacher = teacher.to(device).eval().requires_grad_(False)
        self._class_counts = class_counts
        self._real_volumes = tuple(real_volumes)
        self._state_dir = state_dir
        self._seed = _site_seed(seed, name)
        self._device = device
        self._batch = batch
        self._criterion = criterion
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._discriminator = PatchDiscriminator(width=width, layers=layers, norm=norm).to(device)
        self._optimizer = torch.optim.Adam(self._discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.999))
        self._run_id: str | None = None
        self._round = 0
        self._fresh: dict[str, Any] = {
            "discriminator": _copy(self._discriminator.state_dict()),
            "optimizer": self._optimizer.state_dict(),
        }
        self._pending: _Pending | None = None

    def handle(self, query: Query) -> Reply:
        """Answer one query.

        Raises:
            ProtocolError: unknown kind, wrong shape, no scans for a discriminator, or a round before which this site
                has neither its state nor a snapshot.
        """
        if query.kind == "describe":
            return Reply("describe", self.name, query.round, {"class_counts": self._class_counts.float()})
        if query.kind == "answer":
            return self._answer(query)
        if query.kind == "pull_back":
            return self._pull_back(query)
        raise ProtocolError(f"{self.name}: unknown query {query.kind!r}")

    def _answer(self, query: Query) -> Reply:
        """Class probabilities of the teacher; with `adversarial`, one discriminator step, realism and its gradient."""
        x = query.tensors["x"].to(self._device)
        if x.dim() != 5 or x.shape[1] != 4:
            raise ProtocolError(f"{self.name}: expected x of shape (B, 4, D, H, W), found {tuple(x.shape)}")
        differentiate = bool(query.settings.get("differentiate", False))
        tensors: dict[str, Tensor] = {}
        if query.settings.get("adversarial", False):
            if not self._real_volumes:
                raise ProtocolError(f"{self.name}: asked for its discriminator, but has no scans to train it on")
            self._enter_round(query)
            self._discriminator_step(x, query)
            tensors |= self._judge(x)
            self._run_id, self._round = query.run_id, query.round
            if query.settings.get("snapshot", False):
                self._write_snapshot(query.run_id)
        with torch.set_grad_enabled(differentiate), autocast(self._device):
            leaf = x.detach().requires_grad_(differentiate)
            logits = self._teacher(leaf).float()
        if differentiate:
            self._pending = _Pending(query.run_id, query.round, leaf, logits)
        tensors["probs"] = torch.softmax(logits.detach(), dim=1)
        return Reply("answer", self.name, query.round, tensors)

    def _pull_back(self, query: Query) -> Reply:
        """`J^T g`: the centre's gradient with respect to this teacher's logits, carried back to the volume."""
        pending, self._pending = self._pending, None
        if pending is None or (pending.run_id, pending.round) != (query.run_id, query.round):
            raise ProtocolError(f"{self.name}: pull_back of round {query.round} without its answer; ask again")
        gradient = query.tensors["logit_gradient"].to(self._device)
        if gradient.shape != pending.logits.shape:
            raise ProtocolError(
                f"{self.name}: expected logit_gradient of shape {tuple(pending.logits.shape)}, "
                f"found {tuple(gradient.shape)}"
            )
        (x_gradient,) = torch.autograd.grad(pending.logits, pending.x, grad_outputs=gradient)
        return Reply("pull_back", self.name, query.round, {"x_gradient": x_gradient})

    def _discriminator_step(self, fake: Tensor, query: Query) -> None:
        real = self._real_batch(fake.shape[2:], query.round)
        self._discriminator.requires_grad_(True)
        with autocast(self._device):
            fake_logits = self._discriminator(fake.detach()).float()
            real_logits = self._discriminator(real).float()
        loss = discriminator_adversarial(fake_logits, real_logits, self._criterion)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._discriminator.requires_grad_(False)

    def _judge(self, x: Tensor) -> dict[str, Tensor]:
        """Realism `(B,)` (mean patch logit) and the gradient of the adversarial loss with respect to x."""
        leaf = x.detach().clone().requires_grad_(True)
        with autocast(self._device):
            logits = self._discriminator(leaf).float()
        loss = generator_adversarial(logits, self._criterion)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return {"realism": logits.detach().flatten(1).mean(dim=1), "x_gradient": gradient}

    def _real_batch(self, size: Sequence[int], number: int) -> Tensor:
        """Random, randomly flipped patches `(batch, 4, *size)` of the hospital's scans; fixed by the round."""
        draw = Compose(
            [
                SpatialPad(size),
                RandSpatialCrop(size, random_size=False),
                *[RandFlip(prob=0.5, spatial_axis=axis) for axis in range(3)],
            ]
        )
        draw.set_random_state(seed=(self._seed * 1_000_003 + number) % 2**32)
        generator = torch.Generator().manual_seed((self._seed * 7_368_787 + number) % 2**63)
        chosen = torch.randint(len(self._real_volumes), (self._batch,), generator=generator).tolist()
        patches = [convert_to_tensor(draw(self._real_volumes[i]), track_meta=False) for i in chosen]
        return torch.stack(patches).to(self._device).float()

    def _enter_round(self, query: Query) -> None:
        """Continue from the last round, or rewind to the snapshot that a resumed centre continues from.

        A site that missed rounds of this run continues with what it has: its discriminator is only older.
        """
        before = query.round - 1
        if query.run_id == self._run_id and before >= self._round:
            if before > self._round:
                logger.warning("%s: missed rounds %d to %d", self.name, self._round + 1, before)
            return
        if before == 0:
            state = {**self._fresh, "round": 0}
        else:
            path = self._snapshot(query.run_id, before)
            if not path.is_file():
                raise ProtocolError(
                    f"{self.name}: asked for round {query.round} after round {self._round}, and no snapshot of round "
                    f"{before} is kept; start the run again"
                )
            state = load_state(path)
        self._discriminator.load_state_dict(state["discriminator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._run_id, self._round = query.run_id, before

    def _write_snapshot(self, run_id: str) -> None:
        state = {
            "discriminator": self._discriminator.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "round": self._round,
        }
        save_state(self._snapshot(run_id, self._round), state)
        kept = sorted(self._state_dir.glob(f"{run_id}-round-*.pt"))
        current = kept.index(self._snapshot(run_id, self._round))
        # Later ones stem from a continuation that the centre has abandoned.
        for path in [*kept[: max(0, current + 1 - KEEP_SNAPSHOTS)], *kept[current + 1 :]]:
            path.unlink()

    def _snapshot(self, run_id: str, number: int) -> Path:
        if not run_id.replace("-", "").isalnum():
            raise ProtocolError(f"{self.name}: expected a run id of letters, digits and dashes, found {run_id!r}")
        return self._state_dir / f"{run_id}-round-{number:06d}.pt"


def _site_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
