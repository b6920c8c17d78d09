"""Phantom hospitals for the open questions: cohorts, cold teachers and students, and the method between them.

Everything starts from random weights: the public prior already solves phantoms, and would hide what is transferred.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.data.phantoms import Anatomy, hospital_profiles, load_anatomy, tumour_classes
from fediod_med.data.sampler import PublicSampler, training_grid
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.distillation.state import DistillationState
from fediod_med.distillation.volumes import synthetic_volumes
from fediod_med.ensemble import merge, site_shares
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.labels import REGIONS, region_masks
from fediod_med.losses import teacher_divergence
from fediod_med.metrics import dice
from fediod_med.networks import Generator, build_segmenter
from fediod_med.prior import train_prior
from fediod_med.privacy.gate import Gate

CPU = torch.device("cpu")
_COHORT, _PUBLIC, _TEST = 11, 12, 13  # first digits of the seeds, so that no phantom is in two of them


@dataclass(frozen=True)
class Setup:
    """Sizes that the three experiments share.

    Attributes:
        spacing: working grid, mm.
        roi: edge of a crop and of a synthetic volume, voxels; whole heads are scored.
        width: channels of teachers, student and discriminators at full resolution.
        depth: levels of teachers and student.
        teacher_steps: optimiser steps of each teacher, batch 2.
        rate: peak learning rate of the teachers.
        public: phantoms at the centre.
        tests: held-out phantoms, dealt evenly to the scanner profiles.
        schedule: of the distillation.
    """

    spacing: float
    roi: int
    width: int
    depth: int
    teacher_steps: int
    rate: float
    public: int
    tests: int
    schedule: Schedule


@dataclass(frozen=True)
class Cohort:
    """Phantom patients in memory.

    Attributes:
        images: `(N, 4, D, H, W)` float16, z-scored.
        tissues: `(N, D, H, W)` uint8.
        profiles: scanner profile of each patient.
    """

    images: Tensor
    tissues: Tensor
    profiles: tuple[str, ...]

    def classes(self) -> Tensor:
        """Tumour classes, `(N, D, H, W)`."""
        return torch.from_numpy(tumour_classes(self.tissues.numpy()))

    def presence(self) -> Tensor:
        """`(N, 4)`: the classes that each patient shows."""
        classes = self.classes().flatten(1)
        return torch.stack([(classes == label).any(dim=1).float() for label in range(4)], dim=1)

    def part(self, index: Sequence[int]) -> Cohort:
        """Some patients."""
        chosen = list(index)
        return Cohort(self.images[chosen], self.tissues[chosen], tuple(self.profiles[i] for i in chosen))


@dataclass(frozen=True)
class PhantomHospital:
    """A hospital with its patients and its trained, frozen teacher."""

    name: str
    patients: Cohort
    teacher: nn.Module


@dataclass(frozen=True)
class Outcome:
    """What one distillation gave.

    Attributes:
        student: averaged weights, evaluation mode.
        state: final state.
        bytes_up: sent by each hospital.
        bytes_down: sent to each hospital.
    """

    student: nn.Module
    state: DistillationState
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]


def patients(per_profile: Sequence[int], *, seed: int, anatomy: Anatomy) -> Cohort:
    """Phantom patients of the five scanner profiles.

    Args:
        per_profile: patients of each of `phantoms.hospital_profiles()`, in that order; the rest have none.
        seed: of the patients.
        anatomy: on the working grid.
    """
    return _draw(per_profile, _COHORT, seed, anatomy)


def held_out_patients(count: int, *, seed: int, anatomy: Anatomy) -> Cohort:
    """Held-out phantoms: `count` in all, dealt evenly to the five profiles; none of them is in any `patients`."""
    profiles = len(hospital_profiles())
    return _draw([(count + i) // profiles for i in reversed(range(profiles))], _TEST, seed, anatomy)


def working_anatomy(setup: Setup) -> Anatomy:
    """The public anatomy on the grid that holds a whole head."""
    return load_anatomy(training_grid(setup.spacing))


def public_sampler(setup: Setup, *, seed: int, anatomy: Anatomy) -> PublicSampler:
    """The centre's own phantoms, of the simulator's public profile."""
    return PublicSampler(
        spacing=setup.spacing, roi=setup.roi, count=setup.public, seed=_seed(_PUBLIC, seed, 0), anatomy=anatomy
    )


def trained_teacher(
    patients: Cohort, setup: Setup, *, backbone: str, seed: int, keep: Path, start: nn.Module | None = None
) -> nn.Module:
    """A teacher trained from random weights on one hospital's patients, or the one kept from an interrupted run.

    Args:
        patients: of the hospital.
        setup: sizes.
        backbone: see `networks.build_segmenter`.
        seed: of weights and draws.
        keep: file for its weights.
        start: network to start from; built from `seed` when omitted.
    """
    network = fresh_network(setup, backbone=backbone, seed=seed) if start is None else copy.deepcopy(start)
    if keep.is_file():
        network.load_state_dict(load_state(keep)["network"])
        return network.eval()
    sampler = PublicSampler.of_pool(patients.images, patients.tissues, roi=setup.roi, seed=seed)
    trained = train_prior(
        network,
        [sampler],
        steps=setup.teacher_steps,
        batch=2,
        learning_rate=setup.rate,
        seed=seed,
        device=CPU,
        ema=0.98,
    )
    save_state(keep, {"network": trained.state_dict()})
    return trained


def fresh_network(setup: Setup, *, backbone: str, seed: int) -> nn.Module:
    """A segmenter of random weights that `seed` decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_segmenter(backbone, width=setup.width, depth=setup.depth)


