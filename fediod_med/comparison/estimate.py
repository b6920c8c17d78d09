"""How long a comparison will take, from one timed training step and the number of passes of each task."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fediod_med.comparison.plan import Plan
from fediod_med.comparison.rows import AVERAGING, DISTILLED, SITE
from fediod_med.comparison.students import recipe
from fediod_med.comparison.tasks import Task, task_done
from fediod_med.devices import autocast_over, pick_device
from fediod_med.distillation.settings import generator_rounds
from fediod_med.networks import STUDENT, build_segmenter

PHANTOM_SECONDS = 0.4  # one phantom at 4 mm on one core; measured
SCAN_PASSES = 8.0  # reading, predicting and scoring one held-out scan, in training passes
OPENING_SECONDS = 3.0  # reading the hospitals' scans for a distilled row, on one core
ANSWER_PASSES = 0.5  # one volume at one hospital: the teacher's answer
CRITIC_PASSES = 1.0  # the same: a discriminator's step and judgement
EXCHANGE_PASSES = 1.2  # the same: pull-back, and the generator's share
MIRRORS = 8  # images of a volume that an answer averaged over mirrors looks at
LOCAL_PASSES = 1.25  # one crop of local training, with augmentation


def estimate(plan: Plan, tasks: Sequence[Task], devices: Sequence[str]) -> str:
    """A sentence: tasks that are left, their hours on one worker and on all of them."""
    left = [task for task in tasks if not task_done(plan, task)]
    second = pass_seconds(plan.profile.roi, devices[0])
    total = sum(task_passes(plan, task) * second for task in left)
    total += OPENING_SECONDS * sum(task.subject in DISTILLED for task in left)
    total += sum(
        PHANTOM_SECONDS * plan.profile.pool * (4 / plan.profile.spacing) ** 3 for t in left if t.kind == "pool"
    )
    wall = total / len(devices)
    return (
        f"comparison: {len(left)} of {len(tasks)} tasks to do, {len(plan.rows)} rows in {len(plan.cells)} cells; about "
        f"{total / 3600:.1f} h of work, {wall / 3600:.1f} h with {len(devices)} workers ({second:.2f} s a pass)"
    )


def task_passes(plan: Plan, task: Task) -> float:
    """Training passes (forward and backward of one crop) that a task is worth."""
    profile, hospitals = plan.profile, len(plan.sites)
    batch = plan.sites[0].batch_size
    local = sum(site.epochs * site.steps_per_epoch for site in plan.sites) * batch * LOCAL_PASSES
    scans = SCAN_PASSES * sum(len(site.subjects()[1]) for site in task.cell.sites(plan.sites))
    if task.kind == "pool":
        return 0.0
    if task.kind == "tuning":
        return local + scans
    if task.kind == "ensembles":
        return scans * hospitals + profile.rounds * hospitals
    if task.subject.startswith(SITE):
        return local / hospitals + scans
    if task.subject == "pooled" or task.subject in AVERAGING:
        return local + scans
    if task.subject in DISTILLED:
        row = recipe(task.subject, profile)
        asked = 0 if row.generator is None else row.schedule.rounds
        if row.generator == "conditional":
            asked = generator_rounds(row.schedule)
        judged = row.schedule.rounds if row.generator is not None and row.objective.needs_discriminators else 0
        images = MIRRORS if row.schedule.mirrored else 1
        exchange = images * (ANSWER_PASSES * row.schedule.rounds + EXCHANGE_PASSES * asked) + CRITIC_PASSES * judged
        exchange *= row.schedule.batch * hospitals
        if row.schedule.candidates > 1:
            exchange += ANSWER_PASSES * row.schedule.rounds * row.schedule.batch * row.schedule.candidates
        if row.generations > 1:
            exchange += local
        return exchange + row.schedule.rounds * row.schedule.student_steps * row.schedule.student_batch + scans
    return scans


def pass_seconds(roi: int, device: str) -> float:
    """Seconds of one forward and backward pass of the student's network over one crop.

    On a CPU these are seconds of one core, whatever else runs on it at the moment.
    """
    where = pick_device(device)
    clock = time.thread_time if where.type == "cpu" else time.perf_counter
    threads = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(1)
    spent = []
    try:
        network = build_segmenter(**STUDENT).to(where)
        x = torch.zeros((1, 4, roi, roi, roi), device=where)
        for _ in range(4):
            began = clock()
            with autocast_over(x.device, x.shape[2:]):
                loss = network(x).float().square().mean()
            loss.backward()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            spent.append(clock() - began)
    finally:
        torch.set_num_threads(threads)
    return min(spent)
