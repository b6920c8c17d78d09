"""The whole comparison: plan, estimate, tasks, results."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fediod_med.checkpoints import current_commit
from fediod_med.comparison.estimate import estimate, in_order
from fediod_med.comparison.plan import AS_SITES, SHARED, Plan, planned_sites, remember
from fediod_med.comparison.plots import write_plots
from fediod_med.comparison.profiles import Profile
from fediod_med.comparison.results import gather
from fediod_med.comparison.rows import chosen_rows
from fediod_med.comparison.schedule import run_tasks, worker_devices
from fediod_med.comparison.storage import clear_leftovers, read_row
from fediod_med.comparison.tables import latex, markdown
from fediod_med.comparison.tasks import all_tasks
from fediod_med.comparison.tuning import tuning_record
from fediod_med.durable import write_atomically
from fediod_med.errors import SettingsError
from fediod_med.progress import Progress, silent
from fediod_med.records import run_record, write_json
from fediod_med.sites import Site

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison left.

    Attributes:
        out: run folder.
        results: content of `results.json`.
        failed: reason by task; empty when every row is there.
    """

    out: Path
    results: Mapping[str, Any]
    failed: Mapping[str, str]


def make_plan(
    sites: Sequence[Site],
    *,
    out: Path,
    profile: Profile,
    folds: int = 3,
    seeds: Sequence[int] = (0, 1, 2),
    rows: Sequence[str] = (),
    teachers: str = SHARED,
    data_name: str = "patients",
) -> Plan:
    """Check everything that can be checked before anything is computed.

    Args:
        sites: hospitals.
        out: run folder.
        profile: sizes.
        folds: every hospital's patients are cut into so many parts; each is tested once per seed.
        seeds: repetitions.
        rows: keys or patterns; when empty, all but `ours_with_*` and `*_generations`.
        teachers: `shared` or `as-sites`.
        data_name: `patients` or `phantoms`.

    Raises:
        SettingsError: settings do not fit together.
        InputError: a patient at two hospitals, or data that are not what the site files say.
    """
    if folds < 2 or not seeds or min(seeds) < 0:
        raise SettingsError(f"compare: expected 2 or more folds and seeds of 0 or more, found {folds}, {list(seeds)}")
    planned = planned_sites(sites, profile, teachers=teachers)
    keys = chosen_rows(rows, [site.site_name for site in planned])
    unlike = len({tuple(site.network().items()) for site in planned}) > 1
    if teachers == AS_SITES and unlike:
        keys = tuple(key for key in keys if key != "one_shot")  # networks of different shapes have no average
    plan = Plan(out, planned, profile, folds, tuple(dict.fromkeys(seeds)), keys, data_name, teachers)
    for cell in plan.cells[:folds]:
        for site in cell.sites(planned):
            site.subjects()  # a hospital with fewer patients than folds is found here
    return plan


def run_comparison(
    plan: Plan,
    *,
    device: str = "auto",
    jobs: int = 0,
    resume: bool = False,
    progress: Progress = silent,
    announce: Callable[[str], None] = logger.info,
) -> ComparisonResult:
    """Compute every row that is not there yet, then write results, tables and figures.

    Args:
        plan: see `make_plan`.
        device: see `devices.pick_device`.
        jobs: worker processes; 0: one per GPU, or per core.
        resume: continue the comparison that the folder holds.
        progress: see `Progress`.
        announce: receives the estimate before anything is computed.

    Raises:
        SettingsError: the folder is in use, or its settings differ.
    """
    devices = worker_devices(device, jobs)
    remember(plan, resume=resume)
    clear_leftovers(plan.out)
    tasks = in_order(plan, all_tasks(plan))
    announce(estimate(plan, tasks, devices))
    began = time.perf_counter()
    outcome = run_tasks(plan, tasks, devices=devices, progress=progress)
    results = write_results(plan, failed=outcome.failed)
    record = run_record(
        command="compare",
        device=", ".join(dict.fromkeys(devices)),
        commit=current_commit(),
        options={"jobs": len(devices), "resume": resume, "profile": plan.profile.name, "rows": plan.rows},
        privacy="NOT PRIVATE",
        seeds={f"repetition {n}": seed for n, seed in enumerate(plan.seeds)},
        seconds={"this start": time.perf_counter() - began},
        cases={key: {"status": "failed", "reason": reason} for key, reason in outcome.failed.items()},
    )
    write_json(plan.out / "run.json", record)
    return ComparisonResult(plan.out, results, outcome.failed)


def write_results(plan: Plan, *, failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Gather all rows that lie in the run folder; writes `results.json`, `table.md`, `table.tex` and `plots/`.

    Args:
        plan: of the comparison.
        failed: reasons by task, for the record.
    """
    stored = {
        key: [row for cell in plan.cells if (row := read_row(plan.out, cell, key)) is not None] for key in plan.rows
    }
    homes = [cell for cell in plan.cells if cell.seed == plan.seeds[0]]
    about = {
        "data": plan.data_name,
        "profile": dataclasses.asdict(plan.profile),
        "teachers": plan.teachers,
        "folds": plan.folds,
        "seeds": plan.seeds,
        "hospitals": plan.site_names,
        "commit": current_commit(),
        "tuning": tuning_record(plan.out, homes, plan.profile),
        "failed_tasks": dict(failed or {}),
    }
    results = gather(stored, site_names=plan.site_names, cells=len(plan.cells), about=about)
    write_json(plan.out / "results.json", results)
    for name, text in (("table.md", markdown(results)), ("table.tex", latex(results))):
        write_atomically(plan.out / name, partial(_write, text))
    write_plots(plan.out / "plots", results)
    return results


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
