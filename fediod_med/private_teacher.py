"""A hospital's teacher under DP-SGD: what `bundles/teacher/configs/train_private.yaml` runs.

The whole training is charged to the ledger before the first patient is used. It then has exactly the charged steps, can
be interrupted and continued on the same charge, and shows nothing of a patient: no loss, no score, no gradient norm.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from fediod_med.checkpoints import Provenance, current_commit, load_state, save_state, save_weights, weights_digest
from fediod_med.data.partitions import by_patient
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import augmentation, preprocessing
from fediod_med.devices import private_precision
from fediod_med.errors import PrivacyError
from fediod_med.privacy.gate import Gate
from fediod_med.privacy.policy import PrivacyPolicy
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.subspace import public_share
from fediod_med.privacy.trainable import select_trainable
from fediod_med.privacy.training import Checkpoints, PrivateSchedule, PrivateTrainer, PublicDraw, train_private
from fediod_med.sites import Site


def private_schedule(site: Site, policy: PrivacyPolicy, *, init: str, device: torch.device) -> PrivateSchedule:
    """The fixed schedule of a site's private training, with the noise that its policy charges.

    Args:
        site: settings.
        policy: of the site, in mode `dp-sgd`.
        init: digest of the weights that the training starts from, part of what the charge is bound to.
        device: decides the precision.
    """
    part = policy.part("teacher")
    subspace = site.subspace if site.rehearsal else 0  # without public crops there is nothing to span it
    return PrivateSchedule(
        mechanism=part.planned,
        clip_norm=part.clip_norm,
        learning_rate=site.private_rate,
        physical_batch=site.physical_batch,
        precision=private_precision(device),
        public_weight=public_share(
            site.rehearsal,
            noise_multiplier=part.planned.noise_multiplier,
            expected_patients=part.planned.sample_rate * policy.patients,
            dimensions=subspace,
        ),
        subspace=subspace,
        extra={
            "network": json.dumps(site.network(), sort_keys=True),
            "init": init,
            "trainable": site.trainable,
            "crops": site.crops,
            "patients": policy.patients,
            "spacing": site.spacing,
            "roi": site.roi,
        },
    )


def promised(gate: Gate) -> PrivacyPolicy:
    """The policy of a gate; `PrivacyError` in mode `none`, which promises nothing."""
    if gate.policy is None:
        raise PrivacyError(f"{gate.site}: expected privacy_mode dp-sgd, found none; use train.yaml")
    return gate.policy


def patient_crops(scans: Sequence[Mapping[str, Any]], site: Site) -> tuple[Tensor, Tensor]:
    """What a private step sees of one patient: `site.crops` random, augmented crops of its scans, drawn in secret.

    Args:
        scans: of one patient, at least one; `image` `(4, x, y, z)` and `label` `(1, x, y, z)` on the working grid.
        site: settings.

    Returns:
        Images `(crops, 4, roi, roi, roi)` float32 and classes `(crops, roi, roi, roi)` int64.
    """
    draw = augmentation(roi=site.roi)
    draw.set_random_state(seed=secrets.randbits(32))
    images, labels = [], []
    for _ in range(site.crops):
        scan = scans[secrets.randbelow(len(scans))]
        found = draw({"image": scan["image"], "label": scan["label"]})
        crop = found[0] if isinstance(found, list) else found
        images.append(convert_to_tensor(crop["image"], track_meta=False).float())
        labels.append(convert_to_tensor(crop["label"], track_meta=False)[0].long())
    return torch.stack(images), torch.stack(labels)


def public_crops(public: PublicSampler | None) -> PublicDraw | None:
    """Public phantoms by number of the draw and count, images and classes; `None` where there are none."""
    if public is None:
        return None

    def draw(number: int, count: int) -> tuple[Tensor, Tensor]:
        drawn = public.draw(number, count)
        return drawn.base, drawn.classes

    return draw


class PrivateTeacher:
    """Trains, writes and books one teacher.

    Args:
        network: with the weights it starts from.
        site: settings; they come from the site file, not from a command line.
        gate: of the site, in mode `dp-sgd`.
        public: phantoms for rehearsal, if any.
        device: where to compute.
        output_dir: receives `model.safetensors`; holds the state of an unfinished training.
        on_step: receives (step, steps).

    Raises:
        PrivacyError: another mode, or fewer patients than the policy declares trained on.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        site: Site,
        gate: Gate,
        public: PublicSampler | None,
        device: torch.device,
        output_dir: str | Path,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        if gate.mode != "dp-sgd":
            raise PrivacyError(f"{site.site_name}: expected privacy_mode dp-sgd, found {gate.mode}; use train.yaml")
        self._network = network
        self._site = site
        self._gate = gate
        self._public = public
        self._device = device
        self._folder = Path(output_dir)
        self._on_step = on_step

    def run(self) -> Path:
        """Charge, train, write the weights and book them; an unfinished training of the same settings is continued.

        Returns:
            The weights file.

        Raises:
            BudgetExceeded: the charge does not fit; nothing was trained.
            PrivacyError: an unfinished training's state is gone, so that its steps cannot be told from new ones.
        """
        site, gate = self._site, self._gate
        select_trainable(self._network, site.trainable)
        schedule = private_schedule(
            site, promised(gate), init=weights_digest(self._network.state_dict()), device=self._device
        )
        permit = gate.begin_training("teacher", run_id=f"seed-{site.seed}", settings_digest=schedule.digest())
        state = self._folder / f"private-{permit.permit_id[:16]}.pt"
        if not permit.resumed:
            first = PrivateTrainer(
                self._network, schedule, patients=1, per_row_loss=per_row_dice_ce, device=self._device
            ).state_dict()
            save_state(state, {"permit": permit.permit_id, "trainer": first})
        elif not state.is_file():
            raise PrivacyError(
                f"{state}: expected the state of an unfinished private training, found nothing; its charge is spent. "
                f"Restore the file, or change `seed` in the site file to charge a new training"
            )
        trained = train_private(
            self._network,
            self._patients(),
            schedule=schedule,
            draw=lambda scans: patient_crops(scans, site),
            per_row_loss=per_row_dice_ce,
            public=public_crops(self._public),
            checkpoints=Checkpoints(state, save_state, load_state, every=1, permit=permit.permit_id),
            on_step=self._on_step,
            device=self._device,
        )
        path = self._folder / "model.safetensors"
        weights = {name: tensor.cpu() for name, tensor in trained.state_dict().items()}
        save_weights(path, weights, self._provenance(schedule, permit.permit_id))
        gate.finish_training(permit, weights_sha256=weights_digest(weights))
        state.unlink(missing_ok=True)
        return path

    def _patients(self) -> list[list[dict[str, Any]]]:
        """Preprocessed scans by patient: several visits are one patient, clipped together."""
        steps = preprocessing(spacing=self._site.spacing, with_label=True)
        # Of the site file alone: the charge is bound to these patients.
        grouped = by_patient(self._site.subjects()[0])
        declared = promised(self._gate).patients
        if len(grouped) != declared:
            raise PrivacyError(
                f"{self._site.site_name}: expected the {declared} training patients of the policy, found {len(grouped)}"
            )
        scheme = self._site.label_scheme
        return [[steps({"subject": visit, "scheme": scheme}) for visit in visits] for visits in grouped.values()]

    def _provenance(self, schedule: PrivateSchedule, permit: str) -> Provenance:
        site, policy = self._site, promised(self._gate)
        return Provenance(
            kind="teacher",
            network=site.network(),
            spacing=site.spacing,
            label_scheme=site.label_scheme,
            sites=(site.site_name,),
            privacy={
                site.site_name: {
                    "mode": policy.mode,
                    "epsilon": policy.epsilon,
                    "delta": policy.delta,
                    "permit": permit,
                    "policy": policy.digest(),
                }
            },
            trained_on="patients of one hospital, by DP-SGD",
            seed=site.seed,
            settings={
                "roi": site.roi,
                "steps": schedule.mechanism.steps,
                "noise_multiplier": schedule.mechanism.noise_multiplier,
                "sample_rate": schedule.mechanism.sample_rate,
                "clip_norm": schedule.clip_norm,
                "trainable": site.trainable,
                "schedule": schedule.digest(),
            },
            commit=current_commit(),
        )
