"""Whole comparisons on tiny phantom hospitals: resumable, repeatable, and going on when a row fails."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fediod_med.comparison.averaging import AveragingPlan, weighted_average
from fediod_med.comparison.bench import Bench
from fediod_med.comparison.cells import Cell
from fediod_med.comparison.plan import Plan, remember
from fediod_med.comparison.profiles import get_profile
from fediod_med.comparison.rows import all_rows
from fediod_med.comparison.run import make_plan, run_comparison, write_results
from fediod_med.comparison.schedule import attempt, run_tasks, worker_devices
from fediod_med.comparison.smoke import write_smoke_sites
from fediod_med.comparison.storage import clear_leftovers, is_done, read_row, row_folder
from fediod_med.comparison.tasks import Task, all_tasks, task_done
from fediod_med.comparison.tuning import record_candidate, tuned_plan, validation_split
from fediod_med.comparison.work import perform
from fediod_med.data.partitions import patient_id
from fediod_med.errors import SettingsError
from fediod_med.evaluation import read_scores
from fediod_med.sites import Site, load_sites

SMOKE = get_profile("smoke")
FAST = ("prior", "site:*", "fedavg", "one_shot", "kd_phantoms")


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> tuple[Site, ...]:
    return load_sites(write_smoke_sites(tmp_path_factory.mktemp("phantoms")))


def plan_in(out: Path, sites: tuple[Site, ...], *rows: str) -> Plan:
    return make_plan(sites, out=out, profile=SMOKE, folds=2, seeds=[0], rows=rows or FAST, data_name="phantoms")


def do_tasks(plan: Plan, tasks: Sequence[Task]) -> None:
    """In this process, one after the other: what the workers would do."""
    for task in tasks:
        if not task_done(plan, task):
            perform(plan, task, "cpu")


def weights(plan: Plan, fold: int, row: str) -> dict[str, torch.Tensor]:
    return load_file(row_folder(plan.out, Cell(0, fold, 2), row) / "weights.safetensors")


@pytest.fixture(scope="module")
def finished(sites, tmp_path_factory) -> Plan:
    plan = plan_in(tmp_path_factory.mktemp("run") / "out", sites)
    do_tasks(plan, all_tasks(plan))
    return plan


def test_every_row_of_a_cell_is_scored_on_the_same_patients(finished) -> None:
    for cell in finished.cells:
        held = {s.subject_id for site in cell.sites(finished.sites) for s in site.subjects()[1]}
        for row in finished.rows:
            found = read_row(finished.out, cell, row)
            assert found is not None and found.done
            assert {score.subject_id for score in found.scores} == held
            assert found.record["privacy"] == "NOT PRIVATE" and found.record["data"] == "phantoms"


def test_the_one_shot_average_is_the_mean_of_the_teachers_by_patients(finished) -> None:
    cell = finished.cells[0]
    folder = cell.folder(finished.out) / "teachers"
    sizes = [len(site.subjects()[0]) for site in cell.sites(finished.sites)]
    teachers = [load_file(folder / name / "model.safetensors") for name in finished.site_names]
    expected = weighted_average(teachers, sizes)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(finished, 0, "one_shot").items())


def test_a_comparison_that_was_cut_short_and_resumed_equals_one_that_was_not(finished, sites, tmp_path) -> None:
    plan = plan_in(tmp_path / "out", sites)
    tasks = [task for task in all_tasks(plan) if task.cell.fold == 0]
    do_tasks(plan, tasks[:3])
    torn = row_folder(plan.out, plan.cells[0], "fedavg").with_name(".fedavg.1.part")
    torn.mkdir()
    (torn / "scores.csv").write_text("half a")
    clear_leftovers(plan.out)
    do_tasks(plan, tasks)
    assert not torn.exists()
    for row in ("fedavg", "one_shot", "kd_phantoms"):
        one, other = weights(finished, 0, row), weights(plan, 0, row)
        assert all(torch.equal(one[name], other[name]) for name in one), row
    for row in finished.rows:
        paths = [row_folder(p.out, plan.cells[0], row) / "scores.csv" for p in (finished, plan)]
        assert read_scores(paths[0]) == read_scores(paths[1])


def test_a_pool_made_by_several_tasks_is_that_of_one(finished, sites, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fediod_med.comparison.profiles.PHANTOMS_A_TASK", 0)
    plan = plan_in(tmp_path / "out", sites, "site:phantom-0")
    pool = [task for task in all_tasks(plan) if task.kind == "pool"]
    assert [task.key for task in pool] == [f"pool-0-part-{part}" for part in range(SMOKE.pool)]
    do_tasks(plan, pool[1:])
    assert [task_done(plan, task) for task in pool] == [False, True, True]
    do_tasks(plan, pool)
    whole = load_file(finished.out / "pools" / "seed-0.safetensors")
    images, tissues = Bench(plan, plan.cells[0], "cpu").sampler.pool()
    assert torch.equal(images, whole["images"]) and torch.equal(tissues, whole["tissues"])


def test_results_tables_and_figures_are_written_from_what_lies_there(finished) -> None:
    results = write_results(finished)
    assert json.loads((finished.out / "results.json").read_text())["rows"].keys() == set(finished.rows)
    assert all(row["complete"] and row["patients"] == 8 for row in results["rows"].values())
    assert results["rows"]["fedavg"]["bytes"]["up"]["phantom-0"] > 4_000_000  # 1.2 M parameters, float32, one round
    for name in ("table.md", "table.tex"):
        assert "NOT PRIVATE" in (finished.out / name).read_text()
    assert (finished.out / "plots" / "forest.png").is_file()


def test_a_done_row_is_not_computed_again(finished) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in finished.out.rglob("record.json")}
    outcome = run_tasks(finished, all_tasks(finished), devices=["cpu"], do=refuse)
    assert not outcome.failed and len(outcome.done) == len(all_tasks(finished))
    assert stamps == {path: path.stat().st_mtime_ns for path in finished.out.rglob("record.json")}


def refuse(plan: Plan, task: object, device: str) -> str:
    return "nothing was left to do"


def fail_one_teacher(plan: Plan, task, device: str) -> str:
    """A worker in which one hospital's training breaks; everything else is real."""
    return "no memory" if task.subject == "site:phantom-1" else attempt(plan, task, device)


