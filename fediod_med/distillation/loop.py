"""The loop: ask, merge, step, learn. It reads like the algorithm; see the package for what the steps are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fediod_med.checkpoints import save_state
from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.asking import Hospitals, site_names, stack_answers
from fediod_med.distillation.generating import (
    competence_of,
    generator_step,
    hardest,
    learn_competence,
    learn_log_weights,
    synthesise,
)
from fediod_med.distillation.learning import consider, guess_of, is_held_out, replay_pair, student_steps, take_best
from fediod_med.distillation.settings import (
    GeneratorObjective,
    Schedule,
    check_settings,
    is_phantom_round,
    snapshot_rounds,
)
from fediod_med.distillation.state import DistillationState, begin, resumed
from fediod_med.ensemble import merge
from fediod_med.errors import SettingsError
from fediod_med.networks import Generator
from fediod_med.parallel import ALONE, Workers
from fediod_med.protocol import Federation
from fediod_med.snapshots import Snapshot, take_snapshot


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
    check_settings(generator, sampler, objective, schedule)
    workers.require(schedule.student_batch, option="--student-batch")
    sites = workers.led(partial(site_names, federation))
    everyone = len(sites)
    needed = everyone if quorum is None else quorum
    if not 1 <= needed <= everyone:
        raise SettingsError(f"distillation: expected a quorum of 1 to {everyone} hospitals, found {needed}")
    if generator is not None and generator.mode == "unconditional":
        sampler = None  # its label maps would describe other volumes than the generated ones
    state = begin(student, generator, schedule, device)
    first = workers.led(partial(resumed, state, checkpoint if resume else None))
    if not workers.lead:
        state.load_state_dict(first)
    ask = partial(Hospitals, federation, sites, workers, run_id=run_id, timeout_s=timeout_s)
    hospitals = ask(quorum=needed, encoding=schedule.encoding)
    if state.counts is None:
        described = ask(quorum=everyone).ask("describe", 0, {})
        state.counts = torch.stack([described[site]["class_counts"] for site in sites])

    shown = snapshot_rounds(schedule, generator=generator is not None, public=sampler is not None)
    while state.round < schedule.rounds:
        number = state.round + 1
        random = torch.Generator().manual_seed(seed * 1_000_003 + number)
        drawn = None if sampler is None else sampler.draw(number, schedule.batch * schedule.candidates)
        chosen = [] if drawn is None else hardest(state.student, drawn, schedule, device, workers)
        public = None if drawn is None else drawn.some(chosen)
        at_checkpoint = number % schedule.checkpoint_every == 0 or number == schedule.rounds

        asking = None if is_phantom_round(number, public, schedule.phantom_share) else state.generator
        made = synthesise(asking, public, schedule.batch, size, random, device, workers.share(schedule.batch))
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
        probs, realism, counts = stack_answers(answers, sites, state.counts, device)
        record: dict[str, float] = {"round": number, "sites": len(answers)}
        present = [index for index, site in enumerate(sites) if site in answers]
        if asking is None and public is not None:
            learn_competence(state, probs, public, present, everyone)
            if objective.learned:
                learn_log_weights(state, probs, public, counts, present, everyone, step=objective.learned)
        weigh = partial(
            merge,
            counts=counts,
            realism=realism if objective.realism_weights else None,
            competence=competence_of(state, objective, present),
            entropy_temperature=objective.entropy or None,
        )
        if asking is None:
            q = weigh(probs)
        else:
            q, terms = generator_step(
                state, hospitals, answers, x, made, probs, realism, counts, public, objective, number, weigh, workers
            )
            record |= terms
        if workers.lead and on_snapshot is not None and number in shown:
            by_site = dict(zip((sites[index] for index in present), probs, strict=True))
            on_snapshot(take_snapshot(number, x, by_site, q, guess_of(state.student, x), public))
        pair = replay_pair(x, q, public, chosen)
        (state.held_out if is_held_out(number, schedule) else state.replay).append(pair)
        record |= student_steps(state, schedule, number, sampler, random, device, workers)
        record |= consider(state, schedule, number, device, workers)
        state.history.append(record)
        state.round = number
        if workers.lead and at_checkpoint and checkpoint is not None:
            save_state(checkpoint, state.state_dict())
        if workers.lead and on_round is not None:
            on_round(record)
    take_best(state)
    return state