def distilled(
    hospitals: Sequence[PhantomHospital],
    sampler: PublicSampler,
    setup: Setup,
    *,
    objective: GeneratorObjective | None,
    seed: int,
    state_dir: Path,
    on_round: Callable[[int, nn.Module], None] | None = None,
) -> Outcome:
    """One distillation into a student of random weights.

    Args:
        hospitals: with their teachers.
        sampler: the centre's phantoms.
        setup: sizes.
        objective: of the generator; without one, phantoms alone are asked about and no discriminator takes part.
        seed: of the centre and the discriminators; the student starts from the same weights for every objective.
        state_dir: for the hospitals' snapshots (none is written without a checkpoint of the centre).
        on_round: receives (round, the student in training); must not change it.
    """
    generator = None
    if objective is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            generator = Generator("conditional", size=setup.roi)
    student = fresh_network(setup, backbone="unet", seed=_seed(9, seed, 0))
    nodes = {h.name: _node(h, setup, objective, seed, state_dir) for h in hospitals}
    federation = EmbeddedFederation(nodes)
    state = distill(
        federation,
        student=student,
        generator=generator,
        sampler=sampler,
        objective=objective or replace(GeneratorObjective(), realism_weights=False),
        schedule=setup.schedule,
        size=setup.roi,
        seed=seed,
        run_id=f"experiment-{seed}",
        device=CPU,
        on_round=None if on_round is None else lambda record: on_round(int(record["round"]), student),
    )
    averaged: nn.Module = state.student_average.module.eval()
    return Outcome(averaged, state, dict(federation.bytes_up), dict(federation.bytes_down))


def class_counts(hospitals: Sequence[PhantomHospital]) -> Tensor:
    """`(K, 4)`, patients with each class at each hospital."""
    return torch.stack([h.patients.presence().sum(dim=0) for h in hospitals])


def network_dice(network: nn.Module, tests: Cohort) -> np.ndarray:
    """Dice of TC, WT and ET on whole heads, `(N, 3)`."""
    network.eval()
    return _dice([_probabilities(network, image)[0] for image in tests.images], tests)


