"""A hospital's discriminator under DP-SGD: the real half is private and counted, the synthetic half is public.

Synthetic volumes come from the centre, so their gradient is added after the noise and costs nothing. The updates are
planned over the whole run and charged when the training begins; after the last one the weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fediod_med.errors import BudgetExceeded, PrivacyError
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.noise import NoiseSource, OsNoise, poisson_draw
from fediod_med.privacy.optimizer import PatientOptimizer, patient_gradient, public_gradient
from fediod_med.privacy.trainable import check_private_network, trainable_parameters
from fediod_med.privacy.training import autocast

_SYNTHETIC_SHARE = 0.5  # of the gradient: the discriminator's loss is the mean of its two halves


@dataclass(frozen=True)
class DiscriminatorPlan:
    """Everything that fixes a private discriminator before a patient is touched.

    Attributes:
        mechanism: sigma, q and the number of updates, as charged.
        clip_norm: C, joint norm of one patient's gradient, and of the synthetic half's.
        learning_rate: of Adam.
        betas: of Adam; (.5, .999) as in the published code.
        physical_batch: rows in memory at once.
        precision: `float32` or `bfloat16`, as in `training.PrivateSchedule`.
    """

    mechanism: Mechanism
    clip_norm: float = 1.0
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    physical_batch: int = 4
    precision: str = "float32"


class PrivateDiscriminator:
    """Updates a discriminator at most `plan.mechanism.steps` times.

    Args:
        network: the discriminator, on `device`.
        plan: fixed settings.
        patients: declared number n of patients.
        real_loss: patch logits `(r, 1, ...)` of real rows to losses `(r,)`.
        fake_loss: patch logits of synthetic rows to one number, their mean loss.
        journal: called with the number of the update (from 1) before the update touches a patient. A site that answers
            from these weights while they train must write the number durably there: an update repeated after a crash
            is then counted twice, never not at all.
        device: of the network and the batches.
        source: of noise and Poisson draws.

    Raises:
        PrivacyError: the network mixes patients or has nothing to train, or there is no patient.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: DiscriminatorPlan,
        *,
        patients: int,
        real_loss: Callable[[Tensor], Tensor],
        fake_loss: Callable[[Tensor], Tensor],
        journal: Callable[[int], None] | None = None,
        device: torch.device | str = "cpu",
        source: NoiseSource | None = None,
    ) -> None:
        check_private_network(network)
        if patients < 1:
            raise PrivacyError(f"private discriminator: expected at least one patient, found {patients}")
        self.network = network
        self.updates = 0
        self._plan = plan
        self._patients = patients
        self._real_loss = real_loss
        self._fake_loss = fake_loss
        self._journal = journal
        self._device = torch.device(device)
        self._source: NoiseSource = OsNoise() if source is None else source
        self._parameters = trainable_parameters(network)
        self._optimizer = PatientOptimizer(
            torch.optim.Adam(self._parameters, lr=plan.learning_rate, betas=plan.betas),
            noise_multiplier=plan.mechanism.noise_multiplier,
            clip_norm=plan.clip_norm,
            expected_patients=plan.mechanism.sample_rate * patients,
            source=self._source,
        )

    @property
    def remaining(self) -> int:
        """Updates that are charged and not yet made."""
        return max(self._plan.mechanism.steps - self.updates, 0)

    def update(self, fake: Tensor, draw: Callable[[int], Tensor]) -> None:
        """One private update.

        Args:
            fake: `(B, 4, d, h, w)` synthetic volumes, without gradient.
            draw: patient index in [0, n) to its real crops `(P, 4, d, h, w)`.

        Raises:
            BudgetExceeded: all charged updates are made; no patient was touched.
        """
        if self.remaining == 0:
            raise BudgetExceeded(
                f"private discriminator: all {self._plan.mechanism.steps} charged updates are made; it stays as it is "
                "(ask `remaining` first), or plan more updates under a larger budget"
            )
        self.updates += 1
        if self._journal is not None:
            self._journal(self.updates)
        self.network.train()
        self._optimizer.zero_grad(set_to_none=True)
        synthetic = public_gradient(self._fake_loss(self._logits(fake)), self._parameters)
        for index in poisson_draw(self._patients, self._plan.mechanism.sample_rate, source=self._source):
            real = draw(int(index))
            patient_gradient(
                lambda part, real=real: self._real_loss(self._logits(real[part])),  # type: ignore[misc]
                len(real),
                self._plan.physical_batch,
            )
            self._optimizer.add_patient()
        self._optimizer.noised_gradient()
        self._optimizer.add_public(synthetic, weight=_SYNTHETIC_SHARE)
        self._optimizer.descend()

    def state_dict(self) -> dict[str, Any]:
        """Updates made, weights and optimiser. No random state: noise is never drawn twice."""
        return {
            "updates": self.updates,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, journalled: int = 0) -> None:
        """Continue from `state_dict()`.

        Args:
            state: what was saved.
            journalled: highest number that the journal holds; updates after the saved state stay counted.
        """
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.updates = max(int(state["updates"]), journalled, self.updates)

    def _logits(self, x: Tensor) -> Tensor:
        with autocast(self._plan.precision, self._device):
            logits: Tensor = self.network(x.to(self._device))
        return logits.float()
