"""A hospital's discriminator: how it learns between rounds, and what it says about a volume.

`PlainCritic` promises nothing and can be rewound with the centre. `PrivateCritic` learns by private steps inside a
permit that was paid in full; it never goes back, because a step taken twice would have spent twice. Designs beyond the
plain discriminator (`critic_design`) are for `PlainCritic` alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from monai.transforms import Compose, RandFlip, RandSpatialCrop, SpatialPad
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.devices import autocast_over
from fediod_med.errors import PrivacyError, ProtocolError, SettingsError
from fediod_med.federation.augmentation import draw_augmentation
from fediod_med.federation.critic_design import CriticDesign
from fediod_med.federation.critic_losses import discriminator_loss, judgement
from fediod_med.federation.critic_networks import build_discriminator
from fediod_med.losses import real_adversarial, synthetic_adversarial
from fediod_med.networks import PatchDiscriminator
from fediod_med.privacy.discriminator import DiscriminatorPlan, PrivateDiscriminator
from fediod_med.protocol import Query

logger = logging.getLogger(__name__)

KEEP_SNAPSHOTS = 2  # the centre may die between a site's snapshot and its own: the one before is still needed


class Critic(Protocol):
    """What a node needs of its discriminator."""

    def judge(self, x: Tensor, query: Query) -> dict[str, Tensor]:
        """Learn from x `(B, 4, D, H, W)` where due; then realism `(B,)` and the adversarial gradient, shaped as x."""

    @property
    def permits(self) -> tuple[str, ...]:
        """Ledger entries that paid for this discriminator; empty without privacy."""


def random_patch(size: Sequence[int], *, mirrored: bool = True) -> Compose:
    """Transform `(S, D, H, W)` or `(S, H, W)` of any size to a random patch `(S, *size)`, flipped where `mirrored`."""
    flips = [RandFlip(prob=0.5, spatial_axis=axis) for axis in range(len(size))] if mirrored else []
    return Compose([SpatialPad(size), RandSpatialCrop(size, random_size=False), *flips])


class PlainCritic:
    """A discriminator without privacy, fixed by its seed; snapshots let a resumed centre rewind it.

    Args:
        name: hospital.
        volumes: preprocessed training scans `(4, D, H, W)`, of any size.
        state_dir: the hospital's own folder for snapshots.
        seed: of initialisation and of the order of real patches.
        device: where to compute.
        batch: real patches per step.
        width: channels of the discriminator's first layer.
        layers: its strided layers.
        norm: `INSTANCE` or `GROUP`.
        criterion: `hinge`, `bce` or `least_squares`.
        learning_rate: of Adam (betas .5, .999 as in the published code).
        joins_late: whether a hospital without any state of a run may take part in it from a later round on, with a
            fresh discriminator.
        sequences: channels of a scan.
        spatial_dims: its axes, 3 for volumes, 2 for images.
        mirrored: whether a scan seen in a mirror is as real; not so for handwriting.
        design: of the discriminator; see `CriticDesign`.
        teacher: the hospital's own segmenter to logits `(B, classes, ...)`, frozen here; a joint design needs it.
        classes: of the teacher.

    Raises:
        SettingsError: a joint design without a teacher.
    """

    permits: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        volumes: Sequence[Tensor],
        *,
        state_dir: Path,
        seed: int,
        device: torch.device,
        batch: int = 2,
        width: int = 16,
        layers: int = 2,
        norm: str = "INSTANCE",
        criterion: str = "hinge",
        learning_rate: float = 2e-4,
        joins_late: bool = False,
        sequences: int = 4,
        spatial_dims: int = 3,
        mirrored: bool = True,
        design: CriticDesign | None = None,
        teacher: nn.Module | None = None,
        classes: int = 4,
    ) -> None:
        self._design = CriticDesign() if design is None else design
        self._teacher: nn.Module | None = None
        if self._design.joint:
            if teacher is None:
                raise SettingsError(f"{name}: a discriminator of pairs needs the hospital's teacher, found none")
            self._teacher = teacher.to(device).eval().requires_grad_(False)
        self._joins_late = joins_late
        self._mirrored = mirrored
        self._name = name
        self._volumes = tuple(volumes)
        self._state_dir = state_dir
        self._seed = _site_seed(seed, name)
        self._device = device
        self._batch = batch
        self._criterion = criterion
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self.discriminator = build_discriminator(
                self._design,
                channels=sequences + (classes if self._design.joint else 0),
                width=width,
                layers=layers,
                norm=norm,
                spatial_dims=spatial_dims,
            ).to(device)
        self._optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.999))
        self._run_id: str | None = None
        self._round = 0
        self._fresh: dict[str, Any] = {
            "discriminator": {name: tensor.clone() for name, tensor in self.discriminator.state_dict().items()},
            "optimizer": self._optimizer.state_dict(),
        }

    def judge(self, x: Tensor, query: Query) -> dict[str, Tensor]:
        """One step, then realism and gradient; see `Critic.judge`.

        Raises:
            ProtocolError: no scans, or a round before which this site has neither its state nor a snapshot.
        """
        if not self._volumes:
            raise ProtocolError(f"{self._name}: asked for its discriminator, but has no scans to train it on")
        self._enter_round(query)
        self._step(x, query.round)
        judged = judgement(
            self.discriminator, x, self._criterion, show=lambda leaf: self._shown(leaf, query.round, "x")
        )
        self._run_id, self._round = query.run_id, query.round
        if query.settings.get("snapshot", False):
            self._write_snapshot(query.run_id)
        return judged

    def real_batch(self, size: Sequence[int], number: int) -> Tensor:
        """Random patches `(batch, S, *size)` of the hospital's scans; fixed by the round."""
        generator = torch.Generator().manual_seed((self._seed * 7_368_787 + number) % 2**63)
        chosen = torch.randint(len(self._volumes), (self._batch,), generator=generator).tolist()
        scans = [self._volumes[i] for i in chosen]
        if self._mirrored or any(scan.shape[1:] != tuple(size) for scan in scans):
            draw = random_patch(size, mirrored=self._mirrored)
            draw.set_random_state(seed=(self._seed * 1_000_003 + number) % 2**32)
            scans = [convert_to_tensor(draw(scan), track_meta=False) for scan in scans]
        return torch.stack(scans).to(self._device).float()

    def _step(self, fake: Tensor, number: int) -> None:
        real = self.real_batch(fake.shape[2:], number)
        with torch.no_grad(), autocast_over(fake.device, fake.shape[2:]):
            fake, real = self._shown(fake.detach(), number, "synthetic"), self._shown(real, number, "real")
        # A spectral norm moves on in training only, so what is judged below is what a snapshot holds.
        self.discriminator.train().requires_grad_(True)
        loss = discriminator_loss(self.discriminator, fake, real, self._criterion, penalty=self._design.penalty)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self.discriminator.eval().requires_grad_(False)

    def _shown(self, x: Tensor, number: int, part: str) -> Tensor:
        """What the discriminator sees of x: changed at random, and with the teacher's answer, where the design says so.

        The change is fixed by the hospital's seed, the round's number and the part that x plays in it.
        """
        if self._design.augment:
            x = draw_augmentation(x.shape, seed=_site_seed(self._seed, f"{part}/{number}")).apply(x)
        if self._teacher is not None:
            x = torch.cat([x, torch.softmax(self._teacher(x).float(), dim=1)], dim=1)
        return x

    def _enter_round(self, query: Query) -> None:
        """Continue from the last round, or rewind to the snapshot that a resumed centre continues from.

        A site that missed rounds of this run continues with what it has, be it in memory or, after a restart, in its
        newest snapshot: its discriminator is only older.
        """
        before = query.round - 1
        if query.run_id == self._run_id and before >= self._round:
            if before > self._round:
                logger.warning("%s: missed rounds %d to %d", self._name, self._round + 1, before)
            return
        path = self._snapshot(query.run_id, before)
        if query.run_id != self._run_id and not path.is_file():
            path = max((p for p in self._snapshots(query.run_id) if p < path), default=path)
        new_here = self._joins_late and not self._snapshots(query.run_id)
        if before == 0 or (new_here and before > 0):
            state = {**self._fresh, "round": before}
        elif path.is_file():
            state = load_state(path)
        else:
            raise ProtocolError(
                f"{self._name}: asked for round {query.round} after round {self._round}, and no snapshot of round "
                f"{before} is kept; start the run again"
            )
        self.discriminator.load_state_dict(state["discriminator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._run_id, self._round = query.run_id, before

    def _write_snapshot(self, run_id: str) -> None:
        state = {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "round": self._round,
        }
        save_state(self._snapshot(run_id, self._round), state)
        kept = self._snapshots(run_id)
        current = kept.index(self._snapshot(run_id, self._round))
        # Later ones stem from a continuation that the centre has abandoned.
        for path in [*kept[: max(0, current + 1 - KEEP_SNAPSHOTS)], *kept[current + 1 :]]:
            path.unlink()

    def _snapshots(self, run_id: str) -> list[Path]:
        return sorted(self._state_dir.glob(f"{run_id}-round-*.pt"))

    def _snapshot(self, run_id: str, number: int) -> Path:
        if not run_id.replace("-", "").isalnum():
            raise ProtocolError(f"{self._name}: expected a run id of letters, digits and dashes, found {run_id!r}")
        return self._state_dir / f"{run_id}-round-{number:06d}.pt"


class PrivateCritic:
    """A discriminator under DP-SGD: the real half of each update is private, counted and paid for in advance.

    Updates are spread evenly over the rounds that the centre announces, at most one a round, and when they are used up
    the weights stay as they are. The number of each update is with the ledger's key before a patient is touched, so
    that neither a restart nor another copy of the run can update more often than was paid for. A centre that resumes
    meets the discriminator as it is now.

    Args:
        name: hospital.
        patients: preprocessed training scans `(4, D, H, W)`, by patient.
        plan: noise, sampling rate and number of updates, as charged.
        permit: the ledger entry that paid.
        done: updates that the hospital has made under this permit, by its own durable count (`Gate.progress`).
        journal: writes that count durably before an update touches a patient (`Gate.advance`).
        state_dir: where the weights rest between rounds.
        device: where to compute.
        width: channels of the first layer.
        layers: strided layers.
        norm: `INSTANCE` or `GROUP`.
        criterion: `hinge`, `bce` or `least_squares`.

    Raises:
        WeightsError: the stored state is damaged or belongs to another network.
        PrivacyError: updates were made, and the state that they led to is gone.
    """

    def __init__(
        self,
        name: str,
        patients: Sequence[Sequence[Tensor]],
        *,
        plan: DiscriminatorPlan,
        permit: str,
        done: int,
        journal: Callable[[int], None],
        state_dir: Path,
        device: torch.device,
        width: int = 16,
        layers: int = 2,
        norm: str = "INSTANCE",
        criterion: str = "hinge",
    ) -> None:
        self._name = name
        self._patients = tuple(tuple(volumes) for volumes in patients)
        self._planned = plan.mechanism.steps
        self._permit = permit
        self._state = state_dir / f"discriminator-{permit}.pt"
        self._device = device
        self._criterion = criterion
        self.discriminator = PatchDiscriminator(width=width, layers=layers, norm=norm).to(device)
        self._training = PrivateDiscriminator(
            self.discriminator,
            plan,
            patients=len(patients),
            real_loss=lambda logits: real_adversarial(logits, criterion),
            fake_loss=lambda logits: synthetic_adversarial(logits, criterion),
            journal=journal,
            device=device,
        )
        if not self._state.is_file() and done:
            raise PrivacyError(
                f"{self._state}: expected the discriminator after {done} private updates, found nothing; restore "
                f"the run folder, or start a new run, which charges a new discriminator"
            )
        stored = load_state(self._state)["training"] if self._state.is_file() else self._training.state_dict()
        self._training.load_state_dict(stored, journalled=done)
        if not done:
            save_state(self._state, {"training": self._training.state_dict()})

    @property
    def permits(self) -> tuple[str, ...]:
        """The permit under which this discriminator learns."""
        return (self._permit,)

    @property
    def updates(self) -> int:
        """Private updates used up so far."""
        return self._training.updates

    def judge(self, x: Tensor, query: Query) -> dict[str, Tensor]:
        """A private update where one is due, then realism and gradient; see `Critic.judge`."""
        if self._training.remaining and self._due(query):
            size = x.shape[2:]
            self._training.update(x.detach(), lambda index: self._patches(index, size))
            save_state(self._state, {"training": self._training.state_dict()})
        self.discriminator.eval()
        return judgement(self.discriminator, x, self._criterion)

    def _due(self, query: Query) -> bool:
        """Whether the evenly spread plan has an update that this round has not seen; always, if no plan is known."""
        rounds = query.settings.get("rounds", 0)
        if not isinstance(rounds, int) or rounds < 1:
            return True
        return self._training.updates < min(self._planned, math.ceil(query.round * self._planned / rounds))

    def _patches(self, index: int, size: Sequence[int]) -> Tensor:
        """One random patch `(1, 4, *size)` of one patient; the draw is secret, so nothing here is seeded."""
        volumes = self._patients[index]
        draw = random_patch(size)
        draw.set_random_state(seed=secrets.randbits(32))
        patch = convert_to_tensor(draw(volumes[secrets.randbelow(len(volumes))]), track_meta=False)
        real: Tensor = patch[None].to(self._device).float()
        return real


def _site_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
