"""Does one task of a comparison, in whatever process it is called."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fediod_med.baselines import network_predictor, prepare
from fediod_med.checkpoints import load_segmenter
from fediod_med.comparison.averaging import AveragingPlan, federated_average, serialised_bytes, weighted_average
from fediod_med.comparison.bench import Bench, pool_seed
from fediod_med.comparison.cells import Cell
from fediod_med.comparison.ensembles import ensemble_maps
from fediod_med.comparison.generations import distil_generations
from fediod_med.comparison.local import HospitalClient, open_client
from fediod_med.comparison.plan import Plan, with_shared_network
from fediod_med.comparison.rows import AVERAGING, SITE
from fediod_med.comparison.storage import is_done, pool_paths, read_row, row_folder, write_pool
from fediod_med.comparison.students import distil_row, recipe
from fediod_med.comparison.tasks import Task
from fediod_med.comparison.tuning import candidate_plan, record_candidate, tuned_plan, validation_parts
from fediod_med.data.layouts import Subject
from fediod_med.data.sampler import PublicSampler
from fediod_med.devices import pick_device
from fediod_med.evaluation import evaluate_predictor, summarise
from fediod_med.labels import get_scheme
from fediod_med.pooled import train_pooled
from fediod_med.resources import public_prior
from fediod_med.sites import Site
from fediod_med.teacher import train_teacher


def perform(plan: Plan, task: Task, device: str) -> None:
    """Do a task and write what it makes; whatever goes wrong is raised.

    Args:
        plan: of the comparison.
        task: one of `tasks.all_tasks`, whose needs are met.
        device: where to compute, see `devices.pick_device`; on a CPU one thread is used.
    """
    if pick_device(device).type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(plan, task.cell, device)
    if task.kind == "pool":
        _make_pool(plan, task.cell.seed, task.part)
    elif task.kind == "tuning":
        _tune(bench, task.subject)
    elif task.kind == "ensembles":
        _ensembles(bench, task.rows)
    else:
        _row(bench, task.subject)


def _make_pool(plan: Plan, seed: int, part: int) -> None:
    profile, parts = plan.profile, plan.profile.pool_parts
    numbers = parts[part]
    sampler = PublicSampler(
        spacing=profile.spacing, roi=profile.roi, count=len(numbers), seed=pool_seed(seed), first=numbers.start
    )
    write_pool(pool_paths(plan.out, seed, len(parts))[part], sampler)


def _row(bench: Bench, key: str) -> None:
    if key == "prior":
        bench.write(key, load_segmenter(public_prior())[0])
    elif key.startswith(SITE):
        _teacher(bench, key)
    elif key == "pooled":
        _pooled(bench)
    elif key in AVERAGING:
        _averaging(bench, key)
    elif key == "one_shot":
        _one_shot(bench)
    else:
        _distilled(bench, key)


def _teacher(bench: Bench, key: str) -> None:
    """Train a hospital's teacher where the other rows find it, and score it on all hospitals' held-out patients."""
    name = key.removeprefix(SITE)
    site = next(site for site in bench.sites if site.site_name == name)
    path = train_teacher(
        site,
        output_dir=bench.cell.folder(bench.plan.out) / "teachers" / name,
        device=bench.device_name,
        public=bench.sampler if site.rehearsal else None,
    )
    network, _ = load_segmenter(path)
    trained = round(time.perf_counter() - bench.began, 1)
    # Its weights lie beside the other teachers, and are not kept twice.
    steps = site.epochs * site.steps_per_epoch
    bench.write_scores(
        key, bench.scores(network), seconds_training=trained, local_steps=steps, network_spec=site.network()
    )


def _pooled(bench: Bench) -> None:
    folder = bench.cell.folder(bench.plan.out) / "pooled-training"
    path = train_pooled(
        [with_shared_network(site) for site in bench.sites],
        output_dir=folder,
        seed=bench.sites[0].seed,
        device=bench.device_name,
        sampler=bench.sampler,
    )
    network, _ = load_segmenter(path)
    path.unlink()
    folder.rmdir()
    sent = {site.site_name: _file_bytes(site.subjects()[0]) for site in bench.sites}
    steps = sum(site.epochs * site.steps_per_epoch for site in bench.sites)
    bench.write("pooled", network, bytes={"down": dict.fromkeys(sent, 0), "up": sent}, local_steps=steps)


def _file_bytes(subjects: Sequence[Subject]) -> int:
    """Size of scans and label maps as they lie on disk."""
    paths = {path for s in subjects for path in (*s.images.values(), s.label) if isinstance(path, Path)}
    return sum(path.stat().st_size for path in paths)


def _averaging(bench: Bench, key: str) -> None:
    profile, out = bench.plan.profile, bench.plan.out
    tuned = key.endswith("_tuned")
    default = profile.averaging if key.startswith("fedavg") else dataclasses.replace(profile.averaging, mu=profile.mu)
    home = Cell(bench.plan.seeds[0], bench.cell.fold, bench.cell.folds)
    setting = tuned_plan(out, home, profile, key) if tuned else default
    selected = f"validation patients among the training patients of {home.name}" if tuned else "nothing"
    plain = key.removesuffix("_tuned")
    if tuned and setting == default and is_done(out, bench.cell, plain):
        _same_as(bench, key, plain, selected)
        return
    network = _average(bench, [(site, site.subjects()[0]) for site in bench.sites], setting)
    once = serialised_bytes(network) * setting.rounds
    sent = dict.fromkeys(bench.plan.site_names, once)
    bench.write(
        key,
        network,
        bytes={"down": sent, "up": sent},
        averaging=dataclasses.asdict(setting),
        selected_on=selected,
        local_steps={site.site_name: site.epochs * site.steps_per_epoch for site in bench.sites},
    )


def _average(bench: Bench, parts: Sequence[tuple[Site, Sequence[Subject]]], setting: AveragingPlan) -> nn.Module:
    return federated_average(bench.start(), _clients(bench, parts), setting)


def _clients(bench: Bench, parts: Sequence[tuple[Site, Sequence[Subject]]]) -> dict[str, HospitalClient]:
    return {
        site.site_name: open_client(with_shared_network(site), subjects, public=bench.sampler, device=bench.device)
        for site, subjects in parts
    }


def _same_as(bench: Bench, key: str, other: str, selected: str) -> None:
    """Tuning has chosen the setting of another row: the same training would give the same weights."""
    stored = read_row(bench.plan.out, bench.cell, other)
    assert stored is not None  # done, says the caller
    network, _ = load_segmenter(row_folder(bench.plan.out, bench.cell, other) / "weights.safetensors")
    kept = {name: stored.record[name] for name in ("bytes", "averaging", "local_steps", "seconds", "cpu_seconds")}
    bench.write_scores(key, stored.scores, network=network, **kept, selected_on=selected, same_as=other)


def _tune(bench: Bench, name: str) -> None:
    """Train a candidate without the validation patients and score it on them."""
    plan = bench.plan
    setting = candidate_plan(plan.out, bench.cell, plan.profile, name)
    parts = validation_parts(bench.sites)
    network = _average(bench, [(site, train) for site, train, _ in parts], setting)
    cases = [(s.site_name, subject, get_scheme(s.label_scheme)) for s, _, held in parts for subject in held]
    scans = prepare([subject for _, subject, _ in cases], spacing=plan.profile.spacing)
    predict = network_predictor(network, scans, roi=plan.profile.roi, device=bench.device)
    summary = summarise(evaluate_predictor(predict, cases))
    record_candidate(
        plan.out,
        bench.cell,
        name,
        setting,
        dice=float(summary["mean"]),
        patients=len(cases),
        seconds=time.perf_counter() - bench.began,
    )


def _one_shot(bench: Bench) -> None:
    """The teachers' weights averaged once, by patients; from one warm start they can lie close enough for that."""
    networks = [hospital.teacher for hospital in bench.hospitals]
    averaged = bench.start()
    sizes = [float(len(hospital.presence)) for hospital in bench.hospitals]
    averaged.load_state_dict(weighted_average([network.state_dict() for network in networks], sizes))
    up = dict.fromkeys(bench.plan.site_names, serialised_bytes(averaged))
    bench.write("one_shot", averaged.eval(), bytes={"down": dict.fromkeys(up, 0), "up": up})


