"""What is begun first, and how long a run is said to take."""

from __future__ import annotations

import dataclasses

import pytest

from fediod_med.comparison.cells import Cell
from fediod_med.comparison.estimate import (
    OPENING_SECONDS,
    Load,
    estimate,
    in_order,
    scan_windows,
    task_loads,
    wall_seconds,
)
from fediod_med.comparison.order import chains, longest_first
from fediod_med.comparison.plan import Plan
from fediod_med.comparison.profiles import get_profile
from fediod_med.comparison.run import make_plan
from fediod_med.comparison.students import recipe
from fediod_med.comparison.tasks import Task, all_tasks
from fediod_med.data.sampler import training_grid
from fediod_med.sites import load_sites

CENTRAL = ("prior", "site:*", "ensemble_*", "pooled", "fedavg", "one_shot", "kd_phantoms", "ours", "kd_real")


def task(key: str, *needs: str, seed: int = 0) -> Task:
    return Task(key, "pool" if key.startswith("pool") else "row", Cell(seed, 0, 2), needs=needs)


DIAMOND = [task("pool"), task("short", "pool"), task("long", "pool"), task("last", "short"), task("alone")]
SECONDS = {"pool": 1.0, "short": 2.0, "long": 9.0, "last": 4.0, "alone": 3.0}


def test_a_chain_is_what_still_waits_behind_a_task() -> None:
    assert chains(DIAMOND, SECONDS) == {"alone": 3.0, "last": 4.0, "long": 9.0, "short": 6.0, "pool": 10.0}


