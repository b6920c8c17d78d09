"""Whole runs and their folders: teachers, distillation, every row of the comparison, bundle and figures."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fediod_med import reporting
from fediod_med.baselines import (
    ensemble_predictor,
    network_predictor,
    prepare,
    weights_path,
)
from fediod_med.checkpoints import Provenance, current_commit, load_segmenter, save_weights
from fediod_med.data.layouts import Subject
from fediod_med.data.nifti import read_label, read_subject
from fediod_med.data.phantoms import Grid, Profile, hospital_profiles, write_cohort
from fediod_med.data.sampler import PublicBatch, PublicSampler
from fediod_med.devices import pick_device
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import PAPER_OBJECTIVE, GeneratorObjective, Schedule
from fediod_med.distillation.state import DistillationState
from fediod_med.distillation.volumes import asked_volumes, final_volumes
from fediod_med.durable import write_atomically
from fediod_med.errors import InputError, SettingsError
from fediod_med.evaluation import SubjectScore, evaluate_predictor, paired_difference, summarise, write_scores
from fediod_med.export import write_central_bundle
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.hospitals import Hospital, announcement, copy_ledger, open_federation, open_hospital, privacy_record
from fediod_med.inference import privacy_banner
from fediod_med.labels import LabelScheme, get_scheme
from fediod_med.networks import STUDENT, Generator, build_segmenter
from fediod_med.parallel import ALONE, Workers
from fediod_med.pooled import train_pooled
from fediod_med.prior import train_prior
from fediod_med.privacy import statement
from fediod_med.privacy.records import Head
from fediod_med.progress import Progress, silent
from fediod_med.records import run_record, write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE, public_prior
from fediod_med.segmentation.cohort import segment_cohort
from fediod_med.segmentation.inputs import find_inputs
from fediod_med.segmentation.options import SegmentOptions, load_model
from fediod_med.segmentation.steps import CaseSegmenter
from fediod_med.site_gate import open_gate
from fediod_med.sites import Site, check_disjoint, load_sites
from fediod_med.snapshots import read_rounds, write_final_volumes, write_snapshot
from fediod_med.synthetic_report import MOST_VOLUMES, Judged, quality_report
from fediod_med.teacher import warm_start

logger = logging.getLogger(__name__)

MODES = ("conditional", "unconditional")
STUDENT_RUN, PHANTOMS_RUN = "student", "kd-phantoms"
SYNTHETIC_VOLUMES = 4


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
    if mode not in MODES:
        raise SettingsError(f"mode: expected {' or '.join(MODES)}, found {mode!r}")
    spacing, roi = _common(sites, "spacing"), int(_common(sites, "roi"))
    check_disjoint(sites)
    schedule = Schedule() if schedule is None else schedule
    workers.require(schedule.student_batch, option="--student-batch")
    run_id = _claim(out, resume)
    compute_on = pick_device(device)
    if objective is None:
        objective = GeneratorObjective() if mode == "conditional" else PAPER_OBJECTIVE
    clock = _Clock()
    with clock("privacy plans"):
        gates = [open_gate(site) for site in sites]
    for gate in gates:
        gate.witness(_read_heads(out).get(gate.site))
    for site, gate in zip(sites, gates, strict=True):
        announce(announcement(site, gate, schedule, compare=compare))

    plan = _Plan(run_id, spacing, roi, seed, mode, pool, schedule, objective, compare)
    workers.led(plan.plain)  # the others make the public phantoms meanwhile, which is cheaper than to send them
    with clock("phantoms"):
        sampler = plan.sampler(progress)
    with clock("teachers"):
        hospitals = [
            open_hospital(
                site,
                gate,
                out=out,
                seed=seed,
                device=device,
                teachers=teachers,
                sampler=sampler,
                on_epoch=_on_epoch(progress, f"teacher {site.site_name}", private=site.private),
                on_step=_on_step(progress, f"teacher {site.site_name}"),
            )
            for site, gate in zip(sites, gates, strict=True)
        ]

    def student_with(name: str) -> tuple[DistillationState, EmbeddedFederation]:
        federation = open_federation(
            hospitals,
            out=out,
            seed=seed,
            run_id=plan.name_of(name),
            device=compute_on,
            adversarial=name == STUDENT_RUN,
            heads=_read_heads(out),
        )

        def on_round(record: Mapping[str, float]) -> None:
            _write_heads(out, federation)
            progress(f"distil {name}", int(record["round"]), schedule.rounds, _losses(record))

        state = distill(
            federation,
            **plan.arguments(name, sampler),
            device=compute_on,
            workers=workers,
            checkpoint=out / "checkpoints" / f"{name}.pt",
            resume=resume,
            on_round=on_round,
            on_snapshot=partial(write_snapshot, out / "synthetic", spacing=spacing),
        )
        return state, federation

    with clock("distillation"):
        state, federation = student_with(STUDENT_RUN)
    assert state.counts is not None  # asked for in the first round
    if compare:
        with clock("kd_phantoms"):
            phantom_state, _ = student_with(PHANTOMS_RUN)
    workers.leave()
    # Nothing is asked of a hospital any more: what stands in the ledgers now is what the run has cost.
    privacy = {hospital.site.site_name: privacy_record(hospital) for hospital in hospitals}
    student_provenance = _provenance("student", privacy, spacing, roi, seed, schedule, data_name)
    student_weights = out / "student.safetensors"
    save_weights(student_weights, state.student_average.module.state_dict(), student_provenance)

    scans_of = [(h.site, subject) for h in hospitals for subject in h.site.subjects()[1]]
    with clock("reading held-out scans"):
        scans = prepare([subject for _, subject in scans_of], spacing=spacing)
    cases = [(site.site_name, subject, get_scheme(site.label_scheme)) for site, subject in scans_of]
    # In mode `gradient` a teacher is not private: nothing that it says itself may leave, scores included.
    shown = [h for h in hospitals if h.site.privacy_mode != "gradient"]
    predictors = {
        f"site:{h.site.site_name}": network_predictor(h.teacher, scans, roi=roi, device=compute_on) for h in shown
    }
    if len(shown) == len(hospitals):
        predictors["ensemble"] = ensemble_predictor(
            [h.teacher for h in hospitals], state.counts, scans, roi=roi, device=compute_on
        )
    prior, _ = load_segmenter(public_prior(), compute_on)
    predictors["prior"] = network_predictor(prior, scans, roi=roi, device=compute_on)
    if compare:
        predictors["kd_phantoms"] = network_predictor(
            phantom_state.student_average.module, scans, roi=roi, device=compute_on
        )
    predictors["student"] = network_predictor(state.student_average.module, scans, roi=roi, device=compute_on)
    if compare and not any(site.private for site in sites):  # pooled training keeps no promise
        with clock("pooled"):
            pooled = _pooled(sites, out=out, seed=seed, device=device, sampler=sampler, progress=progress)
        predictors["pooled"] = network_predictor(pooled, scans, roi=roi, device=compute_on)

    for hospital in hospitals:
        copy_ledger(hospital, out / "privacy" / hospital.site.site_name)
    scores: dict[str, list[SubjectScore]] = {}
    with clock("evaluation"):
        for done, (key, predict) in enumerate(predictors.items()):
            progress("evaluate", done, len(predictors), key)
            scores[key] = evaluate_predictor(predict, cases)
        progress("evaluate", len(predictors), len(predictors), "")
    summary = _summary(scores, sites, privacy, data_name, seed, schedule, objective, mode, federation, clock.seconds)
    bundle = write_central_bundle(
        out / "bundle",
        state.student_average.module.state_dict(),
        student_provenance,
        summary=summary["rows"]["student"],
        evaluated_on=f"held-out {data_name} of the hospitals",
    )
    # A private run on patients shows none of them: no slice, no id, no score of a single one.
    discreet = data_name != "phantoms" and any(site.private for site in sites)
    for key, rows in scores.items() if not discreet else ():
        write_scores(out / "scores" / f"{key.replace(':', '-')}.csv", rows, privacy=summary["privacy"], seed=seed)
    write_json(out / "history.json", {"notice": NOT_FOR_CLINICAL_USE, "rounds": state.history})
    behind = sampler if mode == "conditional" else None  # an unconditional generator makes its volumes of noise
    with clock("synthetic volumes"):
        made = final_volumes(state, sampler=behind, count=SYNTHETIC_VOLUMES, size=roi, seed=seed, device=compute_on)
        finals = write_final_volumes(out / "synthetic", made, spacing=spacing)
    with clock("synthetic quality"):
        asked = asked_volumes(state, schedule=schedule, sampler=behind, count=MOST_VOLUMES)
        quality = quality_report(
            Judged(*asked, finals),
            sampler=sampler,
            network=prior,
            **_scans_to_judge_by(hospitals),
            size=roi,
            device=compute_on,
            seed=seed,
        )
        stated = {"notice": NOT_FOR_CLINICAL_USE, "privacy_statement": summary["privacy_statement"], "data": data_name}
        write_json(out / "synthetic" / "quality.json", {**stated, **quality})
    banner = f"{privacy_banner(student_provenance)}. {data_name}. {NOT_FOR_CLINICAL_USE}"
    reporting.write_figures(
        out / "figures",
        summary=summary,
        # realism of each hospital (`realism:<site>`) is in history.json; the curve shows their mean
        history=[{k: v for k, v in record.items() if k != "sites" and ":" not in k} for record in state.history],
        panel=_panel(None if discreet else cases[0], predictors, next(iter(finals.values())), spacing, data_name),
        banner=banner,
    )
    if rounds := read_rounds(out / "synthetic"):
        reporting.write_rounds(
            out / "figures" / "synthetic.png",
            [reporting.RoundRow(r.round, r.phantom, r.x, r.labels, r.ensemble, r.affine) for r in rounds],
            title="Synthetic volumes by round, made from public phantoms, radiological view",
            banner=banner,
        )
    write_json(out / "summary.json", summary)
    write_json(
        out / "run.json",
        run_record(
            command="distill",
            device=str(compute_on),
            commit=current_commit(),
            options={
                "seed": seed,
                "processes": workers.size,
                "mode": mode,
                "pool": pool,
                "schedule": dataclasses.asdict(schedule),
                "objective": dataclasses.asdict(objective),
                "sites": {site.site_name: _plain(site) for site in sites},
            },
            privacy=privacy,
            seeds={"run": seed},
            seconds=clock.seconds,
            inputs=()
            if discreet
            else [path for _, subject in scans_of for path in dict.fromkeys(subject.images.values())],
            cases={}
            if discreet
            else {subject.subject_id: {"site": site.site_name, "status": "scored"} for site, subject in scans_of},
        ),
    )
    return RunResult(out, summary, bundle)


def assist_distillation(workers: Workers, *, device: str = "auto") -> None:
    """The part in `run_distillation` of every process but the first; it opens no hospital, writes and prints nothing.

    Args:
        workers: the processes of the run; what to do comes from the first.
        device: of this process, see `devices.pick_device`.

    Raises:
        WorkerError: the first process stopped or ended.
    """
    plan = _Plan.of(workers.led(dict))
    sampler = plan.sampler(silent)
    for name in (STUDENT_RUN, PHANTOMS_RUN) if plan.compare else (STUDENT_RUN,):
        distill(None, **plan.arguments(name, sampler), device=pick_device(device), workers=workers)
    workers.leave()


@dataclass(frozen=True)
class _Plan:
    """What every process of a run must know to distil its students; see `run_distillation`."""

    run_id: str
    spacing: float
    roi: int
    seed: int
    mode: str
    pool: int
    schedule: Schedule
    objective: GeneratorObjective
    compare: bool

    def plain(self) -> dict[str, Any]:
        """As plain values; `of` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> _Plan:
        """From what `plain` gave."""
        return cls(
            **{
                **plain,
                "schedule": Schedule(**plain["schedule"]),
                "objective": GeneratorObjective(**plain["objective"]),
            }
        )

    def name_of(self, student: str) -> str:
        """The run id that the hospitals keep their state of one student under."""
        return f"{self.run_id}-{student}"

    def sampler(self, progress: Progress) -> PublicSampler:
        """The public phantoms."""
        return PublicSampler(
            spacing=self.spacing,
            roi=self.roi,
            count=self.pool,
            seed=1000 + self.seed,
            progress=partial(_report, progress, "public phantoms"),
        )

    def arguments(self, student: str, sampler: PublicSampler) -> dict[str, Any]:
        """Of `distill`, with networks made anew: a student with a generator, or one of phantoms alone."""
        torch.manual_seed(self.seed)
        generator = Generator(self.mode, size=self.roi) if student == STUDENT_RUN else None
        torch.manual_seed(self.seed)
        return {
            "student": warm_start(build_segmenter(**STUDENT), init="auto", spec=STUDENT),
            "generator": generator,
            "sampler": sampler if generator is None or generator.mode == "conditional" else None,
            "objective": self.objective,
            "schedule": self.schedule,
            "size": self.roi,
            "seed": self.seed,
            "run_id": self.name_of(student),
        }


