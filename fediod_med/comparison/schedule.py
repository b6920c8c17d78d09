"""Runs tasks in worker processes: each as soon as what it needs is done, on a device of its own.

A task that fails is written down, with everything that waited for it, and the others go on. A task whose worker process
died is tried once more.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from fediod_med.comparison.plan import Plan
from fediod_med.comparison.storage import write_failure
from fediod_med.comparison.tasks import Task, task_done
from fediod_med.errors import FediodError, SettingsError
from fediod_med.progress import Progress, silent


@dataclass(frozen=True)
class Outcome:
    """How the tasks ended.

    Attributes:
        done: keys of tasks that were done now or before.
        failed: reason by task key.
    """

    done: frozenset[str]
    failed: dict[str, str]


Attempt = Callable[[Plan, Task, str], str]
"""Does a task in a worker process; returns why it failed, or nothing."""


def attempt(plan: Plan, task: Task, device: str) -> str:
    """Do one task; returns the reason of its failure, empty when it is done."""
    from fediod_med.comparison.work import perform

    try:
        perform(plan, task, device)
    except FediodError as error:
        return str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name}: {error}"
    return ""


def worker_devices(device: str, jobs: int) -> list[str]:
    """A device for each of `jobs` workers: the GPUs in turn where there are any; 0 jobs: one per GPU, or per core.

    Raises:
        SettingsError: fewer than 0 jobs.
    """
    if jobs < 0:
        raise SettingsError(f"--jobs: expected 1 or more, or 0 for one per GPU or core, found {jobs}")
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus:
        return [f"cuda:{n % gpus}" for n in range(jobs or gpus)]
    one = "cpu" if device in ("auto", "cpu") else device
    return [one] * (jobs or (_cores() if one == "cpu" else 1))


def run_tasks(
    plan: Plan,
    tasks: Sequence[Task],
    *,
    devices: Sequence[str],
    progress: Progress = silent,
    do: Attempt = attempt,
) -> Outcome:
    """Run what is not done yet, in the order given, as many at a time as there are devices.

    Args:
        plan: given to every task.
        tasks: each after what it needs.
        devices: one per worker.
        progress: see `Progress`.
        do: what a worker does with a task; must be importable by name.
    """
    done = {task.key for task in tasks if task_done(plan, task)}
    failed: dict[str, str] = {}
    waiting = [task for task in tasks if task.key not in done]
    tried_again: set[str] = set()
    free, running = list(devices), dict[Future[str], tuple[Task, str]]()
    pool = _workers(len(devices))
    try:
        while waiting or running:
            for task in _ready(waiting, done, len(free)):
                waiting.remove(task)
                device = free.pop()
                running[pool.submit(do, plan, task, device)] = (task, device)
            progress("comparison", len(done), len(tasks), ", ".join(task.key for task, _ in running.values()))
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in finished:
                task, device = running.pop(future)
                free.append(device)
                try:
                    reason = future.result()
                except BrokenProcessPool:
                    broken = True
                    reason = "its worker process died twice (out of memory?); use fewer --jobs and --resume"
                    if task.key not in tried_again:  # perhaps another worker died, and this one only shared its pool
                        tried_again.add(task.key)
                        waiting.insert(0, task)
                        continue
                if reason:
                    waiting = _give_up(plan, task, reason, waiting, failed)
                else:
                    done.add(task.key)
            if broken:  # every other future of this pool is broken too, and is met in the next turn
                pool.shutdown(wait=False)
                pool = _workers(len(devices))
        progress("comparison", len(done), len(tasks), "")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return Outcome(frozenset(done), failed)


def _workers(count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    share = max(1, _cores() // count)
    return ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker, initargs=(share,))


def _begin_worker(threads: int) -> None:
    """In a worker: take its share of the cores, and stop when the process that started it is gone."""
    torch.set_num_threads(threads)
    _end_with_parent()


def _end_with_parent() -> None:
    """Stop at once when the process that started this one is gone, instead of computing for nobody."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ready(waiting: Sequence[Task], done: set[str], most: int) -> list[Task]:
    return [task for task in waiting if done.issuperset(task.needs)][:most]


def _give_up(plan: Plan, task: Task, reason: str, waiting: list[Task], failed: dict[str, str]) -> list[Task]:
    """Write down a failure and those of all tasks that wait for it; returns the tasks that still can be done."""
    failed[task.key] = reason
    for row in task.rows:
        write_failure(plan.out, task.cell, row, reason)
    for dependent in [t for t in waiting if task.key in t.needs]:
        if dependent in waiting:
            left = [t for t in waiting if t is not dependent]
            waiting = _give_up(plan, dependent, f"needs {task.key}, which failed: {reason}", left, failed)
    return waiting


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