def test_the_longest_chain_begins_first_and_seeds_follow_each_other() -> None:
    other = [task("pool-1", seed=1), task("huge", "pool-1", seed=1)]
    tasks = longest_first([*DIAMOND, *other], {**SECONDS, "pool-1": 50.0, "huge": 500.0})
    assert [t.key for t in tasks] == ["pool", "long", "short", "last", "alone", "pool-1", "huge"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """Two hospitals of four empty files each: only their number counts."""
    folder = tmp_path_factory.mktemp("sites")
    for site in ("north", "south"):
        for number in range(4):
            name = f"Brats18_{site.upper()}_{number}_1"
            case = folder / "data" / site / name
            case.mkdir(parents=True)
            for ending in ("t1ce", "t1", "t2", "flair", "seg"):
                (case / f"{name}_{ending}.nii.gz").touch()
        (folder / site).mkdir()
        (folder / site / "site.yaml").write_text(
            f"site_name: {site}\nlayout: brats2018\nlabel_scheme: brats2018\ndataset_dir: ../data/{site}\n"
        )
    return make_plan(load_sites(folder), out=folder / "out", profile=get_profile("gpu"), folds=2, seeds=[0, 1])


def test_tasks_stay_after_what_they_need(plan) -> None:
    tasks = all_tasks(plan)
    ordered = in_order(plan, tasks)
    assert sorted(t.key for t in ordered) == sorted(t.key for t in tasks) and ordered != tasks
    seen: set[str] = set()
    for one in ordered:
        assert seen.issuperset(one.needs), one.key
        seen.add(one.key)


def test_a_pool_at_1_mm_is_made_by_many_workers_and_that_at_4_mm_by_one(plan) -> None:
    for name, parts in (("gpu", 12), ("cpu", 1), ("smoke", 1)):
        profile = get_profile(name)
        assert [n for part in profile.pool_parts for n in part] == list(range(profile.pool))
        assert len(profile.pool_parts) == parts
    pool = {t.key for t in all_tasks(plan) if t.kind == "pool" and t.cell.seed == 0}
    assert len(pool) == 12 and {t.part for t in all_tasks(plan) if t.kind == "pool"} == set(range(12))
    for one in all_tasks(plan):
        if one.kind != "pool":
            waits = set(one.needs) & pool
            assert waits == (pool if one.cell.seed == 0 and one.subject != "prior" else set()), one.key


def test_on_cores_the_work_is_divided_among_the_workers() -> None:
    loads = {key: Load(seconds) for key, seconds in SECONDS.items()}
    assert wall_seconds(DIAMOND, loads, workers=2, gpus=0) == pytest.approx(9.5)


@pytest.mark.parametrize(
    ("gpu", "workers", "expected"),
    [
        (0.0, 8, 7 + 1 + 9),  # the longest chain behind the phantoms
        (10.0, 8, 7 + 1 + 40),  # four rows share one device
        (0.0, 1, 7 + 1 + 18),  # one worker does everything
    ],
)
def test_on_a_gpu_the_scarcest_thing_decides(gpu: float, workers: int, expected: float) -> None:
    loads = {key: Load(seconds, 0.0 if key == "pool" else gpu) for key, seconds in SECONDS.items()}
    if gpu:
        loads |= {key: Load(0.0, gpu) for key in SECONDS if key != "pool"}
    assert wall_seconds(DIAMOND, loads, workers=workers, gpus=1, start=7.0) == pytest.approx(expected)


def test_the_comparison_at_1_mm_fits_half_an_hour_of_one_gpu(plan) -> None:
    """With 25 ms of the GPU for a pass, central rows, one seed; the plan has 8 patients, the real one 26."""
    small = dataclasses.replace(plan, seeds=(0,), rows=make_plan_rows(plan))
    tasks = in_order(small, all_tasks(small))
    loads = task_loads(small, tasks, second=0.025, gpu=True)
    assert 5 * 60 < wall_seconds(tasks, loads, workers=15, gpus=1) < 30 * 60
    pool = [load for key, load in loads.items() if key.startswith("pool")]
    assert max(load.core for load in pool) < 60 and not any(load.gpu for load in pool)


def make_plan_rows(plan: Plan) -> tuple[str, ...]:
    """The central rows, by their keys."""
    return make_plan(plan.sites, out=plan.out, profile=plan.profile, folds=2, seeds=[0], rows=CENTRAL).rows


@pytest.mark.parametrize("gpu", [False, True])
def test_a_row_is_counted_by_its_own_schedule(plan, gpu) -> None:
    """A round for each student step: the questions of `ours` so many times, the student's work the same."""
    rows = ("ours", "ours_with_rounds", "prior")
    loads = task_loads(plan, [Task(row, "row", plan.cells[0], subject=row) for row in rows], second=1.0, gpu=gpu)
    schedule, profile = recipe("ours", plan.profile).schedule, plan.profile
    ours, more, _ = ((load.gpu if gpu else load.core) for load in (loads[row] for row in rows))
    questions = (more - ours) / (profile.student_steps - 1)  # of the rounds of `ours`
    student = profile.rounds * profile.student_steps * schedule.student_batch
    rest = ours - questions - student
    scans = loads["prior"].gpu if gpu else loads["prior"].core
    assert questions > 0 and rest == pytest.approx(scans if gpu else scans + OPENING_SECONDS)


def test_a_dearer_discriminator_makes_a_longer_row(plan) -> None:
    rows = ("ours", "ours_with_spectral", "ours_with_scales", "ours_with_penalty", "ours_with_joint")
    loads = task_loads(plan, [Task(row, "row", plan.cells[0], subject=row) for row in rows], second=1.0, gpu=False)
    costs = [loads[row].core for row in rows]
    assert costs == sorted(costs) and len({*costs}) == len(costs)


def test_windows_over_a_head() -> None:
    assert scan_windows(get_profile("gpu")) == 12 and scan_windows(get_profile("cpu")) == 1
    assert training_grid(1.0).shape == (192, 224, 192)


def test_the_announcement_says_what_is_left(plan) -> None:
    small = dataclasses.replace(plan, profile=dataclasses.replace(plan.profile, roi=16), rows=("prior",))
    text = estimate(small, all_tasks(small), ["cpu", "cpu"])
    assert text.startswith("comparison: 4 of 4 tasks to do, 1 rows in 4 cells; about ") and "with 2 workers" in text