def run_demo(
    *,
    out: Path,
    epsilon: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: Progress = silent,
    announce: Callable[[str], None] = logger.info,
) -> RunResult:
    """Three unlike phantom hospitals, from nothing to a segmented unseen scan; scores are phantom scores.

    With `epsilon`, the hospitals have more patients, a budget and a ledger each, and train by DP-SGD.
    """
    if not (out / "sites").is_dir():
        if out.is_dir() and any(out.iterdir()):
            raise SettingsError(f"{out}: expected a new or empty folder; choose another --out")
        cases = PRIVATE_DEMO_CASES if epsilon else DEMO_CASES
        write_phantom_sites(out, seed=seed, cases=cases, epsilon=epsilon, progress=progress)
    sites = load_sites(out / "sites")
    result = run_distillation(
        sites,
        out=out,
        seed=seed,
        device=device,
        schedule=Schedule(rounds=60, student_steps=12, student_rate=1e-3, checkpoint_every=60),
        pool=240,
        resume=resume,
        data_name="phantoms",
        progress=progress,
        announce=announce,
    )
    progress("segment an unseen scan", 0, 1, "")
    options = SegmentOptions(scheme="brats2023", report=True, uncertainty=True)
    where = pick_device(device)
    model = load_model(out, device=where, options=options)
    segmenter = CaseSegmenter(model, options=options, out=out / "segmented", device=where)
    failed = [found for found in segment_cohort(find_inputs(out / "unseen"), segmenter) if found.status == "failed"]
    if failed:
        raise InputError(
            f"{failed[0].case_id}: the demo's unseen scan could not be segmented: {failed[0].record['reason']}"
        )
    progress("segment an unseen scan", 1, 1, "")
    return result


