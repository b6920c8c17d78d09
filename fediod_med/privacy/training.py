"""DP-SGD by patient: a fixed schedule of Poisson draws, and averaged weights at its end.

Abadi et al. 2016 (algorithm 1) with the patient as the unit: each step draws every patient independently with
probability q, clips the gradient of each drawn patient (all its crops together) to C, adds Gaussian noise of standard
deviation sigma * C to the sum, and divides by the constant q * n. Crops per patient above one are augmentation
multiplicity (De et al. 2022, arXiv 2204.13650, section 3.2). The schedule has exactly `mechanism.steps` steps; nothing
is selected on patients, no loss is reported, and the average of the weights is post-processing.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fediod_med.errors import PrivacyError
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.noise import NoiseSource, OsNoise, poisson_draw
from fediod_med.privacy.optimizer import PatientOptimizer, patient_gradient, public_gradient
from fediod_med.privacy.subspace import SubspaceOptimizer, public_basis
from fediod_med.privacy.trainable import check_private_network, trainable_parameters

Patient = TypeVar("Patient")
PublicDraw = Callable[[int, int], tuple[Tensor, Tensor]]
OPTIMIZERS = ("adam", "sgd")
PUBLIC_ROWS = 2  # in each step's public gradient


@dataclass(frozen=True)
class PrivateSchedule:
    """Everything that fixes a private training before a patient is touched.

    Attributes:
        mechanism: sigma, q and the number of steps, as charged.
        clip_norm: C, joint norm of one patient's gradient.
        learning_rate: peak; a cosine to 0 over the steps after a linear warm-up of a twentieth of them.
        optimizer: `adam`, or `sgd` with momentum .9.
        physical_batch: rows (crops) in memory at once.
        public_weight: share of the public gradient in each step, in [0, 1).
        subspace: number of public gradients whose span the patients' gradients are projected on (`privacy.subspace`);
            0 trains in all directions.
        refresh: steps after which that basis is computed anew.
        average: momentum of the averaged weights; `min(.5, 4 / steps)` when omitted, a mean over the last quarter:
            noise averages out, and averaging spends nothing.
        precision: `float32`, or `bfloat16` for matrix products and convolutions; gradients stay float32, clipping and
            noise float64.
    """

    mechanism: Mechanism
    clip_norm: float = 1.0
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    physical_batch: int = 4
    public_weight: float = 0.0
    subspace: int = 0
    refresh: int = 10
    average: float | None = None
    precision: str = "float32"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """`PrivacyError` for a value out of range."""
        if self.optimizer not in OPTIMIZERS:
            raise PrivacyError(
                f"private training: expected optimizer {' or '.join(OPTIMIZERS)}, found {self.optimizer!r}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise PrivacyError(
                f"private training: expected precision float32 or bfloat16, found {self.precision!r}; float16 needs a "
                "loss scale, which would depend on the patients"
            )
        if not (self.clip_norm > 0 and self.learning_rate > 0 and self.physical_batch >= 1):
            raise PrivacyError(
                "private training: expected a clip norm, a learning rate and a physical batch above 0, found "
                f"{self.clip_norm}, {self.learning_rate} and {self.physical_batch}"
            )
        if self.subspace < 0 or self.refresh < 1:
            raise PrivacyError(
                f"private training: expected a subspace of at least 0 dimensions, renewed after at least 1 step, found "
                f"{self.subspace} and {self.refresh}"
            )
        if not 0 <= self.public_weight < 1 or not (self.average is None or 0 < self.average <= 1):
            raise PrivacyError(
                "private training: expected a public weight in [0, 1) and an average in (0, 1], found "
                f"{self.public_weight} and {self.average}"
            )

    @property
    def averaging(self) -> float:
        """Momentum of the averaged weights."""
        return min(0.5, 4 / max(self.mechanism.steps, 1)) if self.average is None else self.average

    def digest(self) -> str:
        """SHA-256 over all settings, for the permit and the checkpoint; `extra` holds what the caller fixes beside."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """Where and how an unfinished training rests inside the site, for the same permit only.

    Attributes:
        path: file.
        save: writes a mapping of tensors, numbers and strings, atomically.
        load: reads it without executing anything.
        every: steps between two writes.
        permit: id of the ledger's permit; a state of another permit is refused.
    """

    path: Path
    save: Callable[[Path, Mapping[str, Any]], None]
    load: Callable[[Path], Mapping[str, Any]]
    every: int = 25
    permit: str = ""


class PrivateTrainer:
    """Trains one network by DP-SGD; keeps the position in the schedule, so that it cannot run beyond it.

    Args:
        network: on `device`; frozen parameters stay as they are (`trainable.select_trainable`).
        schedule: fixed settings.
        patients: declared number n of patients.
        per_row_loss: `(logits (r, C, ...), label (r, ...))` to losses `(r,)`.
        device: of the network and the batches.
        source: of noise and Poisson draws.

    Raises:
        PrivacyError: the network mixes patients or has nothing to train, or there is no patient.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: PrivateSchedule,
        *,
        patients: int,
        per_row_loss: Callable[[Tensor, Tensor], Tensor],
        device: torch.device | str = "cpu",
        source: NoiseSource | None = None,
    ) -> None:
        check_private_network(network)
        if patients < 1:
            raise PrivacyError(f"private training: expected at least one patient, found {patients}")
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.done = 0
        self._stale = True  # no basis yet, or the one of an interrupted run is gone
        self._schedule = schedule
        self._patients = patients
        self._loss = per_row_loss
        self._device = torch.device(device)
        self._source: NoiseSource = OsNoise() if source is None else source
        self.parameters = trainable_parameters(network)
        self.optimizer = private_optimizer(
            schedule,
            self.parameters,
            expected_patients=schedule.mechanism.sample_rate * patients,
            source=self._source,
        )

    def step(
        self,
        draw: Callable[[int], tuple[Tensor, Tensor]],
        public: PublicDraw | None = None,
    ) -> None:
        """One draw, one noised step, one update of the average.

        Args:
            draw: patient index in [0, n) to its crops `(P, 4, d, h, w)` and labels `(P, ...)`; P may differ by patient.
            public: `(number, count)` to `count` public crops and labels of the same form; numbers up to `steps` serve
                the mixed-in gradient of that step, higher ones the bases.

        Raises:
            PrivacyError: the schedule is finished, or it names a subspace and nothing public was given.
        """
        steps = self._schedule.mechanism.steps
        if self.done >= steps:
            raise PrivacyError(f"private training: all {steps} charged steps are done; another needs a new charge")
        self.network.train()
        if isinstance(self.optimizer, SubspaceOptimizer) and (self._stale or self.done % self._schedule.refresh == 0):
            self.optimizer.set_basis(self._public_basis(public))
            self._stale = False
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self._schedule.learning_rate * rate(self.done, steps)
        for index in poisson_draw(self._patients, self._schedule.mechanism.sample_rate, source=self._source):
            self._backward(*draw(int(index)))
            self.optimizer.add_patient()
        weight = self._schedule.public_weight
        gradient = None
        if public is not None and weight > 0:
            image, label = (t.to(self._device) for t in public(self.done + 1, PUBLIC_ROWS))
            gradient = public_gradient(self._losses(image, label).mean(), self.parameters)
        self.optimizer.noised_gradient()
        if gradient is not None:
            self.optimizer.add_public(gradient, weight=weight)
        self.optimizer.descend()
        self.done += 1
        self._update_average()

    def state_dict(self) -> dict[str, Any]:
        """Position, weights, average and optimiser. No random state: noise is never drawn twice."""
        return {
            "schedule": self._schedule.digest(),
            "done": self.done,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; `PrivacyError` when it belongs to other settings."""
        if state.get("schedule") != self._schedule.digest():
            raise PrivacyError("private training: the saved state belongs to other settings; it needs its own charge")
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])
        self._stale = True

    def _backward(self, image: Tensor, label: Tensor) -> None:
        image, label = image.to(self._device), label.to(self._device)
        patient_gradient(lambda part: self._losses(image[part], label[part]), len(image), self._schedule.physical_batch)

    def _public_basis(self, public: PublicDraw | None) -> Tensor:
        """Directions of the steps to come, from gradients of single public rows at the present weights."""
        if public is None:
            raise PrivacyError("private training: expected public crops for the subspace, found none; set subspace 0")
        schedule = self._schedule
        images, labels = public(schedule.mechanism.steps + 1 + self.done // schedule.refresh, schedule.subspace)
        return public_basis(
            public_gradient(
                self._losses(*(t[row : row + 1].to(self._device) for t in (images, labels))).sum(), self.parameters
            )
            for row in range(schedule.subspace)
        )

    def _losses(self, image: Tensor, label: Tensor) -> Tensor:
        with autocast(self._schedule.precision, self._device):
            logits = self.network(image)
        return self._loss(logits.float(), label)

    @torch.no_grad()
    def _update_average(self) -> None:
        for mean, now in zip(self.average.parameters(), self.network.parameters(), strict=True):
            if now.requires_grad:
                mean.lerp_(now, self._schedule.averaging)


def train_private(
    network: nn.Module,
    patients: Sequence[Patient],
    *,
    schedule: PrivateSchedule,
    draw: Callable[[Patient], tuple[Tensor, Tensor]],
    per_row_loss: Callable[[Tensor, Tensor], Tensor],
    public: PublicDraw | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
    source: NoiseSource | None = None,
) -> nn.Module:
    """Train by DP-SGD for exactly `schedule.mechanism.steps` steps.

    Args:
        network: as for `PrivateTrainer`; trained in place.
        patients: one entry per patient, whatever it holds; its length is the declared n.
        schedule: fixed settings.
        draw: a patient to crops `(P, 4, d, h, w)` and labels `(P, ...)`; it must look at this patient alone.
        per_row_loss: as for `PrivateTrainer`.
        public: as for `PrivateTrainer.step`.
        checkpoints: rest states; an existing one is continued.
        on_step: receives (step, steps): all that may be told about a private step.
        device: of the computation.
        source: of noise and Poisson draws; the operating system's when omitted.

    Returns:
        The network with averaged weights, in evaluation mode.

    Raises:
        PrivacyError: the network mixes patients, nothing is trainable, or the checkpoint belongs to another training.
    """
    trainer = PrivateTrainer(
        network.to(device), schedule, patients=len(patients), per_row_loss=per_row_loss, device=device, source=source
    )
    if checkpoints is not None and checkpoints.path.is_file():
        state = checkpoints.load(checkpoints.path)
        if state.get("permit") != checkpoints.permit:
            raise PrivacyError(
                f"{checkpoints.path}: expected a state of permit {checkpoints.permit!r}, found "
                f"{state.get('permit')!r}; every permit has its own folder"
            )
        trainer.load_state_dict(state["trainer"])
    steps = schedule.mechanism.steps
    while trainer.done < steps:
        trainer.step(lambda index: draw(patients[index]), public)
        if checkpoints is not None and (trainer.done % checkpoints.every == 0 or trainer.done == steps):
            checkpoints.save(checkpoints.path, {"permit": checkpoints.permit, "trainer": trainer.state_dict()})
        if on_step is not None:
            on_step(trainer.done, steps)
    return trainer.average.eval()


def rate(done: int, steps: int) -> float:
    """Share of the peak learning rate in step `done + 1`: a cosine to 0, after a linear warm-up of a twentieth."""
    warm_up = max(1, steps // 20)
    return min(1.0, (done + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * done / max(steps, 1)))


def private_optimizer(
    schedule: PrivateSchedule,
    parameters: Sequence[nn.Parameter],
    *,
    expected_patients: float,
    source: NoiseSource | None,
) -> PatientOptimizer | SubspaceOptimizer:
    """Clips and noises whole gradients, or their coefficients in a public subspace, as `schedule` says."""
    settings: dict[str, Any] = {
        "noise_multiplier": schedule.mechanism.noise_multiplier,
        "clip_norm": schedule.clip_norm,
        "expected_patients": expected_patients,
        "source": source,
    }
    base = base_optimizer(schedule, parameters)
    if schedule.subspace:
        return SubspaceOptimizer(base, dimensions=schedule.subspace, **settings)
    return PatientOptimizer(base, **settings)


def base_optimizer(schedule: PrivateSchedule, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that `schedule` names, without weight decay."""
    if schedule.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=schedule.learning_rate)
    return torch.optim.SGD(parameters, lr=schedule.learning_rate, momentum=0.9)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context for `float32` (none) or `bfloat16` matrix products and convolutions."""
    if precision == "float32":
        return contextlib.nullcontext()
    # Weights are cast anew in each pass: a cache would outlive an optimiser step inside a caller's own autocast.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