def ensemble_dice(hospitals: Sequence[PhantomHospital], tests: Cohort) -> np.ndarray:
    """Dice of the teachers merged by class ratio, `(N, 3)`."""
    counts = class_counts(hospitals)
    merged = []
    for image in tests.images:
        answers = torch.stack([_probabilities(h.teacher.eval(), image) for h in hospitals])
        merged.append(merge(answers, counts)[0])
    return _dice(merged, tests)


def disagreement(
    hospitals: Sequence[PhantomHospital], outcome: Outcome, sampler: PublicSampler, setup: Setup, *, count: int = 8
) -> float:
    """Jensen-Shannon divergence of the teachers (nats per voxel) on the final generator's volumes, or on phantoms."""
    shares = site_shares(class_counts(hospitals))
    found = []
    for x, _ in synthetic_volumes(outcome.state, sampler=sampler, count=count, size=setup.roi, seed=1, device=CPU):
        answers = torch.stack([_probabilities(h.teacher.eval(), x) for h in hospitals])
        found.append(float(teacher_divergence(answers, shares)))
    return sum(found) / len(found)


def public_divergences(
    hospitals: Sequence[PhantomHospital],
    sampler: PublicSampler,
    divergences: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
) -> dict[str, float]:
    """Each divergence of the teachers on the same 8 public phantoms."""
    x = sampler.draw(30_000_000, 8).base
    with torch.no_grad():
        answers = torch.stack([torch.softmax(h.teacher.eval()(x).float(), dim=1) for h in hospitals])
    shares = site_shares(class_counts(hospitals))
    return {name: float(divergence(answers, shares)) for name, divergence in divergences.items()}


def dice_record(scores: np.ndarray) -> dict[str, Any]:
    """`mean`, each region, and `cases`: the mean over regions of each test patient."""
    return {
        "mean": float(scores.mean()),
        **{region: float(value) for region, value in zip(REGIONS, scores.mean(axis=0), strict=True)},
        "cases": [round(float(value), 5) for value in scores.mean(axis=1)],
    }


def _draw(per_profile: Sequence[int], kind: int, seed: int, anatomy: Anatomy) -> Cohort:
    images, tissues, names = [], [], []
    for number, (profile, count) in enumerate(zip(hospital_profiles(), per_profile, strict=False)):
        if count:
            made = PublicSampler(
                spacing=anatomy.grid.spacing,
                roi=1,
                count=count,
                seed=_seed(kind, seed, number),
                profile=profile,
                anatomy=anatomy,
            )
            x, t = made.pool()
            images.append(x)
            tissues.append(t)
            names += [profile.name] * count
    return Cohort(torch.cat(images), torch.cat(tissues), tuple(names))


def _seed(kind: int, seed: int, number: int) -> int:
    return kind * 10_000 + seed * 10 + number


def _node(
    hospital: PhantomHospital, setup: Setup, objective: GeneratorObjective | None, seed: int, state_dir: Path
) -> SiteNode:
    critic = None
    if objective is not None and objective.needs_discriminators:
        critic = PlainCritic(
            hospital.name,
            [image.float() for image in hospital.patients.images],
            state_dir=state_dir / hospital.name,
            seed=seed,
            device=CPU,
            width=setup.width,
        )
    return SiteNode(
        hospital.name,
        hospital.teacher,
        hospital.patients.presence(),
        critic=critic,
        gate=Gate.unprotected(hospital.name),
        device=CPU,
    )


def _probabilities(network: nn.Module, image: Tensor) -> Tensor:
    """`(1, 4, D, H, W)` of one volume `(4, D, H, W)`."""
    with torch.no_grad():
        return torch.softmax(network(image[None].float()).float(), dim=1)


def _dice(probs: Sequence[Tensor], tests: Cohort) -> np.ndarray:
    rows = []
    for answer, classes in zip(probs, tests.classes(), strict=True):
        found, truth = region_masks(answer.argmax(dim=0).numpy()), region_masks(classes.numpy())
        rows.append([dice(found[region], truth[region]) for region in REGIONS])
    return np.array(rows)
