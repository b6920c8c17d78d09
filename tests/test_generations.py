"""Generations: their shares, what teachers and students start from, and whole runs that are interrupted."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fediod_med.checkpoints import load_weights, read_provenance
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.distillation.settings import Schedule
from fediod_med.errors import SettingsError
from fediod_med.generation import Generation
from fediod_med.networks import STUDENT
from fediod_med.runs.distill import run_distillation
from fediod_med.runs.earlier import Earlier
from fediod_med.runs.generations import run_generations
from fediod_med.sites import Site, load_sites
from fediod_med.teacher import cosine_rate, train_teacher

TINY = Schedule(rounds=3, student_steps=1, checkpoint_every=1)
QUICK: dict[str, Any] = {"schedule": TINY, "pool": 3, "data_name": "phantoms", "device": "cpu"}


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> tuple[Site, ...]:
    """Two phantom hospitals; the second has a backbone that the student's weights do not fit."""
    root = tmp_path_factory.mktemp("federation")
    for number, (profile, width) in enumerate(zip(hospital_profiles(), (16, 8), strict=False)):
        name = f"h{number}"
        write_cohort(
            root / "data" / name,
            count=4,
            seed=number,
            grid=Grid((32, 32, 32), 6.0),
            profile=profile,
            prefix=f"H{number}",
        )
        (root / "sites" / name).mkdir(parents=True)
        (root / "sites" / name / "site.yaml").write_text(
            f"site_name: {name}\nlayout: brats2018\nlabel_scheme: brats2018\ndataset_dir: ../../data/{name}\nfolds: 2\n"
            f"spacing: 8.0\nroi: 16\nepochs: 3\nsteps_per_epoch: 1\nbackbone: unet\nwidth: {width}\n"
        )
    return load_sites(root / "sites")


@pytest.fixture(scope="module")
def finished(sites, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run_generations(partial(run_distillation, sites, **QUICK), generations=3, out=out, compare=False)
    return out


def weights(path: Path) -> list[Tensor]:
    return list(load_weights(path)[0].values())


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- shares -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(0, 400))
def test_shares_follow_one_another_and_none_is_empty(of: int, more: int) -> None:
    total = of + more
    shares = [Generation(number, of).share(total) for number in range(1, of + 1)]
    assert shares[0][0] == 0 and shares[-1][1] == total
    assert all(before[1] == after[0] for before, after in pairwise(shares))
    lengths = [last - first for first, last in shares]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("text", ["", "2", "2/", "/3", "0/3", "4/3", "-1/3", "1/0", "a/b", "2/3/4", "1.0/2"])
def test_what_is_no_generation_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="generation: expected"):
        Generation.parse(text)


def test_a_generation_is_written_as_it_is_read() -> None:
    assert Generation.parse("2/3") == Generation(2, 3) and str(Generation(2, 3)) == "2/3"
    assert Generation(3, 3).last and not Generation(2, 3).last
    with pytest.raises(SettingsError, match="expected 3 or more"):
        Generation(1, 3).share(2)


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_training_share_one_learning_rate_schedule(sites, tmp_path) -> None:
    """From the same start, the last ten of thirty steps move the weights far less than the ten before them."""
    assert cosine_rate(0, 30) == pytest.approx(1 / 3) and cosine_rate(29, 30) < 0.01
    site = dataclasses.replace(sites[0], epochs=30, rehearsal=0.0)
    still = dataclasses.replace(site, learning_rate=1e-12)
    start = weights(train_teacher(still, output_dir=tmp_path / "still", device="cpu", generation=Generation(1, 30)))
    moved = {}
    for number in (2, 3):
        path = train_teacher(site, output_dir=tmp_path / str(number), device="cpu", generation=Generation(number, 3))
        moved[number] = sum(float((a - b).square().sum()) for a, b in zip(weights(path), start, strict=True))
        settings = read_provenance(path).settings
        assert settings["steps"] == 10 and settings["earlier_steps"] == 10 * (number - 1)
    assert moved[3] < 0.3 * moved[2]


def test_a_teacher_goes_on_from_the_weights_it_is_given(sites, finished, tmp_path) -> None:
    still = dataclasses.replace(sites[0], epochs=1, rehearsal=0.0, learning_rate=1e-12)
    student = finished / "student.safetensors"
    path = train_teacher(still, output_dir=tmp_path, device="cpu", start=student)
    assert all(
        torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in zip(weights(path), weights(student), strict=True)
    )


