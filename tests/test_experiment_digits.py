"""Classification end to end on few images, and the summary by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run  # type: ignore[import-not-found]

from fediod_med.comparison.averaging import AveragingPlan, federated_average
from fediod_med.errors import SettingsError
from fediod_med.experiments.classification import ImageClient, split_among_sites
from fediod_med.experiments.digits import profile_of, summarise
from fediod_med.experiments.images import digits
from fediod_med.experiments.rows import Task, compute_rows, interval, open_folder, ratio_interval
from fediod_med.networks import build_classifier
from fediod_med.progress import silent


def test_every_image_is_at_one_site_and_small_alpha_parts_the_classes() -> None:
    labels = digits().train_y

    def classes_of(alpha: float) -> float:
        parts = split_among_sites(labels, alpha=alpha, sites=20, seed=3)
        assert sorted(i for part in parts.values() for i in part) == list(range(len(labels)))
        return sum(len(labels[part].unique()) for part in parts.values()) / 20

    assert classes_of(0.1) < 5 < 9 < classes_of(100.0)


def test_a_site_learns_and_one_site_averaged_is_that_site() -> None:
    images = digits()
    torch.manual_seed(0)
    start = build_classifier(images.shape, 10, width=4)
    client = ImageClient(images.train_x, images.train_y, steps=60, batch=32, rate=5e-3, seed=1)
    alone = federated_average(start, {"a": client}, AveragingPlan(rounds=1))
    with torch.no_grad():
        before, after = ((n.eval()(images.test_x).argmax(1) == images.test_y).float().mean() for n in (start, alone))
    assert before < 0.3 and after > 0.7


def test_intervals_draw_cases_with_all_their_seeds() -> None:
    certain = np.ones((2, 30))
    assert interval(certain) == (1.0, 1.0)
    rng = np.random.default_rng(0)
    hits = (rng.random((1, 400)) < 0.5).astype(float)
    low, high = interval(hits)
    assert low < hits.mean() < high and high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
    # Seeds that agree on every image are no more cases than one seed.
    assert interval(np.repeat(hits, 3, axis=0)) == (low, high)
    assert ratio_interval(0.5 * hits, hits) == pytest.approx((0.5, 0.5))


def test_summary_by_hand() -> None:
    def cell(student: str, seed: int) -> dict:
        texts = {"ensemble": "1110", "fedavg": "1111", "pooled": "1111", "untrained_generator": "0000"}
        rows = {name: {"correct": text} for name, text in {**texts, "student": student}.items()}
        sites = {"a": {"images": 3, "accuracy": 0.25}, "b": {"images": 5, "accuracy": 0.75}}
        return {"alpha": 1.0, "seed": seed, "rows": rows, "sites": sites, "bytes_up": 10.0, "bytes_down": 20.0}

    found = summarise([cell("1100", 0), cell("1110", 1)])
    assert found["ratio"] == pytest.approx([2 / 3, 1.0])
    assert found["rows"]["student"]["accuracy"] == [0.5, 0.75]
    # By image: right with both seeds, both, one, none; the untrained generator's student with none.
    assert found["student_minus"]["untrained_generator"]["mean"] == pytest.approx(0.625)
    assert found["student_minus"]["pooled"]["mean"] == pytest.approx(-0.375)
    assert found["sites"] == {"mean": [0.5, 0.5], "best": [0.75, 0.75], "images": [3, 5]}


def test_finished_rows_are_not_computed_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def task(key: str) -> Task:
        def run() -> dict[str, int]:
            ran.append(key)
            return {"value": len(ran)}

        return Task(key, run)

    open_folder(tmp_path / "e", {"size": 1}, resume=False)
    compute_rows(tmp_path / "e", [task("a")], progress=silent)
    open_folder(tmp_path / "e", {"size": 1}, resume=True)
    rows = compute_rows(tmp_path / "e", [task("a"), task("b")], progress=silent)
    assert ran == ["a", "b"] and (rows["a"]["value"], rows["b"]["value"]) == (1, 2)
    assert rows["a"]["privacy"] == "NOT PRIVATE"
    with pytest.raises(SettingsError, match="new or empty folder"):
        open_folder(tmp_path / "e", {"size": 1}, resume=False)
    with pytest.raises(SettingsError, match="others in size"):
        open_folder(tmp_path / "e", {"size": 2}, resume=True)


def test_tuning_never_scores_the_seeds_or_images_of_the_full_run() -> None:
    full, tune = profile_of("full", images="digits"), profile_of("tune", images="digits")
    assert tune.validation and not full.validation
    assert not set(full.seeds) & set(tune.seeds) and full.setup == tune.setup
    with pytest.raises(SettingsError, match="full, tune or smoke"):
        profile_of("huge", images="digits")


def test_smoke_of_the_digits(tmp_path: Path) -> None:
    code, output = run("experiment", "digits", "--profile", "smoke", "--out", tmp_path / "d", "--quiet")
    assert code == 0 and "NOT PRIVATE" in output and "Not for clinical use" in output
    results = json.loads((tmp_path / "d" / "results.json").read_text())
    (row,) = results["rows"].values()
    assert set(row["rows"]) == {"ensemble", "fedavg", "pooled", "student", "untrained_generator"}
    assert all(len(r["correct"]) == 360 for r in row["rows"].values())
    assert sum(site["images"] for site in row["sites"].values()) == 1437
    table = (tmp_path / "d" / "table.md").read_text()
    assert table.startswith("**NOT PRIVATE. Research software. Not for clinical use. Scores on digits.**")
    assert "Student / ensemble" in table
    before = (tmp_path / "d" / "rows" / "chosen-alpha-1-seed-0.json").read_bytes()
    code, _ = run("experiment", "digits", "--profile", "smoke", "--out", tmp_path / "d", "--quiet", "--resume")
    assert code == 0 and (tmp_path / "d" / "rows" / "chosen-alpha-1-seed-0.json").read_bytes() == before


def test_smoke_of_cifar_from_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar"
    folder.mkdir()
    for part, count in (("train", 40), ("test", 10)):
        labels = np.arange(count) % 2
        images = (rng.integers(0, 60, (count, 32, 32, 3)) + 150 * labels[:, None, None, None]).astype(np.uint8)
        np.savez(folder / f"{part}.npz", images=images, labels=labels)
    command = ("experiment", "cifar", "--profile", "smoke", "--out", tmp_path / "c", "--quiet")
    code, output = run(*command)
    assert code == 2 and "--images" in output
    code, output = run(*command, "--images", folder)
    assert code == 0 and "Student / ensemble" in output


def test_unknown_experiments_are_refused(tmp_path: Path) -> None:
    code, output = run("experiment", "mnist", "--out", tmp_path / "x")
    assert code == 2 and "expected digits, cifar, backbones, divergence, scaling" in output
