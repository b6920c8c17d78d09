"""What has to be done for a comparison, in which order, and what waits for what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fediod_med.comparison.cells import Cell
from fediod_med.comparison.plan import Plan
from fediod_med.comparison.rows import AVERAGING, DISTILLED, ENSEMBLES, SITE
from fediod_med.comparison.storage import is_done, pool_paths
from fediod_med.comparison.tuning import candidate_names, is_tuned


@dataclass(frozen=True)
class Task:
    """One piece of work for one worker process.

    Attributes:
        key: unique, such as `fold-0-seed-0/ours`.
        kind: `pool`, `tuning`, `ensembles` or `row`.
        cell: the cell; a part of a pool belongs to all cells of its seed.
        rows: rows that it writes.
        subject: row or tuning candidate.
        needs: keys of tasks that must be done before.
        part: of the pool, from 0.
    """

    key: str
    kind: str
    cell: Cell
    rows: tuple[str, ...] = ()
    subject: str = ""
    needs: tuple[str, ...] = ()
    part: int = 0


def all_tasks(plan: Plan) -> list[Task]:
    """Every task of a plan, each after what it needs: the pools, which many wait for, then cell by cell, row by row."""
    tasks: dict[str, Task] = {}

    def add(task: Task) -> str:
        tasks.setdefault(task.key, task)
        return task.key

    for seed in plan.seeds if any(row != "prior" for row in plan.rows) else ():
        for part, key in enumerate(_pool(plan, seed)):
            add(Task(key, "pool", Cell(seed, 0, plan.folds), part=part))
    for cell in plan.cells:
        pool = _pool(plan, cell.seed)
        teachers = tuple(f"{cell.name}/{SITE}{name}" for name in plan.site_names)
        for row in plan.rows:
            key, kind, subject = f"{cell.name}/{row}", "row", row
            needs: tuple[str, ...] = pool
            written: tuple[str, ...] = (row,)
            if row == "prior":
                needs = ()
            elif row in ENSEMBLES:
                key, kind, subject = f"{cell.name}/ensembles", "ensembles", ""
                written = tuple(r for r in plan.rows if r in ENSEMBLES)
            if row in ENSEMBLES or row in DISTILLED or row == "one_shot":
                needs = (*pool, *(add(_teacher(cell, name, pool)) for name in plan.site_names))
            if row in AVERAGING and row.endswith("_tuned"):
                needs = (*pool, *_tuning(plan, cell, row, add))
                plain = row.removesuffix("_tuned")
                needs += (f"{cell.name}/{plain}",) if plain in plan.rows else ()
            if key not in teachers:
                add(Task(key, kind, cell, written, subject, needs))
            else:
                add(_teacher(cell, row.removeprefix(SITE), pool))
    return _after_needs(list(tasks.values()))


def task_done(plan: Plan, task: Task) -> bool:
    """Whether what a task makes lies on disk already."""
    if task.kind == "pool":
        return pool_paths(plan.out, task.cell.seed, len(plan.profile.pool_parts))[task.part].is_file()
    if task.kind == "tuning":
        return is_tuned(plan.out, task.cell, task.subject)
    return all(is_done(plan.out, task.cell, row) for row in task.rows)


def _pool(plan: Plan, seed: int) -> tuple[str, ...]:
    """Keys of the tasks that make a seed's phantoms."""
    parts = len(plan.profile.pool_parts)
    return (f"pool-{seed}",) if parts == 1 else tuple(f"pool-{seed}-part-{part}" for part in range(parts))


def _teacher(cell: Cell, name: str, pool: tuple[str, ...]) -> Task:
    row = SITE + name
    return Task(f"{cell.name}/{row}", "row", cell, (row,), row, pool)


def _tuning(plan: Plan, cell: Cell, row: str, add: Callable[[Task], str]) -> tuple[str, ...]:
    """Keys of the tuning tasks that a tuned row waits for; they belong to the first seed's cell of the same fold."""
    home = Cell(plan.seeds[0], cell.fold, plan.folds)
    pool = _pool(plan, home.seed)
    fedavg, fedprox = candidate_names(plan.profile)
    first = tuple(add(Task(f"{home.name}/tuning-{name}", "tuning", home, (), name, pool)) for name in fedavg)
    if row.startswith("fedavg"):
        return first
    return tuple(add(Task(f"{home.name}/tuning-{name}", "tuning", home, (), name, (*pool, *first))) for name in fedprox)


def _after_needs(tasks: list[Task]) -> list[Task]:
    """The same tasks, each after what it needs, otherwise in the order given."""
    by_key = {task.key: task for task in tasks}
    ordered: dict[str, Task] = {}

    def place(task: Task) -> None:
        for need in task.needs:
            place(by_key[need])
        ordered.setdefault(task.key, task)

    for task in tasks:
        place(task)
    return list(ordered.values())
