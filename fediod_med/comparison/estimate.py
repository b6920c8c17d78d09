"""How long a comparison will take: one timed training step, the passes of each task, and the processor's own share.

On CPUs a task is its passes. On a GPU all workers share the device, and each prepares its volumes on its own core
meanwhile, so the run takes as long as the device, the workers, or the longest chain of tasks, whichever takes longest.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fediod_med.comparison.order import chains, longest_first
from fediod_med.comparison.plan import Plan
from fediod_med.comparison.profiles import Profile
from fediod_med.comparison.rows import AVERAGING, DISTILLED, SITE
from fediod_med.comparison.students import Recipe, recipe
from fediod_med.comparison.tasks import Task, task_done
from fediod_med.data.sampler import training_grid
from fediod_med.devices import autocast_over, pick_device
from fediod_med.distillation.settings import generator_rounds
from fediod_med.federation.critic_design import CriticDesign
from fediod_med.networks import STUDENT, build_segmenter

# In training passes: forward and backward of one crop.
SCAN_PASSES = 8.0  # on a CPU: reading, predicting and scoring one held-out scan at 4 mm
ANSWER_PASSES = 0.5  # one volume at one hospital: the teacher's answer
CRITIC_PASSES = 1.0  # the same: a plain discriminator's step and judgement
DESIGN_COSTS = {
    "scales": 0.3,
    "augment": 0.3,
    "penalty": 1.4,
    "spectral": 0.1,
    "joint": 2.7,
}  # parts of that, beyond it
EXCHANGE_PASSES = 1.2  # the same: pull-back, and the generator's share
LOCAL_PASSES = 1.25  # one crop of local training, with augmentation on the same core
MIRRORS = 8  # images of a volume that an answer averaged over mirrors looks at

# In seconds of one core, measured at 1 mm; volumes in millions of voxels.
PHANTOM_SECONDS = 1.4  # a million voxels of a phantom
ANATOMY_SECONDS = 0.3  # a million voxels of the anatomy that a task grows its phantoms in
SCAN_SECONDS = 0.3  # a million voxels of a scan on the working grid: reading and resampling
SCORE_SECONDS = 0.1  # one held-out scan: the way to its own grid, Dice and HD95
CROP_SECONDS = 0.12  # a million voxels of an augmented crop
TRIP_SECONDS = 0.09  # a million voxels of a message to or from a hospital, packed and unpacked
STUDENT_SECONDS = 0.035  # a million voxels of a student's batch: draw, noise, transport
# Beside a GPU, however small the volumes are: launching its work and waiting for it; from records of runs at 4 mm.
STEP_SECONDS = 0.07  # a step of local training
STUDENT_STEP_SECONDS = 0.05
ANSWER_SECONDS = 0.02  # one hospital's answer to one question
CRITIC_SECONDS = 0.04  # one step of its discriminator
PULL_SECONDS = 0.04  # its pull-back, with its share of the generator's step
OPENING_SECONDS = 3.0  # a distilled row at 4 mm: reading the hospitals' scans
START_SECONDS = 15.0  # a worker process that is to use a GPU
FULL_GPU = 2 * 96**3  # voxels with which a GPU has work enough to hide the launching of it
HEAD_MM = (152.0, 176.0, 152.0)  # a scan cropped to its brain
OVERLAP = 0.25  # of windows, as `inference.DEFAULT_OVERLAP`


@dataclass(frozen=True)
class Load:
    """What a task asks for.

    Attributes:
        core: seconds of one core.
        gpu: seconds of a GPU that does nothing else; 0 on a CPU.
    """

    core: float
    gpu: float = 0.0

    @property
    def alone(self) -> float:
        """Seconds when no other task runs."""
        return self.core + self.gpu


def estimate(plan: Plan, tasks: Sequence[Task], devices: Sequence[str]) -> str:
    """A sentence: tasks that are left, their hours on one worker and on all of them."""
    left = [task for task in tasks if not task_done(plan, task)]
    second = pass_seconds(plan.profile.roi, devices[0])
    on_gpu = pick_device(devices[0]).type == "cuda"
    loads = task_loads(plan, left, second=second, gpu=on_gpu)
    total = sum(load.alone for load in loads.values())
    wall = wall_seconds(left, loads, workers=len(devices), gpus=len(set(devices)) if on_gpu else 0)
    return (
        f"comparison: {len(left)} of {len(tasks)} tasks to do, {len(plan.rows)} rows in {len(plan.cells)} cells; about "
        f"{total / 3600:.1f} h of work, {_duration(wall)} with {len(devices)} workers ({second:.3f} s a pass)"
    )


def in_order(plan: Plan, tasks: Sequence[Task]) -> list[Task]:
    """The same tasks, of each seed those first that the end of the run waits for; see `order.longest_first`."""
    loads = task_loads(plan, tasks, second=1.0, gpu=False)
    return longest_first(tasks, {key: load.alone for key, load in loads.items()})


def wall_seconds(
    tasks: Sequence[Task], loads: Mapping[str, Load], *, workers: int, gpus: int, start: float = START_SECONDS
) -> float:
    """From the begin of the first task to the end of the last.

    Args:
        tasks: each after what it needs, or after what is done already.
        loads: of each task, by key.
        workers: that share the tasks.
        gpus: that the workers share; 0 on a CPU.
        start: of a worker on a GPU.
    """
    if not gpus:
        return sum(load.alone for load in loads.values()) / workers
    # Nothing but the public prior can begin before the phantoms are there.
    parts = [loads[task.key].alone for task in tasks if task.kind == "pool"]
    rest = [task for task in tasks if task.kind != "pool"]
    longest = max(chains(rest, {task.key: loads[task.key].alone for task in rest}).values(), default=0.0)
    device = sum(loads[task.key].gpu for task in rest) / gpus
    shared = sum(loads[task.key].alone for task in rest) / workers
    return start + math.ceil(len(parts) / workers) * max(parts, default=0.0) + max(longest, device, shared)


def task_loads(plan: Plan, tasks: Sequence[Task], *, second: float, gpu: bool) -> dict[str, Load]:
    """What each task asks for, by key.

    Args:
        plan: of the comparison.
        tasks: of the plan.
        second: seconds of a training pass, see `pass_seconds`.
        gpu: whether passes are made on a GPU, beside the cores.
    """
    patients = {site.site_name: len(dataclasses.replace(site, folds=1, fold=0).subjects()[0]) for site in plan.sites}
    return {task.key: _load(plan, task, patients, second=second, gpu=gpu) for task in tasks}


def _load(plan: Plan, task: Task, patients: Mapping[str, int], *, second: float, gpu: bool) -> Load:
    profile = plan.profile
    held = sum(patients.values()) / plan.folds
    if task.kind == "pool":
        head = math.prod(training_grid(profile.spacing).shape) / 1e6
        return Load(head * (PHANTOM_SECONDS * len(profile.pool_parts[task.part]) + ANATOMY_SECONDS))
    if not gpu:
        opening = OPENING_SECONDS if task.subject in DISTILLED else 0.0
        return Load(_passes(plan, task, crop=LOCAL_PASSES, scans=held * SCAN_PASSES) * second + opening)
    scans = held * ANSWER_PASSES * scan_windows(profile)
    return Load(_core_seconds(plan, task, patients), _passes(plan, task, crop=1.0, scans=scans) * second)


def _passes(plan: Plan, task: Task, *, crop: float, scans: float) -> float:
    """Training passes that a task is worth, `crop` for a crop of local training, `scans` for all held-out scans."""
    profile, hospitals = plan.profile, len(plan.sites)
    local = _crops(plan) * crop
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
        rounds = row.schedule.rounds
        judged = rounds if row.generator is not None and row.objective.needs_discriminators else 0
        images = MIRRORS if row.schedule.mirrored else 1
        asked = _asked(row)
        exchange = images * (ANSWER_PASSES * rounds + EXCHANGE_PASSES * asked) + _critic_passes(row) * judged
        exchange *= row.schedule.batch * hospitals
        if row.schedule.candidates > 1:
            exchange += ANSWER_PASSES * rounds * row.schedule.batch * row.schedule.candidates
        if row.generations > 1:
            exchange += local
        return exchange + rounds * row.schedule.student_steps * row.schedule.student_batch + scans
    return scans


def _critic_passes(row: Recipe) -> float:
    """A discriminator's step and judgement on one volume, by its design; a third scale would cost next to nothing."""
    plain, design = dataclasses.asdict(CriticDesign()), dataclasses.asdict(row.critic)
    return CRITIC_PASSES * (1 + sum(cost for part, cost in DESIGN_COSTS.items() if design[part] != plain[part]))