DEMO_CASES = 12
PRIVATE_DEMO_CASES = 32  # a budget of 8 drowns a hospital of 9 patients in noise
DEMO_HOSPITALS = ("academic-3t", "community-1t", "thick-slices")


def write_phantom_sites(
    out: Path, *, seed: int, cases: int = DEMO_CASES, epsilon: float = 0.0, progress: Progress = silent
) -> None:
    """Write three phantom hospitals (scans and site files) and one unseen scan of a fourth below `out`."""
    privacy = f"epsilon: {float(epsilon)}\nprivate_steps: 30\n" if epsilon else "privacy_mode: none\n"
    profiles = {profile.name: profile for profile in hospital_profiles()}
    grid = Grid((48, 48, 48), 4.0)
    for number, name in enumerate(DEMO_HOSPITALS):
        progress("phantom hospitals", number, len(DEMO_HOSPITALS), name)
        prefix = name.replace("-", "").upper()
        write_cohort(
            out / "hospitals" / name,
            count=cases,
            seed=seed * 100 + number,
            grid=grid,
            profile=profiles[name],
            prefix=prefix,
        )
        text = (
            f"# A phantom hospital: no patient.\nsite_name: {name}\nlayout: brats2018\nlabel_scheme: brats2018\n"
            f"dataset_dir: ../../hospitals/{name}\nsubject_pattern: Brats18_{prefix}_\nfolds: 4\nfold: 0\n"
            f"spacing: 4.0\nroi: 48\nbackbone: unet\nepochs: 6\n{privacy}"
        )
        path = out / "sites" / name / "site.yaml"
        _write_text(path, text)
    unseen: Profile = profiles["inverted-contrast"]
    write_cohort(
        out / "unseen", count=1, seed=seed * 100 + 99, grid=grid, profile=unseen, prefix="UNSEEN", layout="brats2023"
    )
    progress("phantom hospitals", len(DEMO_HOSPITALS), len(DEMO_HOSPITALS), "")


