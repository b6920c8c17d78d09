"""A whole distillation and its folder, step by step: teachers, students, scores, bundle, volumes, figures, records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fediod_med.baselines import network_predictor, prepare
from fediod_med.checkpoints import load_segmenter, save_weights
from fediod_med.devices import pick_device
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.evaluation import write_scores
from fediod_med.export import write_central_bundle
from fediod_med.hospitals import copy_ledger, privacy_record
from fediod_med.inference import privacy_banner
from fediod_med.parallel import ALONE, Workers
from fediod_med.progress import Progress, silent
from fediod_med.records import write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE, public_prior
from fediod_med.runs.asking import announce_costs, distil_student, open_hospitals, witness
from fediod_med.runs.figures import write_run_figures
from fediod_med.runs.finished import FinishedRun
from fediod_med.runs.plan import PHANTOMS_RUN, STUDENT_RUN, RunPlan, agreed_grid, default_objective, require_mode
from fediod_med.runs.records import claim, distillation_record, run_summary, student_provenance
from fediod_med.runs.scoring import cases_of, pooled_network, row_predictors, score_rows
from fediod_med.runs.stages import Clock
from fediod_med.runs.volumes import write_quality, write_synthetic_volumes
from fediod_med.site_gate import open_gate
from fediod_med.sites import Site, check_disjoint

logger = logging.getLogger(__package__)


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        out: the run folder.
        summary: the content of `summary.json`.
        bundle: the central bundle.
    """

    out: Path
    summary: Mapping[str, Any]
    bundle: Path


def run_distillation(
    sites: Sequence[Site],
    *,
    out: Path,
    seed: int = 0,
    device: str = "auto",
    schedule: Schedule | None = None,
    mode: str = "conditional",
    objective: GeneratorObjective | None = None,
    pool: int = 240,
    teachers: Path | None = None,
    compare: bool = True,
    resume: bool = False,
    data_name: str = "patients",
    progress: Progress = silent,
    announce: Callable[[str], None] = logger.info,
    workers: Workers = ALONE,
) -> RunResult:
    """Distil one student from several hospitals in one process, and write the run folder.

    Of several processes (`workers`), this is the first's part: it holds the hospitals, trains missing teachers, writes
    and scores. The others call `assist_distillation`.

    Args:
        sites: hospitals; spacing and roi must agree, patients must not overlap.
        out: run folder; must be new or empty unless resuming.
        seed: of everything.
        device: see `devices.pick_device`.
        schedule: rounds, steps and rates.
        mode: of the generator, `conditional` (ours) or `unconditional` (the paper's).
        objective: terms of the generator; the mode's default when omitted.
        pool: phantoms the centre draws from.
        teachers: folder with trained teachers (`<site>/model.safetensors`); trained in the run when omitted.
        compare: also train the rows that only a comparison needs (`kd_phantoms`, `pooled`).
        resume: continue an interrupted run of the same folder.
        data_name: `patients` or `phantoms`; printed beside every score.
        progress: see `Progress`.
        announce: receives what each hospital's privacy will cost, before anything is trained or asked.
        workers: processes that share the generator's and the student's work; they part after the last distillation.

    Raises:
        SettingsError: hospitals or options do not fit together, or the folder is in use.
        InputError: data are not what the site files say.
        PrivacyError: a ledger is missing or damaged, or a budget does not cover the run.
    """
    require_mode(mode)
    spacing, roi = agreed_grid(sites)
    check_disjoint(sites)
    schedule = Schedule() if schedule is None else schedule
    workers.require(schedule.student_batch, option="--student-batch")
    plan = RunPlan(
        run_id=claim(out, resume=resume),
        spacing=spacing,
        roi=roi,
        seed=seed,
        mode=mode,
        pool=pool,
        schedule=schedule,
        objective=default_objective(mode) if objective is None else objective,
        compare=compare,
    )
    where = pick_device(device)
    clock = Clock()
    with clock("privacy plans"):
        gates = [open_gate(site) for site in sites]
    witness(gates, out)
    announce_costs(plan, sites, gates, announce)

    workers.led(plan.plain)  # the others make the public phantoms meanwhile, which is cheaper than to send them
    with clock("phantoms"):
        sampler = plan.sampler(progress)
    with clock("teachers"):
        hospitals = open_hospitals(
            sites, gates, out=out, seed=seed, device=device, teachers=teachers, sampler=sampler, progress=progress
        )
    distil = partial(
        distil_student,
        plan=plan,
        hospitals=hospitals,
        sampler=sampler,
        out=out,
        device=where,
        resume=resume,
        progress=progress,
        workers=workers,
    )
    with clock("distillation"):
        student, federation = distil(STUDENT_RUN)
    phantom_student = None
    if compare:
        with clock("kd_phantoms"):
            phantom_student, _ = distil(PHANTOMS_RUN)
    workers.leave()
    # Nothing is asked of a hospital any more: what stands in the ledgers now is what the run has cost.
    done = FinishedRun(
        plan=plan,
        sites=tuple(sites),
        hospitals=hospitals,
        sampler=sampler,
        student=student,
        phantom_student=phantom_student,
        privacy={hospital.site.site_name: privacy_record(hospital) for hospital in hospitals},
        sent={"down": federation.bytes_down, "up": federation.bytes_up},
        data_name=data_name,
    )
    return _finish(done, out=out, device=device, processes=workers.size, clock=clock, progress=progress)


