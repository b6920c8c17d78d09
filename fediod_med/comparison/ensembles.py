"""Teacher ensembles on real scans, one prediction per way of weighing; none is deployable, all need every teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from fediod_med.baselines import PreparedScan
from fediod_med.data.sampler import PublicSampler
from fediod_med.devices import autocast_over
from fediod_med.distillation.settings import GeneratorObjective
from fediod_med.ensemble import competence_weights, merge, public_dice
from fediod_med.federation.critic import PlainCritic
from fediod_med.hospitals import Hospital
from fediod_med.inference import native_classes, predict_probabilities
from fediod_med.protocol import Query

ENTROPY_TEMPERATURE = 0.2  # nats; set before any score was seen
COMPETENCE_BATCHES = 20
COMPETENCE_TEMPERATURE = 0.05


def ensemble_maps(
    hospitals: Sequence[Hospital],
    sampler: PublicSampler,
    scans: Mapping[str, PreparedScan],
    *,
    roi: int,
    rounds: int,
    seed: int,
    device: torch.device,
) -> dict[str, dict[str, np.ndarray]]:
    """Class maps `(X, Y, Z)` on the native grid, by row and subject.

    Args:
        hospitals: with their trained teachers.
        sampler: phantoms, on which competence is measured and discriminators are trained.
        scans: by subject id, see `baselines.prepare`.
        roi: edge of a window, voxels.
        rounds: steps of each discriminator, scans against phantoms.
        seed: of the discriminators.
        device: where to compute.
    """
    networks = [hospital.teacher.to(device).eval() for hospital in hospitals]
    counts = torch.stack([hospital.presence.sum(dim=0) for hospital in hospitals])
    critics = phantom_critics(hospitals, sampler, rounds=rounds, seed=seed, device=device)
    competence = _competence(hospitals, sampler, batches=min(COMPETENCE_BATCHES, rounds), device=device)
    found: dict[str, dict[str, np.ndarray]] = {}
    for subject, scan in scans.items():
        members = [predict_probabilities(network, scan.image, roi=roi, device=device) for network in networks]
        probs = torch.stack([member.as_tensor()[None] for member in members])
        by_class = partial(merge, probs, counts)
        merged = {
            "ensemble_mean": merge(probs, torch.ones_like(counts)),
            "ensemble_size": merge(probs, counts[:, :1].expand_as(counts)),
            "ensemble_class_ratio": by_class(),
            "ensemble_discriminator": by_class(realism=_realism(critics, scan.image, device)),
            "ensemble_entropy": by_class(entropy_temperature=ENTROPY_TEMPERATURE),
            "ensemble_competence": by_class(competence=competence),
        }
        for key, mixture in merged.items():
            volume = MetaTensor(mixture[0], affine=scan.image.affine)
            found.setdefault(key, {})[subject] = native_classes(volume, affine=scan.affine, shape=scan.shape)
    return found


def phantom_critics(
    hospitals: Sequence[Hospital], sampler: PublicSampler, *, rounds: int, seed: int, device: torch.device
) -> list[nn.Module]:
    """One discriminator per hospital, trained to tell its scans from public phantoms."""
    trained = []
    with tempfile.TemporaryDirectory() as folder:
        for hospital in hospitals:
            name = hospital.site.site_name
            volumes = [volume for visits in hospital.patients for volume in visits]
            critic = PlainCritic(name, volumes, state_dir=Path(folder), seed=seed, device=device)
            for number in range(1, rounds + 1):
                x = sampler.draw(number, 2).base.to(device)
                critic.judge(x, Query("answer", "ensemble", number, {"x": x}))
            trained.append(critic.discriminator.eval())
    return trained


def _realism(critics: Sequence[nn.Module], image: MetaTensor, device: torch.device) -> Tensor:
    """Mean patch logit of each discriminator on one scan, `(K, 1)`."""
    x = image.as_tensor()[None].to(device)
    with torch.inference_mode():
        return torch.stack([critic(x).float().mean()[None] for critic in critics]).cpu()


def _competence(hospitals: Sequence[Hospital], sampler: PublicSampler, *, batches: int, device: torch.device) -> Tensor:
    """Weights `(K, C)` from each teacher's Dice on phantoms."""
    dice = []
    for number in range(1, batches + 1):
        public = sampler.draw(number, 2)
        x = public.base.to(device)
        with torch.inference_mode(), autocast_over(x.device, x.shape[2:]):
            logits = [hospital.teacher(x).float() for hospital in hospitals]
        probs = torch.stack([torch.softmax(answer, dim=1) for answer in logits])
        dice.append(public_dice(probs, public.classes.to(device)).cpu())
    temperature = GeneratorObjective().competence or COMPETENCE_TEMPERATURE
    return competence_weights(torch.stack(dice).mean(dim=0), temperature)