def run_prior(
    *,
    out: Path,
    steps: int,
    pool: int,
    seed: int,
    device: str = "auto",
    grids: Sequence[tuple[float, int]] = ((4.0, 48), (2.0, 64)),
    progress: Progress = silent,
) -> Path:
    """Train the public prior on phantoms only and write its weights (fp16) to `out`.

    Args:
        out: `.safetensors` file.
        steps: optimiser steps, shared by the grids in turn.
        pool: phantoms per grid.
        seed: of everything.
        device: see `devices.pick_device`.
        grids: (spacing mm, crop voxels) pairs that one network learns.
        progress: see `Progress`.
    """
    samplers = [
        PublicSampler(
            spacing=spacing,
            roi=roi,
            count=pool,
            seed=seed,
            progress=partial(_report, progress, f"phantoms at {spacing:g} mm"),
        )
        for spacing, roi in grids
    ]
    torch.manual_seed(seed)
    network = train_prior(
        build_segmenter(**STUDENT),
        samplers,
        steps=steps,
        batch=2,
        learning_rate=2e-3,
        seed=seed,
        device=pick_device(device),
        on_step=lambda step, loss: progress("train the public prior", step, steps, f"loss {loss:.3f}"),
    )
    provenance = Provenance(
        kind="public prior",
        network=STUDENT,
        spacing=grids[-1][0],
        label_scheme="brats2018",
        sites=(),
        privacy={},
        trained_on="no patient (public phantoms only); for trying the tool",
        seed=seed,
        settings={"roi": grids[-1][1], "steps": steps, "pool": pool, "grids": [list(g) for g in grids]},
        commit=current_commit(),
    )
    halved = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_weights(out, halved, provenance)
    return out


