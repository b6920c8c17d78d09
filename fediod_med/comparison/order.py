"""In which order tasks are begun: those first on which the end of the run depends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fediod_med.comparison.tasks import Task


def chains(tasks: Sequence[Task], seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the begin of each task to the end of the longest chain of tasks that wait for it, by key.

    Args:
        tasks: each after what it needs.
        seconds: of each task, by key.
    """
    behind: dict[str, float] = {}
    found: dict[str, float] = {}
    for task in reversed(tasks):
        found[task.key] = seconds[task.key] + behind.get(task.key, 0.0)
        for need in task.needs:
            behind[need] = max(behind.get(need, 0.0), found[task.key])
    return found


def longest_first(tasks: Sequence[Task], seconds: Mapping[str, float]) -> list[Task]:
    """The same tasks, seed by seed, of a seed those with the longest chain first (Graham 1969, SIAM J Appl Math 17).

    What is long and comes last keeps one worker busy while the others wait. A run that is cut short still has whole
    cross-validations. Which task comes when changes no result.

    Args:
        tasks: each after what it needs; so is the result.
        seconds: of each task, by key; not negative.
    """
    length = chains(tasks, seconds)
    seeds = {seed: place for place, seed in enumerate(dict.fromkeys(task.cell.seed for task in tasks))}
    return sorted(tasks, key=lambda task: (seeds[task.cell.seed], -length[task.key]))
