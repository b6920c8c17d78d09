"""The method: a generator asks, the hospitals answer, a student learns (FedIOD, arXiv 2312.14478, made volumetric).

The same loop teaches a classifier on images: its teachers answer `(B, C)` where a segmenter answers `(B, C, D, H, W)`.

`distill` reads like the algorithm and knows the hospitals only through `protocol.Federation`. Each round:

1. x = G(z, m), m a label map from the public simulator (or x = G(z), or the phantom itself without a generator);
2. the hospitals answer: class probabilities, realism, the discriminator's gradient;
3. the ensemble q is merged and the generator's objective differentiated up to the teachers' logits;
4. the hospitals pull those gradients back to x, and G takes one step;
5. (x, q, m) enters the replay buffer, on which the student takes its steps; they cost no traffic.

Every random draw is a function of (seed, round), so a resumed run equals an uninterrupted one.

Several processes share the networks' work (`parallel`): each makes and learns from its share of a batch. All run this
loop with the same numbers; only the first asks, keeps and reports.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.data.sampler import PublicBatch, PublicSampler, upright
from fediod_med.data.transforms import flip_together, jitter, mix_pairs
from fediod_med.devices import autocast_over
from fediod_med.encodings import ENCODINGS, FP16
from fediod_med.ensemble import competence_weights, merge, public_dice, site_shares
from fediod_med.errors import ProtocolError, SettingsError, WeightsError
from fediod_med.losses import (
    DIVERGENCES,
    class_balance,
    mask_cross_entropy,
    prediction_entropy,
    soft_dice,
    transfer_divergence,
)
from fediod_med.networks import Generator, one_hot
from fediod_med.parallel import ALONE, Workers
from fediod_med.protocol import Federation, Query, Reply, Setting, SiteFailure
from fediod_med.snapshots import Snapshot, take_snapshot

logger = logging.getLogger(__name__)

CLASSES = 4
TISSUES = 7
COMPETENCE_MEMORY = 0.9
REHEARSAL_DRAWS = 20_000_000  # the sampler's draws from here on are the student's own; rounds count from 1


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


@dataclass
class DistillationState:
    """Everything that changes during a run; saved and restored as one."""

    student: nn.Module
    student_average: AveragedModel
    student_optimizer: torch.optim.Optimizer
    generator: Generator | None
    generator_average: AveragedModel | None
    generator_optimizer: torch.optim.Optimizer | None
    replay: deque[dict[str, Tensor]]
    counts: Tensor | None = None
    dice: Tensor | None = None  # (K, C), running mean of the teachers' Dice on phantoms
    round: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        state: dict[str, Any] = {
            "student": self.student.state_dict(),
            "student_average": self.student_average.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "replay": list(self.replay),
            "counts": self.counts,
            "dice": self.dice,
            "round": self.round,
            "history": self.history,
        }
        if self.generator is not None and self.generator_average is not None and self.generator_optimizer is not None:
            state["generator"] = self.generator.state_dict()
            state["generator_average"] = self.generator_average.state_dict()
            state["generator_optimizer"] = self.generator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; `WeightsError` when it stems from other networks."""
        if ("generator" in state) != (self.generator is not None):
            raise WeightsError("checkpoint: one of the runs has a generator, the other has none")
        try:
            self._load(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise WeightsError(f"checkpoint: does not fit these networks ({str(error).splitlines()[-1]})") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.student_average.load_state_dict(state["student_average"])
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        if self.generator is not None and self.generator_average is not None and self.generator_optimizer is not None:
            self.generator.load_state_dict(state["generator"])
            self.generator_average.load_state_dict(state["generator_average"])
            self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.replay.clear()
        self.replay.extend(state["replay"])
        self.counts = state["counts"]
        self.dice = state["dice"]
        self.round = state["round"]
        self.history = state["history"]


def distill(
    federation: Federation | None,
    *,
    student: nn.Module,
    generator: Generator | None,
    sampler: PublicSampler | None,
    objective: GeneratorObjective,
    schedule: Schedule,
    size: int,
    seed: int,
    run_id: str,
    device: torch.device,
    checkpoint: Path | None = None,
    resume: bool = False,
    quorum: int | None = None,
    timeout_s: float = 600.0,
    on_round: Callable[[Mapping[str, float]], None] | None = None,
    on_snapshot: Callable[[Snapshot], object] | None = None,
    workers: Workers = ALONE,
) -> DistillationState:
    """Train the student (and the generator) against the hospitals.

    Args:
        federation: the hospitals; of several processes, the first has them and the others give `None`.
        student: starts from the weights it comes with (the public prior, usually).
        generator: `None` distils on the sampler's phantoms alone.
        sampler: public label maps and phantoms; may be `None` only with an unconditional generator.
        objective: terms of the generator.
        schedule: rounds, steps and rates.
        size: edge of a synthetic volume, voxels.
        seed: of every draw at the centre.
        run_id: letters, digits and dashes; the hospitals key their state by it.
        device: where the centre computes.
        checkpoint: file for resumable state; none is written when omitted.
        resume: continue from `checkpoint` if it exists.
        quorum: good replies a round needs; all hospitals when omitted. The class counts at the start need all.
        timeout_s: per trip.
        on_round: receives each round's record.
        on_snapshot: receives the volumes and answers of `snapshot_rounds`, before the round is saved, so that a resumed
            run leaves none out. Nothing more is asked of a hospital for it.
        workers: the processes of this run. Each calls `distill` with the same settings and its own device; weights and
            checkpoint are the first's, and `checkpoint`, `on_round` and `on_snapshot` of the others are not used. The
            result is that of one process up to rounding, and a run may be resumed with another number of processes.

    Returns:
        The final state, on every process; `student_average.module` is the distilled student.

    Raises:
        SettingsError: generator, sampler, objective, schedule, quorum and number of processes do not fit together.
        ProtocolError: fewer good replies than the quorum.
        WeightsError: the checkpoint is damaged or stems from other networks.
        WorkerError: another process of this run ended.
    """
    _check(generator, sampler, objective, schedule)
    workers.require(schedule.student_batch, option="--student-batch")
    sites = workers.led(partial(_site_names, federation))
    everyone = len(sites)
    needed = everyone if quorum is None else quorum
    if not 1 <= needed <= everyone:
        raise SettingsError(f"distillation: expected a quorum of 1 to {everyone} hospitals, found {needed}")
    if generator is not None and generator.mode == "unconditional":
        sampler = None  # its label maps would describe other volumes than the generated ones
    state = _begin(student, generator, schedule, device)
    first = workers.led(partial(_resumed, state, checkpoint if resume else None))
    if not workers.lead:
        state.load_state_dict(first)
    ask = partial(_Hospitals, federation, sites, workers, run_id=run_id, timeout_s=timeout_s)
    hospitals = ask(quorum=needed, encoding=schedule.encoding)
    if state.counts is None:
        described = ask(quorum=everyone).ask("describe", 0, {})
        state.counts = torch.stack([described[site]["class_counts"] for site in sites])

    kept = snapshot_rounds(schedule, generator=generator is not None, public=sampler is not None)
    while state.round < schedule.rounds:
        number = state.round + 1
        random = torch.Generator().manual_seed(seed * 1_000_003 + number)
        drawn = None if sampler is None else sampler.draw(number, schedule.batch * schedule.candidates)
        kept_volumes = None if drawn is None else _hardest(state.student, drawn, schedule, device, workers)
        public = None if drawn is None or kept_volumes is None else drawn.some(kept_volumes)
        at_checkpoint = number % schedule.checkpoint_every == 0 or number == schedule.rounds

        asking = None if _is_phantom_round(number, public, schedule.phantom_share) else state.generator
        made = _synthesise(asking, public, schedule.batch, size, random, device, workers.share(schedule.batch))
        x = workers.gather(made, schedule.batch, device)
        answers = hospitals.ask(
            "answer",
            number,
            {"x": x},
            adversarial=generator is not None and objective.needs_discriminators,
            differentiate=asking is not None and objective.needs_teachers,
            mirrored=schedule.mirrored,
            snapshot=at_checkpoint and checkpoint is not None,
            rounds=schedule.rounds,
        )
        probs, realism, counts = _stack(answers, sites, state.counts, device)
        record: dict[str, float] = {"round": number, "sites": len(answers)}
        present = [index for index, site in enumerate(sites) if site in answers]
        if asking is None and public is not None:
            _learn_competence(state, probs, public, present, everyone)
        weigh = partial(
            merge,
            counts=counts,
            realism=realism if objective.realism_weights else None,
            competence=_competence(state, objective, present),
            entropy_temperature=objective.entropy or None,
        )
        if asking is None:
            q = weigh(probs)
        else:
            q, terms = _generator_step(
                state, hospitals, answers, x, made, probs, realism, counts, public, objective, number, weigh, workers
            )
            record |= terms
        if workers.lead and on_snapshot is not None and number in kept:
            by_site = dict(zip((sites[index] for index in present), probs, strict=True))
            on_snapshot(take_snapshot(number, x, by_site, q, _guess(state.student, x), public))
        state.replay.append(_pair(x, q, public, kept_volumes))
        record |= _student_steps(state, schedule, number, sampler, random, device, workers)
        state.history.append(record)
        state.round = number
        if workers.lead and at_checkpoint and checkpoint is not None:
            save_state(checkpoint, state.state_dict())
        if workers.lead and on_round is not None:
            on_round(record)
    return state


def _site_names(federation: Federation | None) -> list[str]:
    if federation is None:
        raise SettingsError("distillation: expected the hospitals at the first process, found none")
    return list(federation.site_names)


def _resumed(state: DistillationState, checkpoint: Path | None) -> dict[str, Any]:
    """Continue from a checkpoint, if there is one; gives what the state then holds."""
    if checkpoint is not None and checkpoint.is_file():
        try:
            state.load_state_dict(load_state(checkpoint))
        except WeightsError as error:
            raise WeightsError(f"{checkpoint}: {error}; resume with the settings the run was started with") from error
        logger.info("resumed after round %d", state.round)
    return state.state_dict()


class _Hospitals:
    """Asks the federation and keeps only good replies; a shortfall of the quorum is an error.

    Of several processes the first asks; all get the replies.
    """

    def __init__(
        self,
        federation: Federation | None,
        sites: Sequence[str],
        workers: Workers,
        *,
        run_id: str,
        quorum: int,
        timeout_s: float,
        encoding: str = FP16,
    ) -> None:
        self._federation = federation
        self._sites = sites
        self._workers = workers
        self._encoding = encoding
        self._run_id = run_id
        self._quorum = quorum
        self._timeout_s = timeout_s

    def ask(
        self, kind: str, number: int, tensors: Mapping[str, Tensor], **settings: Setting
    ) -> dict[str, Mapping[str, Tensor]]:
        """The same query to every hospital."""
        query = Query(kind, self._run_id, number, tensors, {"encoding": self._encoding, **settings})
        return self.ask_each(dict.fromkeys(self._sites, query))

    def pull_back(self, number: int, gradients: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """Each hospital's own logit gradient, back to x."""
        return self.ask_each(
            {
                site: Query(
                    "pull_back", self._run_id, number, {"logit_gradient": gradient}, {"encoding": self._encoding}
                )
                for site, gradient in gradients.items()
            }
        )

    def ask_each(self, queries: Mapping[str, Query]) -> dict[str, Mapping[str, Tensor]]:
        return self._workers.led(partial(self._good_replies, queries))

    def _good_replies(self, queries: Mapping[str, Query]) -> dict[str, Mapping[str, Tensor]]:
        assert self._federation is not None  # checked at the start of `distill`
        outcome = self._federation.ask(queries, quorum=self._quorum, timeout_s=self._timeout_s)
        good = {
            site: reply.tensors
            for site, query in queries.items()
            if isinstance(reply := outcome.get(site), Reply)
            and (reply.kind, reply.site, reply.round) == (query.kind, site, query.round)
        }
        if len(good) < min(self._quorum, len(queries)):
            reasons = {f.site: f.reason for f in outcome.values() if isinstance(f, SiteFailure)}
            failures = [f"{site} ({reasons.get(site, 'no fitting reply')})" for site in queries if site not in good]
            kind = next(iter(queries.values())).kind
            raise ProtocolError(
                f"{kind}: expected replies from {self._quorum} hospitals, found {len(good)}; failed: "
                f"{', '.join(failures)}; see their logs and resume"
            )
        return good


def _check(
    generator: Generator | None, sampler: PublicSampler | None, objective: GeneratorObjective, schedule: Schedule
) -> None:
    if min(schedule.batch, schedule.replay, schedule.checkpoint_every, schedule.candidates) < 1:
        raise SettingsError(
            f"distillation: expected batch, replay, checkpoint_every and candidates of 1 or more, found {schedule}"
        )
    if objective.entropy < 0:
        raise SettingsError(f"distillation: expected an entropy temperature of 0 or more, found {objective.entropy}")
    if schedule.rehearsal < 0 or round(schedule.rehearsal * schedule.student_batch) >= schedule.student_batch:
        raise SettingsError(
            f"distillation: expected a rehearsal that leaves at least one of {schedule.student_batch} volumes of a "
            f"batch to the replay buffer, found {schedule.rehearsal}"
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


def _is_phantom_round(number: int, public: PublicBatch | None, share: float) -> bool:
    """Whether round `number` belongs to the evenly spread share of rounds without the generator."""
    return public is not None and _falls_on_phantoms(number, share)


def _falls_on_phantoms(number: int, share: float) -> bool:
    return math.floor(number * share) > math.floor((number - 1) * share)


def _begin(
    student: nn.Module, generator: Generator | None, schedule: Schedule, device: torch.device
) -> DistillationState:
    student = student.to(device).train()
    average = get_ema_multi_avg_fn(schedule.ema)
    state = DistillationState(
        student=student,
        student_average=AveragedModel(student, multi_avg_fn=average),
        student_optimizer=torch.optim.AdamW(student.parameters(), lr=schedule.student_rate, weight_decay=1e-4),
        generator=None,
        generator_average=None,
        generator_optimizer=None,
        replay=deque(maxlen=schedule.replay),
    )
    if generator is not None:
        generator = generator.to(device).train()
        state.generator = generator
        # A generator takes few steps: an average that begins slow would still be the generator it started from.
        state.generator_average = AveragedModel(generator, avg_fn=partial(warmed_average, decay=schedule.ema))
        state.generator_optimizer = torch.optim.Adam(
            generator.parameters(), lr=schedule.generator_rate, betas=(0.5, 0.999)
        )
    return state


def warmed_average(average: Tensor, now: Tensor, steps: Tensor | int, *, decay: float) -> Tensor:
    """Exponential average whose decay after n steps is `min(decay, (1 + n) / (10 + n))`: it forgets the start."""
    n = torch.as_tensor(steps).double()  # read by no one, so a GPU need not wait
    return average + (now - average) * (1 - ((1 + n) / (10 + n)).clamp(max=decay)).to(now)


def _hardest(
    student: nn.Module, drawn: PublicBatch, schedule: Schedule, device: torch.device, workers: Workers
) -> list[int]:
    """Which volumes of the public ones drawn a round asks about: those with the student's lowest Dice.

    Dice of the tumour classes, see `ensemble.public_dice`, on the phantom itself.
    """
    if schedule.candidates == 1:
        return list(range(schedule.batch))
    own = workers.share(len(drawn.base))
    part = _guess(student, drawn.base[own].to(device)) if own.start < own.stop else None
    guess = workers.gather(part, len(drawn.base), device).cpu()
    dice = [public_dice(g[None, None], t[None])[0, 1:].mean() for g, t in zip(guess, drawn.classes, strict=True)]
    return torch.stack(dice).argsort(stable=True)[: schedule.batch].tolist()


def _synthesise(
    generator: nn.Module | None,
    public: PublicBatch | None,
    batch: int,
    size: int,
    random: torch.Generator,
    device: torch.device,
    own: slice,
) -> Tensor | None:
    """`x = G(z, m)`, `x = G(z)` or the phantom itself: of a batch the volumes `own`, `(B, 4, size, size, size)`.

    Random numbers are drawn for the whole batch, so that they do not depend on the share. `None` for an empty share.
    """
    z = texture = None
    if generator is not None:
        z = torch.randn((batch, int(getattr(generator, "latent"))), generator=random)  # noqa: B009
        if getattr(generator, "mode") == "unconditional":  # noqa: B009
            public = None
        if public is not None:
            texture = torch.randn((batch, 1, size, size, size), generator=random)
    if own.start >= own.stop:
        return None
    base = None if public is None else public.base[own].to(device)
    if generator is None or z is None:
        assert base is not None  # checked at the start of `distill`
        return base
    with autocast_over(device, (size, size, size)):
        if public is None or texture is None:
            x: Tensor = generator(z[own].to(device))
        else:
            labels = one_hot(public.tissues[own].to(device), TISSUES)
            x = generator(z[own].to(device), labels, base, texture[own].to(device))
    return x.float()


def _stack(
    answers: Mapping[str, Mapping[str, Tensor]], sites: Sequence[str], counts: Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Probabilities `(K, B, C, D, H, W)` renormalised after fp16, realism `(K, B)` if any, counts `(K, C)`."""
    present = [site for site in sites if site in answers]
    probs = torch.stack([answers[site]["probs"] for site in present]).to(device)
    probs = probs / probs.sum(dim=2, keepdim=True)
    with_realism = all("realism" in answers[site] for site in present)
    realism = torch.stack([answers[site]["realism"] for site in present]).to(device) if with_realism else None
    return probs, realism, counts[[sites.index(site) for site in present]].to(device)


def _learn_competence(
    state: DistillationState, probs: Tensor, public: PublicBatch, present: list[int], everyone: int
) -> None:
    """Running mean of each answering hospital's Dice on phantoms; a hospital's first answer counts in full."""
    found = public_dice(probs, public.classes.to(probs.device)).cpu()
    if state.dice is None:
        state.dice = torch.full((everyone, probs.shape[2]), float("nan"))
    before = state.dice[present]
    state.dice[present] = torch.where(
        before.isnan(), found, COMPETENCE_MEMORY * before + (1 - COMPETENCE_MEMORY) * found
    )


def _competence(state: DistillationState, objective: GeneratorObjective, present: list[int]) -> Tensor | None:
    """Weights `(K, C)` of the answering hospitals; none before each of them has answered about a phantom."""
    if not objective.competence or state.dice is None or bool(state.dice[present].isnan().any()):
        return None
    return competence_weights(state.dice[present], objective.competence)


def _generator_step(
    state: DistillationState,
    hospitals: _Hospitals,
    answers: Mapping[str, Mapping[str, Tensor]],
    x: Tensor,
    made: Tensor | None,
    probs: Tensor,
    realism: Tensor | None,
    counts: Tensor,
    public: PublicBatch | None,
    objective: GeneratorObjective,
    number: int,
    weigh: Callable[[Tensor], Tensor],
    workers: Workers,
) -> tuple[Tensor, dict[str, float]]:
    """One step of G; returns the ensemble `(B, C, D, H, W)` and the value of each term.

    `x` is the whole batch, `made` this process's share of it with the graph that made it. `weigh` merges
    `(K, B, C, D, H, W)` into the ensemble, as in the rounds without G.
    """
    generator, optimizer, average = state.generator, state.generator_optimizer, state.generator_average
    assert generator is not None and optimizer is not None and average is not None  # noqa: PT018
    shares = site_shares(counts, dense=probs.dim() > 3)
    leaves = probs.requires_grad_(True)
    own = workers.share(len(x))
    leaf_x = x[own].detach().requires_grad_(True)
    guess, logits = None, None  # of the student: this process's share, and of the whole batch
    q = weigh(leaves)

    terms = {"clarity": (shares * torch.stack([prediction_entropy(p) for p in leaves])).sum()}
    terms["unique"] = DIVERGENCES[objective.divergence](leaves, shares)
    if objective.mask and public is not None:
        terms["mask"] = mask_cross_entropy(q, public.classes.to(x.device))
    if objective.balance:
        uniform = torch.full((probs.shape[2],), 1 / probs.shape[2], device=x.device)
        terms["balance"] = (shares * torch.stack([class_balance(p, uniform) for p in leaves])).sum()
    if objective.transfer:
        if made is not None:
            with autocast_over(leaf_x.device, leaf_x.shape[2:]):
                guess = state.student(leaf_x).float()
        logits = workers.gather(guess, len(x), x.device).requires_grad_(True)
        terms["transfer"] = transfer_divergence(q, logits)

    loss = (
        objective.clarity * terms["clarity"]
        - objective.unique * terms["unique"]
        + objective.mask * terms.get("mask", q.new_zeros(()))
        + objective.balance * terms.get("balance", q.new_zeros(()))
        - objective.transfer * terms.get("transfer", q.new_zeros(()))
    )
    probs_gradient, *rest = torch.autograd.grad(
        loss, [leaves] if logits is None else [leaves, logits], allow_unused=True
    )
    total = torch.zeros_like(leaf_x)
    if guess is not None:
        (total,) = torch.autograd.grad(guess, leaf_x, grad_outputs=rest[0][own])

    present = list(answers)
    if objective.needs_teachers:
        logit_gradients = {
            site: softmax_pull_back(p.detach(), g) for site, p, g in zip(present, probs, probs_gradient, strict=True)
        }
        for pulled in hospitals.pull_back(number, logit_gradients).values():
            total = total + pulled["x_gradient"][own].to(x.device)
    if objective.gan:
        for site, share in zip(present, shares, strict=True):
            total = total + objective.gan * share * answers[site]["x_gradient"][own].to(x.device)

    optimizer.zero_grad(set_to_none=True)
    if made is not None:
        made.backward(gradient=total)
    workers.sum_gradients(generator)
    nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
    optimizer.step()
    average.update_parameters(generator)
    values = {name: float(term.detach()) for name, term in terms.items()}
    if realism is not None:
        values["realism"] = float(realism.mean())
        values |= {f"realism:{site}": float(score.mean()) for site, score in zip(present, realism, strict=True)}
    return q.detach(), values


def _guess(student: nn.Module, x: Tensor) -> Tensor:
    """The student's probabilities `(B, C, D, H, W)`; it is left in training, and no random number is drawn."""
    student.eval()
    with torch.no_grad(), autocast_over(x.device, x.shape[2:]):
        logits = student(x.detach())
    student.train()
    return torch.softmax(logits.float(), dim=1)


def softmax_pull_back(probs: Tensor, gradient: Tensor) -> Tensor:
    """`d loss / d logits` from `d loss / d probs`, softmax over dim 1: `p (g - sum_c p_c g_c)`; all `(B, C, ...)`."""
    return probs * (gradient - (probs * gradient).sum(dim=1, keepdim=True))


def _pair(x: Tensor, q: Tensor, public: PublicBatch | None, kept: list[int] | None) -> dict[str, Tensor]:
    """What the replay buffer keeps of a round, fp16 on the CPU; `kept` numbers the volumes among those drawn."""
    pair = {"x": x.detach().half().cpu(), "q": q.detach().half().cpu()}
    if public is not None:
        pair["classes"] = public.classes.to(torch.uint8)
    if kept is not None:
        pair["kept"] = torch.tensor(kept)
    return pair


def _student_steps(
    state: DistillationState,
    schedule: Schedule,
    number: int,
    sampler: PublicSampler | None,
    random: torch.Generator,
    device: torch.device,
    workers: Workers,
) -> dict[str, float]:
    """Steps on the replay buffer: `KL(q || S) + soft Dice(S, q)`, with the label map blended in by `truth`.

    A share `rehearsal` of each batch comes from the simulator instead, with its label map alone as the target. Class
    answers have no overlap, so `KL(q || S)` alone, and an image is not mirrored or changed in contrast: that may make
    it one of another class. Every process makes the whole batch, and the student sees its own share of it. Numbers are
    drawn on the CPU and volumes changed on the device, where that takes no time.
    """
    losses: list[Tensor] = []
    rehearsed = round(schedule.rehearsal * schedule.student_batch)
    volumes = [(i, j) for i, pair in enumerate(state.replay) for j in range(pair["x"].shape[0])]
    for step in range(schedule.student_steps):
        done = (number - 1) * schedule.student_steps + step
        rate = _learning_rate(done, schedule.rounds * schedule.student_steps) * schedule.student_rate
        for group in state.student_optimizer.param_groups:
            group["lr"] = rate
        public = rehearsed if sampler is not None else 0
        chosen = torch.randint(len(volumes), (schedule.student_batch - public,), generator=random).tolist()
        batch = [{name: t[j] for name, t in state.replay[i].items()} for i, j in (volumes[c] for c in chosen)]
        x = torch.stack([b["x"] for b in batch]).to(device).float()
        target = torch.stack([b["q"] for b in batch]).to(device).float()
        if schedule.truth and "classes" in batch[0]:
            truth = one_hot(torch.stack([b["classes"] for b in batch]).to(device), CLASSES)
            target = (1 - schedule.truth) * target + schedule.truth * truth
        if sampler is not None and public:
            phantoms = sampler.draw(REHEARSAL_DRAWS + done, public)
            x = torch.cat([x, phantoms.base.to(device)])
            target = torch.cat([target, one_hot(phantoms.classes.to(device), CLASSES)])
        dense = target.dim() > 2
        if dense:
            x, target = flip_together([jitter(x, random), target], random)
        if schedule.mixup:
            x, target = mix_pairs([x, target], random)
        own = workers.share(len(x))
        with autocast_over(x.device, x.shape[2:]):
            guess = state.student(x[own])
        guess = guess.float()
        logits = workers.gather(guess, len(target), device).requires_grad_(True)
        loss = transfer_divergence(target, logits)
        if dense:
            loss = loss + soft_dice(torch.softmax(logits, dim=1), target)
        (gradient,) = torch.autograd.grad(loss, logits)
        state.student_optimizer.zero_grad(set_to_none=True)
        guess.backward(gradient=gradient[own])
        workers.sum_gradients(state.student)
        nn.utils.clip_grad_norm_(state.student.parameters(), 5.0)
        state.student_optimizer.step()
        state.student_average.update_parameters(state.student)
        losses.append(loss.detach())
    return {"student": sum(map(float, losses)) / len(losses)} if losses else {}


def _learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up over a tenth of the steps, cosine to 0 over all of them."""
    warm_up = max(1, steps // 10)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def synthetic_volumes(
    state: DistillationState,
    *,
    sampler: PublicSampler | None,
    count: int,
    size: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Volumes of the averaged generator with the class map that conditioned them, if any; one `(4, D, H, W)` a time.

    They lie as the heads do (axes right, anterior, superior); an unconditional generator names no sides.
    """
    made = final_volumes(state, sampler=sampler, count=count, size=size, seed=seed, device=device)
    return ((x, None if public is None else public.classes[0]) for x, public in made)


def final_volumes(
    state: DistillationState,
    *,
    sampler: PublicSampler | None,
    count: int,
    size: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, PublicBatch | None]]:
    """`synthetic_volumes` with the phantom each was made from, a batch of one; both lie as the heads do."""
    source = None if state.generator_average is None else state.generator_average.module
    if source is not None:
        source.eval()
        if state.generator is not None and state.generator.mode == "unconditional":
            sampler = None
    for index in range(count):
        random = torch.Generator().manual_seed(seed * 1_000_003 + index)
        public = None if sampler is None else sampler.draw(10_000_000 + index, 1)
        with torch.no_grad():
            x = _synthesise(source, public, 1, size, random, device, slice(0, 1))
        assert x is not None  # the share is the whole batch of one
        x = x.cpu()
        yield (x[0], None) if public is None else (upright(x, public.mirrored)[0], public.upright())


def asked_volumes(
    state: DistillationState, *, schedule: Schedule, sampler: PublicSampler | None, count: int
) -> tuple[Tensor, PublicBatch | None]:
    """The newest volumes of the generator that hospitals answered about, from the replay buffer; nothing is made anew.

    At most one for each phantom, so that none weighs twice.

    Args:
        state: of a run with a generator.
        schedule: of that run.
        sampler: of that run; `None` for an unconditional generator.
        count: at most so many.

    Returns:
        `(N, 4, D, H, W)`, N may be 0, and the phantoms they were made from; both lie as the heads do.
    """
    chosen: list[Tensor] = []
    phantoms: dict[int, PublicBatch] = {}
    oldest = state.round - len(state.replay)  # the pair at the front is of the round after this one
    for number in reversed(asking_rounds(schedule, public=sampler is not None)):
        if not oldest < number <= state.round:
            continue
        pair = state.replay[number - oldest - 1]
        x, drawn = pair["x"].float(), None
        if sampler is not None:
            drawn = sampler.draw(number, schedule.batch * schedule.candidates).some(pair["kept"].tolist())
        for index in range(len(x)):
            if len(chosen) == count:
                break
            if drawn is None:
                chosen.append(x[index])
                continue
            one = drawn.only(index)
            if (phantom := int(one.phantoms)) not in phantoms:
                chosen.append(upright(x[index : index + 1], one.mirrored)[0])
                phantoms[phantom] = one.upright()
    if not chosen:
        return torch.empty(0), None
    return torch.stack(chosen), PublicBatch.of(list(phantoms.values())) if phantoms else None