def assist_distillation(workers: Workers, *, device: str = "auto") -> None:
    """The part in `run_distillation` of every process but the first; it opens no hospital, writes and prints nothing.

    Args:
        workers: the processes of the run; what to do comes from the first.
        device: of this process, see `devices.pick_device`.

    Raises:
        WorkerError: the first process stopped or ended.
    """
    plan = RunPlan.of(workers.led(dict))
    sampler = plan.sampler(silent)
    for name in plan.students:
        distill(None, **plan.arguments(name, sampler), device=pick_device(device), workers=workers)
    workers.leave()


def _finish(
    done: FinishedRun, *, out: Path, device: str, processes: int, clock: Clock, progress: Progress
) -> RunResult:
    """Score what was distilled, and write the rest of the run folder; `summary.json` and `run.json` come last."""
    plan, where = done.plan, pick_device(device)
    provenance = student_provenance(done)
    save_weights(out / "student.safetensors", done.network.state_dict(), provenance)

    held_out = done.held_out()
    with clock("reading held-out scans"):
        scans = prepare([subject for _, subject in held_out], spacing=plan.spacing)
    cases = cases_of(held_out)
    prior, _ = load_segmenter(public_prior(), where)
    predictors = row_predictors(done, scans, prior=prior, device=where)
    if plan.compare and not done.private:  # pooled training keeps no promise
        with clock("pooled"):
            pooled = pooled_network(done, out=out, device=device, progress=progress)
        predictors["pooled"] = network_predictor(pooled, scans, roi=plan.roi, device=where)

    for hospital in done.hospitals:
        copy_ledger(hospital, out / "privacy" / hospital.site.site_name)
    with clock("evaluation"):
        scores = score_rows(predictors, cases, progress)
    summary = run_summary(done, scores, clock.seconds)
    bundle = write_central_bundle(
        out / "bundle",
        done.network.state_dict(),
        provenance,
        summary=summary["rows"]["student"],
        evaluated_on=f"held-out {done.data_name} of the hospitals",
    )
    for key, rows in scores.items() if not done.discreet else ():
        write_scores(out / "scores" / f"{key.replace(':', '-')}.csv", rows, privacy=summary["privacy"], seed=plan.seed)
    write_json(out / "history.json", {"notice": NOT_FOR_CLINICAL_USE, "rounds": done.student.history})

    with clock("synthetic volumes"):
        finals = write_synthetic_volumes(done, out / "synthetic", device=where)
    with clock("synthetic quality"):
        write_quality(done, finals, out / "synthetic", prior=prior, device=where)
    write_run_figures(
        out,
        done,
        summary=summary,
        case=cases[0],
        predictors=predictors,
        finals=finals,
        banner=f"{privacy_banner(provenance)}. {done.data_name}. {NOT_FOR_CLINICAL_USE}",
    )
    write_json(out / "summary.json", summary)
    record = distillation_record(done, held_out, device=str(where), processes=processes, seconds=clock.seconds)
    write_json(out / "run.json", record)
    return RunResult(out, summary, bundle)
