"""What a distillation is asked to do: terms of the generator, rounds and rates, and which rounds ask about what."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fediod_med.data.sampler import PublicBatch, PublicSampler
from fediod_med.encodings import ENCODINGS, FP16
from fediod_med.errors import SettingsError
from fediod_med.losses import DIVERGENCES
from fediod_med.networks import Generator

HELD_OUT_EVERY = 5  # rounds: of the first half, each such one is held out to select the student by


@dataclass(frozen=True)
class GeneratorObjective:
    """Weights of the terms the generator minimises; a weight of 0 switches a term off.

    Attributes:
        gan: realism, `sum_k pi_k adv(D_k(x))`.
        clarity: `sum_k pi_k H(T_k(x))`.
        unique: subtracted divergence of the teachers; negative makes them agree, as the published code does.
        mask: `CE(q, m)`, conditional mode only.
        balance: `sum_k pi_k KL(mean T_k(x) || uniform)`, the published stand-in for `mask`.
        transfer: subtracted `KL(q || S(x))`: volumes on which the student still errs.
        divergence: of `unique`, a name in `losses.DIVERGENCES`: `jensen_shannon`, `released` (the published formula),
            `information`, `pairwise` or `features`.
        realism_weights: whether the ensemble weighs hospitals by their discriminator's confidence.
        competence: temperature of the weights by Dice on phantoms whose truth is public; 0: no such weights.
        entropy: temperature, nats, of the weights by how sure a hospital is of each voxel; 0: no such weights.
        learned: step size of weights per hospital and class that are learned on phantoms whose truth is public
            (`ensemble.learn_weights`); 0: no such weights.
    """

    gan: float = 1.0
    clarity: float = 0.05
    unique: float = 0.1
    mask: float = 0.1
    balance: float = 0.0
    transfer: float = 0.2
    divergence: str = "jensen_shannon"
    realism_weights: bool = True
    competence: float = 0.05
    entropy: float = 0.0
    learned: float = 0.0

    @property
    def needs_discriminators(self) -> bool:
        """Whether any term or weight asks the hospitals' discriminators."""
        return bool(self.gan) or self.realism_weights

    @property
    def needs_teachers(self) -> bool:
        """Whether any term of the generator asks the hospitals' teachers."""
        return any((self.clarity, self.unique, self.mask, self.balance, self.transfer))


PAPER_OBJECTIVE = GeneratorObjective(
    gan=1.0,
    clarity=1.0,
    unique=1.0,
    mask=0.0,
    balance=10.0,
    transfer=1.0,
    divergence="jensen_shannon",
    competence=0.0,
)
"""The terms and relative weights of the paper's default script, without a mask."""


@dataclass(frozen=True)
class Schedule:
    """How long, how much and how fast.

    Attributes:
        rounds: exchanges with the hospitals.
        batch: synthetic volumes a round.
        student_steps: steps on the replay buffer a round.
        student_batch: volumes a student step.
        student_rate: peak learning rate of the student's AdamW, warmed up, cosine to 0 over the run.
        generator_rate: of the generator's Adam (betas .5, .999).
        replay: pairs kept.
        ema: decay of the averaged student and generator, per step.
        phantom_share: share of rounds whose volumes are the phantoms themselves, not the generator's; spread evenly.
        truth: weight of the label map m beside the ensemble in the student's target (0: ensemble alone).
        rehearsal: share of each student batch drawn afresh from the simulator with its label map as the target; the
            pairs of the replay buffer are few, and the student would forget its prior on them.
        checkpoint_every: rounds between checkpoints.
        encoding: of the hospitals' replies, `fp16` or `compact` (`encodings`).
        mirrored: whether a hospital averages its teacher's answer over all mirror images of a volume.
        candidates: volumes drawn for each one asked about; those on which the student errs most are kept. Their truth
            is public, and the search asks nobody.
        mixup: whether the volumes of a student batch are mixed pairwise with their targets (Zhang et al. 2018, arXiv
            1710.09412, alpha 1).
        selection: whether the student is the one of several late ones that agrees best with answers kept out of the
            replay buffer (`learning.is_held_out`), instead of the last. No private data and no further answer is used.
    """

    rounds: int = 120
    batch: int = 2
    student_steps: int = 6
    student_batch: int = 2
    student_rate: float = 5e-4
    generator_rate: float = 1e-4
    replay: int = 120
    ema: float = 0.99
    phantom_share: float = 0.5
    truth: float = 0.0
    rehearsal: float = 0.5
    checkpoint_every: int = 25
    encoding: str = FP16
    mirrored: bool = False
    candidates: int = 1
    mixup: bool = False
    selection: bool = False