def _report(progress: Progress, stage: str, done: int, total: int) -> None:
    progress(stage, done, total, "")


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Any:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0) + time.perf_counter() - began, 2)


def _common(sites: Sequence[Site], key: str) -> float:
    values = {site.site_name: float(getattr(site, key)) for site in sites}
    if len(set(values.values())) > 1:
        raise SettingsError(f"{key}: expected one value for all hospitals of a run, found {values}; use --{key}")
    return next(iter(values.values()))


def _claim(out: Path, resume: bool) -> str:
    """The run's id; a folder that holds a run is touched only on request."""
    path = out / "run_id"
    if path.is_file():
        if not resume:
            raise SettingsError(f"{out}: holds a run already; add --resume to continue it, or choose another --out")
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex
    _write_text(path, run_id)
    return run_id


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _pooled(
    sites: Sequence[Site], *, out: Path, seed: int, device: str, sampler: PublicSampler, progress: Progress
) -> nn.Module:
    """All training scans in one place, as many steps as all teachers together: what the hospitals may not do."""
    folder = out / "baselines" / "pooled"
    path = weights_path(folder.parent, "pooled")
    if path is None:
        path = train_pooled(
            sites,
            output_dir=folder,
            seed=sites[0].seed + seed,
            device=device,
            sampler=sampler,
            on_epoch=lambda done, total, loss: progress("pooled", done, total, f"loss {loss:.3f}"),
        )
    return load_segmenter(path)[0]


def _provenance(
    kind: str,
    privacy: Mapping[str, Mapping[str, Any]],
    spacing: float,
    roi: int,
    seed: int,
    schedule: Schedule,
    data_name: str,
) -> Provenance:
    return Provenance(
        kind=kind,
        network=STUDENT,
        spacing=spacing,
        label_scheme="brats2018",
        sites=tuple(privacy),
        privacy=privacy,
        trained_on=f"synthetic volumes, answered by teachers trained on {data_name}",
        seed=seed,
        settings={"roi": roi, "rounds": schedule.rounds, "student_steps": schedule.student_steps},
        commit=current_commit(),
    )