def scan_windows(profile: Profile) -> int:
    """Windows over one head on the working grid."""
    stride = profile.roi * (1 - OVERLAP)
    return math.prod(1 + max(0, math.ceil((edge / profile.spacing - profile.roi) / stride)) for edge in HEAD_MM)


def _core_seconds(plan: Plan, task: Task, patients: Mapping[str, int]) -> float:
    """Seconds of a core beside a GPU: reading, augmentation, messages, scores."""
    profile, hospitals = plan.profile, len(plan.sites)
    window = profile.roi**3 / 1e6
    read = SCAN_SECONDS * math.prod(HEAD_MM) / profile.spacing**3 / 1e6
    held = sum(patients.values()) / plan.folds
    train = sum(patients.values()) - held
    scored = held * (read + SCORE_SECONDS)
    crops = _crops(plan) * (window * CROP_SECONDS + STEP_SECONDS / plan.sites[0].batch_size)
    if task.kind == "ensembles":
        critics = profile.rounds * hospitals * (2 * window * STUDENT_SECONDS + CRITIC_SECONDS)
        return train * read + critics + scored + (len(task.rows) - 1) * held * SCORE_SECONDS
    if task.subject.startswith(SITE):
        own = patients[task.subject.removeprefix(SITE)] * (1 - 1 / plan.folds)
        return own * read + crops / hospitals + scored
    if task.kind == "tuning" or task.subject == "pooled" or task.subject in AVERAGING:
        return train * read + crops + scored
    if task.subject in DISTILLED:
        row = recipe(task.subject, profile)
        trip = row.schedule.batch * window * TRIP_SECONDS
        judged = CRITIC_SECONDS if row.generator is not None and row.objective.needs_discriminators else 0.0
        asked = row.schedule.rounds * (trip + ANSWER_SECONDS + judged) + _asked(row) * (trip + PULL_SECONDS)
        step = STUDENT_STEP_SECONDS + row.schedule.student_batch * window * STUDENT_SECONDS
        learned = row.schedule.rounds * row.schedule.student_steps * step + (crops if row.generations > 1 else 0.0)
        return train * read + hospitals * asked + learned + scored
    return (train * read if task.subject == "one_shot" else 0.0) + scored


def _crops(plan: Plan) -> int:
    """Crops of local training of all hospitals together."""
    return sum(site.epochs * site.steps_per_epoch for site in plan.sites) * plan.sites[0].batch_size


def _asked(row: Recipe) -> int:
    """Rounds of a distilled row that ask about the generator's volumes."""
    if row.generator is None:
        return 0
    return generator_rounds(row.schedule) if row.generator == "conditional" else row.schedule.rounds


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def pass_seconds(roi: int, device: str) -> float:
    """Seconds of one forward and backward pass of the student's network over one crop.

    On a CPU these are seconds of one core, whatever else runs on it at the moment. On a GPU a batch of crops fills it:
    with one small crop it would wait for launches, in which other workers can use it.
    """
    where = pick_device(device)
    batch = 1 if where.type == "cpu" else min(64, max(1, FULL_GPU // roi**3))
    clock = time.thread_time if where.type == "cpu" else time.perf_counter
    threads = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(1)
    spent = []
    try:
        network = build_segmenter(**STUDENT).to(where)
        x = torch.zeros((batch, 4, roi, roi, roi), device=where)
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
    return min(spent) / batch