def generator_rounds(schedule: Schedule) -> int:
    """Rounds that ask about the generator's volumes, and so need a pull-back, where there is a public sampler."""
    return schedule.rounds - math.floor(schedule.rounds * schedule.phantom_share)


def asking_rounds(schedule: Schedule, *, public: bool) -> tuple[int, ...]:
    """Numbers of the rounds that ask about the generator's volumes, counted from 1.

    Args:
        schedule: of a run with a generator.
        public: whether there is a public sampler, and so rounds that ask about phantoms.
    """
    share = schedule.phantom_share if public else 0.0
    return tuple(number for number in range(1, schedule.rounds + 1) if not _falls_on_phantoms(number, share))


def snapshot_rounds(schedule: Schedule, *, generator: bool, public: bool) -> tuple[int, ...]:
    """Rounds handed to `on_snapshot`: of `asking_rounds` the first, quarters and last; none without a generator."""
    asked = asking_rounds(schedule, public=public) if generator else ()
    return tuple(sorted({asked[round((len(asked) - 1) * quarter / 4)] for quarter in range(5)})) if asked else ()


def _falls_on_phantoms(number: int, share: float) -> bool:
    return math.floor(number * share) > math.floor((number - 1) * share)


def is_phantom_round(number: int, public: PublicBatch | None, share: float) -> bool:
    """Whether round `number` belongs to the evenly spread share of rounds without the generator."""
    return public is not None and _falls_on_phantoms(number, share)


def check_settings(
    generator: Generator | None, sampler: PublicSampler | None, objective: GeneratorObjective, schedule: Schedule
) -> None:
    """Refuse, as `SettingsError`, a generator, sampler, objective and schedule that do not fit together."""
    if min(schedule.batch, schedule.replay, schedule.checkpoint_every, schedule.candidates) < 1:
        raise SettingsError(
            f"distillation: expected batch, replay, checkpoint_every and candidates of 1 or more, found {schedule}"
        )
    if min(objective.entropy, objective.learned) < 0:
        raise SettingsError(
            f"distillation: expected an entropy temperature and a learned step of 0 or more, found {objective.entropy} "
            f"and {objective.learned}"
        )
    if schedule.rehearsal < 0 or round(schedule.rehearsal * schedule.student_batch) >= schedule.student_batch:
        raise SettingsError(
            f"distillation: expected a rehearsal that leaves at least one of {schedule.student_batch} volumes of a "
            f"batch to the replay buffer, found {schedule.rehearsal}"
        )
    if schedule.selection and schedule.rounds < 2 * HELD_OUT_EVERY:
        raise SettingsError(
            f"distillation: expected {2 * HELD_OUT_EVERY} rounds or more with selection, so that an answer is held "
            f"out, found {schedule.rounds}; raise the rounds, or leave selection out"
        )
    if schedule.encoding not in ENCODINGS:
        raise SettingsError(f"distillation: expected encoding {' or '.join(ENCODINGS)}, found {schedule.encoding!r}")
    if not 0 <= schedule.phantom_share <= 1:
        raise SettingsError(f"distillation: expected a phantom_share of 0 to 1, found {schedule.phantom_share}")
    conditional = generator is not None and generator.mode == "conditional"
    if sampler is None and (generator is None or conditional):
        raise SettingsError("distillation: without a public sampler the generator must be unconditional")
    if generator is not None and not conditional and objective.mask:
        raise SettingsError("distillation: an unconditional generator has no mask; set mask=0 and balance > 0")
    if objective.divergence not in DIVERGENCES:
        raise SettingsError(
            f"distillation: expected divergence {', '.join(DIVERGENCES)}, found {objective.divergence!r}"
        )