def _summary(
    scores: Mapping[str, list[SubjectScore]],
    sites: Sequence[Site],
    privacy: Mapping[str, Mapping[str, Any]],
    data_name: str,
    seed: int,
    schedule: Schedule,
    objective: GeneratorObjective,
    mode: str,
    federation: EmbeddedFederation,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that `summary.json` holds; `rows.<key>.{TC,WT,ET,mean}` are mean Dice over held-out scans."""
    rows = {key: summarise(found, seed=seed) for key, found in scores.items()}
    site_means = [row["mean"] for key, row in rows.items() if key.startswith("site:")]
    return {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy": {site: dict(terms) for site, terms in privacy.items()},
        "privacy_statement": statement.run_statement(
            privacy,
            checked="summary.json has the full statement of each, `fediod privacy verify` checks it. Scores on "
            "held-out patients are not covered.",
        ),
        "data": data_name,
        "seed": seed,
        "mode": mode,
        "rounds": schedule.rounds,
        "objective": dataclasses.asdict(objective),
        "held_out": {site.site_name: f"fold {site.fold} of {site.folds}" for site in sites},
        "rows": rows,
        "ratios": {
            "student_to_ensemble": rows["student"]["mean"] / rows["ensemble"]["mean"] if "ensemble" in rows else None,
            "student_to_best_site": rows["student"]["mean"] / max(site_means) if site_means else None,
        },
        "student_minus": {
            key: paired_difference(scores["student"], found, seed=seed)
            for key, found in scores.items()
            if key != "student"
        },
        "bytes": {"down": federation.bytes_down, "up": federation.bytes_up},
        "seconds": dict(seconds),
    }


def _read_heads(out: Path) -> dict[str, Head]:
    """The newest ledger states that this run's centre has seen, from an earlier start of the run."""
    path = out / "heads.json"
    if not path.is_file():
        return {}
    return {site: Head(**head) for site, head in json.loads(path.read_text(encoding="utf-8")).items()}


def _write_heads(out: Path, federation: EmbeddedFederation) -> None:
    if federation.heads:
        heads = {site: dataclasses.asdict(head) for site, head in federation.heads.items()}
        write_json(out / "heads.json", heads)


def _on_epoch(progress: Progress, stage: str, *, private: bool) -> Callable[[int, int, float], None]:
    """Shows the loss of a training, unless the hospital promised privacy: a loss is a statistic of its patients."""
    return lambda done, total, loss: progress(stage, done, total, "" if private else f"loss {loss:.3f}")


def _on_step(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total, "private steps")


def _scans_to_judge_by(hospitals: Sequence[Hospital]) -> dict[str, Any]:
    """`scans` and `withheld` of `quality_report`: a hospital that promised privacy lends its scans to no figure."""
    return {
        "scans": {
            h.site.site_name: [scan for visits in h.patients for scan in visits]
            for h in hospitals
            if not h.site.private
        },
        "withheld": {
            h.site.site_name: f"privacy mode {h.site.privacy_mode}: a figure about this hospital's scans that its "
            "budget has not paid for does not leave it"
            for h in hospitals
            if h.site.private
        },
    }


def _panel(
    case: tuple[str, Subject, LabelScheme] | None,
    predictors: Mapping[str, Callable[[Subject], np.ndarray]],
    synthetic: tuple[Tensor, PublicBatch | None],
    spacing: float,
    data_name: str,
) -> list[reporting.PanelRow]:
    """The real / synthetic / ensemble / student figure; without a case, the synthetic volume alone."""
    x, public = synthetic
    volume = reporting.PanelRow(
        "synthetic",
        x.numpy(),
        None if public is None else public.classes[0].numpy(),
        np.diag([spacing, spacing, spacing, 1.0]),
    )
    if case is None:
        return [volume]
    _, subject, scheme = case
    scan = read_subject(subject)
    truth = "phantom, truth" if data_name == "phantoms" else "real, expert"
    return [
        reporting.PanelRow(truth, scan.array, read_label(subject, scheme), scan.affine),
        volume,
        *[
            reporting.PanelRow(key, scan.array, predictors[key](subject), scan.affine)
            for key in ("ensemble", "student")
            if key in predictors
        ],
    ]


def _losses(record: Mapping[str, float]) -> str:
    return "  ".join(
        f"{key} {value:.3f}" for key, value in record.items() if key not in ("round", "sites") and ":" not in key
    )


def _plain(site: Site) -> dict[str, Any]:
    return {f.name: getattr(site, f.name) for f in dataclasses.fields(site) if f.name not in ("folder", "dataset_dir")}
