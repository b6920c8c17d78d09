"""The distilled rows: what each one asks, and how its student is trained."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.transforms import GaussianSmooth, SpatialPad
from torch import Tensor, nn

from fediod_med.comparison.ensembles import ENTROPY_TEMPERATURE
from fediod_med.comparison.profiles import Profile
from fediod_med.comparison.rows import DISTILLED, IN_GENERATIONS, OURS, WITH, WITHOUT
from fediod_med.data.sampler import PublicBatch, PublicSampler, pad_to
from fediod_med.distillation.learning import REHEARSAL_DRAWS
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import HELD_OUT_EVERY, PAPER_OBJECTIVE, GeneratorObjective, Schedule
from fediod_med.encodings import FP16
from fediod_med.errors import SettingsError
from fediod_med.federation.critic_design import CriticDesign
from fediod_med.hospitals import Hospital, open_federation
from fediod_med.networks import STUDENT, Generator, build_segmenter
from fediod_med.teacher import warm_start

NOISE_VOLUMES = 64
NOISE_SMOOTHING = 2.0  # voxels
LEARNED_STEP = 2.0  # over 30 phantom rounds weights can then part about as far as those by Dice on phantoms
GENERATIONS = 3
# Gamma of the gradient penalty, per value of a patch. StyleGAN2-ADA (Karras et al. 2020, arXiv 2006.06676) takes .0002
# times the pixels of an image over the batch, for a judge that rates images differing everywhere is the flatter, the
# more values they have. Here per value, of three a pixel there; over a batch of 2 real patches; and halved, as the loss
# here is the mean of the synthetic and the real half, there their sum. Patches of 4 x 48^3 values get 7.4.
PENALTY_PER_VALUE = 0.0002 / 3 / 2 / 2


@dataclass(frozen=True)
class Recipe:
    """A distilled row.

    Attributes:
        objective: terms of the generator and of the ensemble's weights.
        schedule: rounds, steps and rates.
        generator: `conditional`, `unconditional`, or none.
        volumes: `phantoms`, `noise` or `scans` (the hospitals' own), what the centre asks about.
        teachers: whether the hospitals' teachers are asked.
        generations: how often teachers are trained; see `generations.distil_generations`.
        critic: design of the hospitals' discriminators.
    """

    objective: GeneratorObjective
    schedule: Schedule
    generator: str | None = "conditional"
    volumes: str = "phantoms"
    teachers: bool = True
    generations: int = 1
    critic: CriticDesign = field(default_factory=CriticDesign)


@dataclass(frozen=True)
class Distilled:
    """A trained student and what it cost.

    Attributes:
        student: averaged weights of the last step.
        bytes_down: from the centre, by site.
        bytes_up: to the centre, by site.
    """

    student: nn.Module
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]


def recipe(key: str, profile: Profile) -> Recipe:
    """What a distilled row is; `ours` is the defaults of `distillation`, whatever they are, at the profile's length.

    Every row has the same rounds, student steps and student batch. AsynDGAN (Chang et al., CVPR 2020): the
    generator obeys the discriminators alone and the student learns (x, m). FedIOD as published: noise alone,
    class-ratio weights, no phantoms; JS with the released sign and formula, or with the sign of the paper's words.

    Raises:
        SettingsError: the row is not a distilled one.
    """
    schedule = dataclasses.replace(Schedule(), rounds=profile.rounds, student_steps=profile.student_steps)
    ours = Recipe(GeneratorObjective(), schedule)
    if key == OURS:
        return ours
    if key == "kd_phantoms":
        return dataclasses.replace(ours, generator=None)
    if key in IN_GENERATIONS:
        single = recipe(OURS if key == "ours_generations" else "kd_phantoms", profile)
        return dataclasses.replace(single, generations=min(GENERATIONS, profile.rounds))
    if key == "kd_real":  # teachers know these scans by heart, so their Dice on them says nothing
        objective = dataclasses.replace(ours.objective, competence=0.0)
        return dataclasses.replace(ours, objective=objective, generator=None, volumes="scans")
    bare = dataclasses.replace(schedule, rehearsal=0.0, truth=0.0)
    if key == "kd_noise":
        return Recipe(dataclasses.replace(GeneratorObjective(), competence=0.0), bare, generator=None, volumes="noise")
    if key == "asyndgan":
        objective = dataclasses.replace(_only_realism(), realism_weights=False, competence=0.0)
        schedule = dataclasses.replace(bare, truth=1.0, phantom_share=0.0, encoding=FP16)
        return Recipe(objective, schedule, teachers=False)
    if key in ("fediod_js_plus", "fediod_js_minus"):
        released = key == "fediod_js_plus"
        weight = abs(PAPER_OBJECTIVE.unique)
        objective = dataclasses.replace(
            PAPER_OBJECTIVE,
            unique=-weight if released else weight,
            divergence="released" if released else "jensen_shannon",
            realism_weights=False,
        )
        return Recipe(objective, dataclasses.replace(bare, phantom_share=0.0), generator="unconditional")
    if key in DISTILLED and key.startswith(WITHOUT):
        return _without(ours, key.removeprefix(WITHOUT))
    if key in DISTILLED and key.startswith(WITH):
        return _with(ours, key.removeprefix(WITH), values=4 * profile.roi**3)
    raise SettingsError(f"row {key}: expected a distilled one")


def distil_row(
    row: Recipe,
    hospitals: Sequence[Hospital],
    sampler: PublicSampler,
    *,
    key: str,
    roi: int,
    seed: int,
    device: torch.device,
    start: nn.Module | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> Distilled:
    """Train the student of one row.

    Args:
        row: see `recipe`.
        hospitals: with their trained teachers.
        sampler: phantoms.
        key: of the row, letters, digits, dashes and underscores.
        roi: edge of a synthetic volume, voxels.
        seed: of everything at the centre and of the discriminators.
        device: where centre and hospitals compute.
        start: what the student starts from; the public prior when omitted.
        on_round: receives (round, rounds).
    """
    if not row.teachers:
        hospitals = [dataclasses.replace(hospital, teacher=SilentTeacher()) for hospital in hospitals]
    torch.manual_seed(seed)
    generator = None if row.generator is None else Generator(row.generator, size=roi)
    torch.manual_seed(seed)
    student = build_segmenter(**STUDENT)
    if start is None:
        student = warm_start(student, init="auto", spec=STUDENT)
    else:
        student.load_state_dict(start.state_dict())
    run_id = f"compare-{seed}-{key}".replace("_", "-")

    def report(record: Any) -> None:
        if on_round is not None:
            on_round(int(record["round"]), row.schedule.rounds)

    with tempfile.TemporaryDirectory() as folder:
        federation = open_federation(
            hospitals,
            out=Path(folder),
            seed=seed,
            run_id=run_id,
            device=device,
            adversarial=generator is not None and row.objective.needs_discriminators,
            design=row.critic,
        )
        state = distill(
            federation,
            student=student,
            generator=generator,
            sampler=_volumes(row, sampler, hospitals, roi=roi, seed=seed),
            objective=row.objective,
            schedule=row.schedule,
            size=roi,
            seed=seed,
            run_id=run_id,
            device=device,
            on_round=report,
        )
    up = dict(federation.bytes_up)
    if not row.teachers:  # a hospital without a teacher would not send the placeholder's probabilities
        placeholder = row.schedule.rounds * row.schedule.batch * SilentTeacher.classes * roi**3 * torch.half.itemsize
        up = {site: max(0, sent - placeholder) for site, sent in up.items()}
    return Distilled(state.student_average.module.eval(), dict(federation.bytes_down), up)


class SilentTeacher(nn.Module):
    """Stands in for a teacher that is not asked: equal logits whatever the volume, `(B, 4, D, H, W)` to the same."""

    classes = 4

    def forward(self, x: Tensor) -> Tensor:
        """No opinion."""
        return torch.zeros_like(x[:, : self.classes])


def noise_sampler(*, roi: int, seed: int) -> PublicSampler:
    """A pool of smooth Gaussian noise, z-scored per channel, with nothing in it that resembles a brain."""
    random = torch.Generator().manual_seed(seed)
    smooth = GaussianSmooth(NOISE_SMOOTHING)
    images = []
    for _ in range(NOISE_VOLUMES):
        volume = torch.as_tensor(smooth(torch.randn((4, roi, roi, roi), generator=random)))
        axes = (1, 2, 3)
        images.append((volume - volume.mean(axes, keepdim=True)) / volume.std(axes, keepdim=True))
    tissues = torch.zeros((NOISE_VOLUMES, roi, roi, roi), dtype=torch.uint8)
    return PublicSampler.of_pool(torch.stack(images), tissues, roi=roi, seed=seed)


class ScansThenPhantoms(PublicSampler):
    """Rounds draw from scans, rehearsal from phantoms: the ceiling, as no centre may have it. See `scan_sampler`."""

    phantoms: PublicSampler

    def draw(self, step: int, batch: int) -> PublicBatch:
        """Scans for a round, phantoms for the student's rehearsal."""
        return self.phantoms.draw(step, batch) if step >= REHEARSAL_DRAWS else super().draw(step, batch)


def scan_sampler(hospitals: Sequence[Hospital], phantoms: PublicSampler, *, roi: int, seed: int) -> ScansThenPhantoms:
    """A sampler over all hospitals' training scans, padded to one size; their label maps are not looked at."""
    scans = [pad_to(torch.as_tensor(volume).half(), roi) for h in hospitals for p in h.patients for volume in p]
    edges = [max(scan.shape[axis] for scan in scans) for axis in (1, 2, 3)]
    images = torch.stack([torch.as_tensor(SpatialPad(edges)(scan)) for scan in scans])
    tissues = torch.zeros((len(images), *edges), dtype=torch.uint8)
    sampler = ScansThenPhantoms.of_pool(images, tissues, roi=roi, seed=seed)
    sampler.phantoms = phantoms
    return sampler


def _volumes(
    row: Recipe, sampler: PublicSampler, hospitals: Sequence[Hospital], *, roi: int, seed: int
) -> PublicSampler | None:
    if row.generator == "unconditional":
        return None
    if row.volumes == "scans":
        return scan_sampler(hospitals, sampler, roi=roi, seed=seed)
    return noise_sampler(roi=roi, seed=seed) if row.volumes == "noise" else sampler


def _only_realism() -> GeneratorObjective:
    return dataclasses.replace(GeneratorObjective(), clarity=0.0, unique=0.0, mask=0.0, balance=0.0, transfer=0.0)


def _without(ours: Recipe, part: str) -> Recipe:
    """`ours` with one part switched off."""
    if part in ("gan", "clarity", "unique", "mask", "transfer", "competence"):
        off: dict[str, Any] = {part: 0.0}
        return dataclasses.replace(ours, objective=dataclasses.replace(ours.objective, **off))
    if part == "realism":
        return dataclasses.replace(ours, objective=dataclasses.replace(ours.objective, realism_weights=False))
    changed: dict[str, Any] = {
        "rehearsal": {"rehearsal": 0.0},
        "phantoms": {"phantom_share": 0.0},
    }
    return dataclasses.replace(ours, schedule=dataclasses.replace(ours.schedule, **changed[part]))


def _with(ours: Recipe, part: str, *, values: int) -> Recipe:
    """`ours` with one part added; each at one setting, fixed before any score of it was seen.

    `values` are those of one patch, over all sequences and voxels.
    """
    critics = {
        "scales": CriticDesign(scales=2),
        "augment": CriticDesign(augment=True),
        "penalty": CriticDesign(penalty=PENALTY_PER_VALUE * values),
        "spectral": CriticDesign(spectral=True),
        "joint": CriticDesign(joint=True),
    }
    if part in critics:
        return dataclasses.replace(ours, critic=critics[part])
    terms: dict[str, Any] = {
        "entropy": {"entropy": ENTROPY_TEMPERATURE},
        "learned": {"learned": LEARNED_STEP, "competence": 0.0},
    }
    if part in terms:
        return dataclasses.replace(ours, objective=dataclasses.replace(ours.objective, **terms[part]))
    changed: dict[str, Any] = {
        "mirrors": {"mirrored": True},
        "search": {"candidates": 4},
        "mixup": {"mixup": True},
        "selection": {"selection": ours.schedule.rounds >= 2 * HELD_OUT_EVERY},  # a smoke run is shorter
        "rounds": {"rounds": ours.schedule.rounds * ours.schedule.student_steps, "student_steps": 1},
    }
    return dataclasses.replace(ours, schedule=dataclasses.replace(ours.schedule, **changed[part]))