def test_weights_of_another_network_and_private_hospitals_are_refused(sites, finished, tmp_path) -> None:
    other = dataclasses.replace(sites[1], rehearsal=0.0)
    with pytest.raises(SettingsError, match=r"student\.safetensors: expected weights of a .*'width': 8"):
        train_teacher(other, output_dir=tmp_path / "a", device="cpu", start=finished / "student.safetensors")
    private = dataclasses.replace(sites[0], privacy_mode="dp-sgd", epsilon=8.0)
    with pytest.raises(SettingsError, match="each further generation would be charged"):
        train_teacher(private, output_dir=tmp_path / "b", device="cpu", generation=Generation(2, 3))
    assert not list(tmp_path.rglob("*.safetensors"))


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_every_generation_does_its_part_and_starts_from_the_one_before(sites, finished) -> None:
    folders = [finished / "generation-1", finished / "generation-2", finished]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [s["generation"] for s in summaries] == ["1/3", "2/3", "3/3"]
    assert [s["rounds"] for s in summaries] == [1, 1, 1]
    steps = [read_provenance(f / "teachers" / "h0" / "model.safetensors").settings for f in folders]
    assert [s.get("earlier_steps", 0) for s in steps] == [0, 1, 2]
    students = [weights(folder / "student.safetensors") for folder in folders]
    assert not equal(students[0], students[1]) and not equal(students[1], students[2])
    earlier = Earlier(folders[1] / "student.safetensors", folders[1] / "teachers", {"down": {}, "up": {}})
    starts = earlier.starts(sites)
    assert sites[0].network() == STUDENT != sites[1].network()
    assert starts == {"h0": earlier.student, "h1": folders[1] / "teachers" / "h1" / "model.safetensors"}


def test_bytes_count_all_generations_and_the_students_that_went_down(finished) -> None:
    folders = [finished / "generation-1", finished / "generation-2", finished]
    sent = [json.loads((folder / "summary.json").read_text())["bytes"] for folder in folders]
    weight = (folders[0] / "student.safetensors").stat().st_size
    for site in ("h0", "h1"):
        down, up = ([counts[way][site] for counts in sent] for way in ("down", "up"))
        assert down[1] - down[0] > weight and down[2] - down[1] == pytest.approx(down[1] - down[0], abs=2000)
        assert up[1] - up[0] == pytest.approx(up[0], abs=2000) and up[2] - up[1] == pytest.approx(up[0], abs=2000)


def test_an_interrupted_run_of_generations_continues_with_equal_weights(sites, finished, tmp_path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"generations": 3, "out": out, "compare": False}
    stages: list[str] = []

    def stop_in_the_second(stage: str, done: int, total: int, detail: str) -> None:
        stages.append(stage)
        if stage == "distil student" and stages.count("distil student") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_generations(partial(run_distillation, sites, **QUICK, progress=stop_in_the_second), **options)
    assert (out / "generation-1" / "summary.json").is_file() and not (out / "generation-2" / "summary.json").exists()
    first = (out / "generation-1" / "summary.json").stat().st_mtime_ns
    with pytest.raises(SettingsError, match="--resume"):
        run_generations(partial(run_distillation, sites, **QUICK), **options)
    run_generations(partial(run_distillation, sites, **QUICK), resume=True, **options)
    assert (out / "generation-1" / "summary.json").stat().st_mtime_ns == first
    assert equal(weights(out / "student.safetensors"), weights(finished / "student.safetensors"))


@pytest.mark.slow
def test_one_generation_is_a_plain_run(sites, tmp_path) -> None:
    run_generations(partial(run_distillation, sites, **QUICK), generations=1, out=tmp_path / "one", compare=False)
    run_distillation(sites, out=tmp_path / "plain", compare=False, **QUICK)
    assert equal(*(weights(tmp_path / name / "student.safetensors") for name in ("one", "plain")))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"privacy_mode": "dp-sgd", "epsilon": 8.0}, {}, "h0, h1 promises privacy"),
        ({}, {"teachers": Path("teachers")}, "no --teachers"),
        ({}, {"schedule": dataclasses.replace(TINY, rounds=2)}, "expected 3 or more"),
        ({"epochs": 2}, {}, "expected 3 or more"),
    ],
)
def test_what_generations_cannot_do_is_refused_before_anything_is_written(
    sites, tmp_path, changes, options, words
) -> None:
    asked = [dataclasses.replace(site, **changes) for site in sites]
    with pytest.raises(SettingsError, match=words):
        run_generations(partial(run_distillation, asked, **{**QUICK, **options}), generations=3, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