def die_once(plan: Plan, task: Task, device: str) -> str:
    """A worker process that is killed in the middle of one task, the first time."""
    mark = plan.out / "died"
    if task.subject == "prior" and not mark.exists():
        mark.write_text("")
        os._exit(9)
    return ""


@pytest.mark.slow
def test_a_task_whose_worker_dies_is_tried_once_more(sites, tmp_path) -> None:
    plan = plan_in(tmp_path, sites, "prior")
    outcome = run_tasks(plan, all_tasks(plan), devices=["cpu"], do=die_once)
    assert (tmp_path / "died").exists() and not outcome.failed
    assert outcome.done == {task.key for task in all_tasks(plan)}


@pytest.mark.slow
def test_a_failed_row_is_recorded_the_others_go_on_and_resuming_mends_it(finished, sites, tmp_path) -> None:
    plan = plan_in(tmp_path / "out", sites, "prior", "site:*", "one_shot")
    remember(plan, resume=False)
    broken = run_tasks(plan, all_tasks(plan), devices=["cpu"], do=fail_one_teacher)
    cell = plan.cells[0]
    assert {key.split("/")[1] for key in broken.failed} == {"site:phantom-1", "one_shot"}
    assert is_done(plan.out, cell, "site:phantom-0") and is_done(plan.out, cell, "prior")
    record = read_row(plan.out, cell, "one_shot")
    assert record is not None and not record.done and "no memory" in record.record["reason"]
    result = run_comparison(plan, device="cpu", jobs=1, resume=True)
    assert not result.failed
    mended, whole = weights(plan, 0, "one_shot"), weights(finished, 0, "one_shot")
    assert all(torch.equal(mended[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_killed_with_its_workers_and_resumed_it_gives_the_same_rows(finished, sites, tmp_path) -> None:
    """The command is killed, not asked to stop; its workers end with it, and the rest is computed by `--resume`."""
    folder = sites[0].folder.parent
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "fediod_med.cli.main", "compare", "--profile", "smoke", "--sites", str(folder)),
        *("--out", str(out), "--folds", "2", "--seeds", "0", "--jobs", "1", "--quiet", "--device", "cpu"),
        *("--rows", " ".join(FAST), "--data-name", "phantoms"),
    ]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("cells/*/site-phantom-0/record.json")) and running.poll() is None:
        time.sleep(0.1)
    running.kill()
    assert running.wait() != 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("record.json")}
    assert before
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    for row in ("fedavg", "one_shot", "kd_phantoms"):
        kept = load_file(row_folder(out, Cell(0, 1, 2), row) / "weights.safetensors")
        whole = weights(finished, 1, row)
        assert all(torch.equal(kept[name], whole[name]) for name in whole), row