def _ensembles(bench: Bench, rows: Sequence[str]) -> None:
    profile = bench.plan.profile
    maps = ensemble_maps(
        bench.hospitals,
        bench.sampler,
        bench.scans,
        roi=profile.roi,
        rounds=profile.rounds,
        seed=bench.cell.seed,
        device=bench.device,
    )
    up = {h.site.site_name: serialised_bytes(h.teacher) for h in bench.hospitals}
    for key in rows:
        scores = evaluate_predictor(_lookup(maps[key]), bench.cases)
        bench.write_scores(key, scores, bytes={"down": dict.fromkeys(up, 0), "up": up})


def _lookup(maps: Mapping[str, np.ndarray]) -> Callable[[Subject], np.ndarray]:
    return lambda subject: maps[subject.subject_id]


def _distilled(bench: Bench, key: str) -> None:
    row = recipe(key, bench.plan.profile)
    train = distil_row
    if row.generations > 1:
        clients = _clients(bench, [(site, site.subjects()[0]) for site in bench.sites])
        train = partial(distil_generations, clients=clients, start=bench.start())
    found = train(
        row,
        bench.hospitals,
        sampler=bench.sampler,
        key=key,
        roi=bench.plan.profile.roi,
        seed=bench.cell.seed,
        device=bench.device,
    )
    up = found.bytes_up
    if row.volumes == "scans":  # the centre has them all
        up = {site.site_name: _file_bytes(site.subjects()[0]) for site in bench.sites}
    bench.write(
        key,
        found.student,
        bytes={"down": found.bytes_down, "up": up},
        student_updates=row.schedule.rounds * row.schedule.student_steps,
        recipe=dataclasses.asdict(row),
    )