@pytest.mark.slow
def test_every_row_runs_in_worker_processes(sites, tmp_path) -> None:
    plan = make_plan(sites, out=tmp_path / "out", profile=SMOKE, folds=2, seeds=[0], rows=["*"], data_name="phantoms")
    result = run_comparison(plan, device="cpu", jobs=2)
    assert result.failed == {}
    assert set(result.results["rows"]) == set(all_rows(plan.site_names))
    assert all(row["complete"] for row in result.results["rows"].values())
    updates = {
        json.loads((row_folder(plan.out, plan.cells[0], row) / "record.json").read_text())["student_updates"]
        for row in ("ours", "kd_phantoms", "kd_noise", "asyndgan", "fediod_js_plus", "ours_without_gan")
    }
    assert updates == {SMOKE.rounds * SMOKE.student_steps}
    sent = {row: result.results["rows"][row]["bytes"]["up"]["phantom-0"] for row in ("ours", "kd_phantoms", "asyndgan")}
    assert sent["kd_phantoms"] < sent["ours"] and sent["asyndgan"] < sent["ours"]


def test_a_folder_is_not_reused_by_accident_nor_resumed_with_other_settings(finished, sites, tmp_path) -> None:
    plan = dataclasses.replace(finished, out=tmp_path / "out")
    remember(plan, resume=False)
    with pytest.raises(SettingsError, match="--resume"):
        remember(plan, resume=False)
    remember(dataclasses.replace(plan, seeds=(0, 1), rows=all_rows(plan.site_names)), resume=True)
    with pytest.raises(SettingsError, match="profile"):
        remember(dataclasses.replace(plan, profile=dataclasses.replace(SMOKE, rounds=9)), resume=True)


def test_hospitals_that_promise_privacy_are_refused(sites, tmp_path) -> None:
    private = dataclasses.replace(sites[0], privacy_mode="dp-sgd", epsilon=8.0)
    with pytest.raises(SettingsError, match="promise"):
        make_plan([private, sites[1]], out=tmp_path, profile=SMOKE, folds=2)


def test_unlike_teachers_have_no_one_shot_average(sites, tmp_path) -> None:
    mixed = [sites[0], dataclasses.replace(sites[1], backbone="segresnet", width=8)]
    kept = make_plan(mixed, out=tmp_path, profile=SMOKE, folds=2, teachers="as-sites")
    assert "one_shot" not in kept.rows and kept.sites[1].backbone == "segresnet"
    shared = make_plan(mixed, out=tmp_path, profile=SMOKE, folds=2)
    assert "one_shot" in shared.rows and {site.backbone for site in shared.sites} == {"unet"}


def test_every_task_comes_after_what_it_needs(sites, tmp_path) -> None:
    plan = make_plan(sites, out=tmp_path, profile=SMOKE, folds=2, seeds=[0, 1])
    tasks = all_tasks(plan)
    seen: set[str] = set()
    for task in tasks:
        assert seen.issuperset(task.needs), task.key
        seen.add(task.key)
    assert len(seen) == len(tasks)
    written = [(task.cell, row) for task in tasks for row in task.rows]
    assert len(written) == len(set(written)) == len(plan.rows) * len(plan.cells)


def test_tuning_never_sees_a_test_patient_and_takes_the_best_candidate(sites, tmp_path) -> None:
    for site in Cell(0, 1, 2).sites(sites):
        train, validation = validation_split(site)
        test = {patient_id(s.subject_id) for s in site.subjects()[1]}
        assert validation and not {patient_id(s.subject_id) for s in (*train, *validation)} & test
    cell = Cell(0, 0, 2)
    for number, dice in enumerate((0.4, 0.6)):
        setting = AveragingPlan(rounds=number + 1)
        record_candidate(tmp_path, cell, f"fedavg-{number}", setting, dice=dice, patients=2, seconds=1.0)
    assert tuned_plan(tmp_path, cell, SMOKE, "fedavg_tuned") == AveragingPlan(rounds=2)


def test_workers_get_a_device_each() -> None:
    assert worker_devices("cpu", 3) == ["cpu", "cpu", "cpu"]
    assert len(worker_devices("cpu", 0)) >= 1
    with pytest.raises(SettingsError, match="jobs"):
        worker_devices("cpu", -1)
