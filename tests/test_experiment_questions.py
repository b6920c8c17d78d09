"""The open questions on phantoms: designs, summaries by hand, and each experiment end to end at its smallest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run  # type: ignore[import-not-found]

from fediod_med.data.phantoms import Anatomy, Grid, load_anatomy
from fediod_med.errors import SettingsError
from fediod_med.experiments import backbones, divergence, scaling
from fediod_med.experiments.phantom_hospitals import (
    PhantomHospital,
    class_counts,
    dice_record,
    ensemble_dice,
    fresh_network,
    held_out_patients,
    network_dice,
    patients,
    trained_teacher,
)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return load_anatomy(Grid((16, 16, 16), 12.0))


def test_patients_are_of_their_profiles_and_held_out_ones_are_others(anatomy: Anatomy) -> None:
    own, tests = patients([2, 1], seed=0, anatomy=anatomy), held_out_patients(7, seed=0, anatomy=anatomy)
    assert own.profiles == ("academic-3t", "academic-3t", "community-1t") and own.images.shape == (3, 4, 16, 16, 16)
    assert len(tests.profiles) == 7 and len(set(tests.profiles)) == 5
    assert not any(torch.equal(a, b) for a in own.images for b in tests.images)
    assert torch.equal(own.images, patients([2, 1], seed=0, anatomy=anatomy).images)
    assert not torch.equal(own.images[0], patients([2, 1], seed=1, anatomy=anatomy).images[0])
    assert own.presence()[:, 0].tolist() == [1, 1, 1]


def test_a_larger_cohort_keeps_the_patients_of_the_smaller(anatomy: Anatomy) -> None:
    small, large = (scaling.cohort_of(n, seed=0, anatomy=anatomy) for n in (6, 11))
    assert (len(small.profiles), len(large.profiles)) == (6, 11)
    kept = [any(torch.equal(a, b) for b in large.images) for a in small.images]
    assert all(kept)


def test_a_teacher_kept_from_an_interrupted_run_is_not_trained_again(anatomy: Anatomy, tmp_path: Path) -> None:
    own = patients([1], seed=0, anatomy=anatomy)
    first = trained_teacher(own, backbones.SMOKE, backbone="unet", seed=1, keep=tmp_path / "t.pt")
    other = patients([0, 1], seed=5, anatomy=anatomy)
    again = trained_teacher(other, backbones.SMOKE, backbone="unet", seed=1, keep=tmp_path / "t.pt")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    fresh = fresh_network(backbones.SMOKE, backbone="unet", seed=1)
    assert not torch.equal(next(first.parameters()), next(fresh.parameters()))


def test_the_ensemble_of_one_hospital_is_its_teacher(anatomy: Anatomy) -> None:
    own, tests = patients([2], seed=0, anatomy=anatomy), held_out_patients(2, seed=0, anatomy=anatomy)
    hospital = PhantomHospital("a", own, fresh_network(backbones.SMOKE, backbone="unet", seed=3))
    assert np.array_equal(ensemble_dice([hospital], tests), network_dice(hospital.teacher, tests))
    assert class_counts([hospital])[0, 0] == 2


def test_weights_make_every_term_the_same_size() -> None:
    measured = {"jensen_shannon": 0.02, "pairwise": 0.5, "features": 4.0}
    weights = divergence.equal_weights(measured)
    assert weights == pytest.approx({"jensen_shannon": 1.0, "pairwise": 0.04, "features": 0.005})


def record(*cases: float) -> dict[str, Any]:
    return {**dice_record(np.array(cases)[:, None].repeat(3, axis=1))}


def test_summary_of_the_backbones_by_hand() -> None:
    rows = [
        {
            "backbones": b,
            "asked": a,
            "seed": 0,
            "student": record(0.4 + 0.1 * (a == "full"), 0.6 + 0.1 * (a == "full")),
            "ensemble": record(0.5, 0.75),
            "bytes_up": 10,
        }
        for b in backbones.BACKBONES
        for a in backbones.ASKED
    ]
    found = backbones.summarise(rows)
    assert found["cells"]["same, output-only"]["ratio"] == pytest.approx([0.8])
    assert found["full_minus_output_only"]["mixed"]["mean"] == pytest.approx(0.1)
    assert found["full_minus_output_only"]["mixed"]["interval"] == pytest.approx((0.1, 0.1))


def test_summary_of_the_divergences_by_hand() -> None:
    """Disagreement that rises with Dice in every seed has rank correlation 1; each seed is taken about its own mean."""
    rows = [
        {
            "row": name,
            "seed": seed,
            "student": record(0.1 * i * (1 + seed)),
            "disagreement": 0.01 * i * (1 + seed),
            "weight": 1.0,
        }
        for seed in (0, 1)
        for i, name in enumerate(divergence.ROWS)
    ]
    found = divergence.summarise(rows)
    assert found["rank_correlation"]["rho"] == pytest.approx(1.0) and found["rank_correlation"]["points"] == 10
    assert found["rows"]["js-apart"]["difference"] == pytest.approx(0.15)


def test_cells_of_the_full_design() -> None:
    plan = scaling.PLANS["full"]
    cells = plan.cells()
    assert len(cells) == len(set(cells)) == 21  # twenty hospitals of four patients are the fixed total, too
    assert {k for k, _, _ in cells} == {2, 4, 10, 20}
    assert all(total in (80, 4 * k) for k, total, _ in cells)


def test_patients_are_split_once_and_impossible_splits_say_so(anatomy: Anatomy) -> None:
    cohort = scaling.cohort_of(12, seed=0, anatomy=anatomy)
    parts = scaling.split_patients(cohort, hospitals=3, alpha=1.0, seed=0)
    assert sorted(i for part in parts.values() for i in part) == list(range(12))
    with pytest.raises(SettingsError, match="never filled all 12 sites"):
        scaling.split_patients(cohort, hospitals=12, alpha=0.01, seed=0)


def test_groups_are_thirds_of_tumour_size_within_the_cohort(anatomy: Anatomy) -> None:
    cohort = scaling.cohort_of(12, seed=0, anatomy=anatomy)
    thirds = [third for _, third in scaling.groups_of(cohort)]
    assert sorted(set(thirds)) == [0, 1, 2]
    sizes = (cohort.tissues.flatten(1) >= 4).sum(1).tolist()
    assert max(s for s, t in zip(sizes, thirds, strict=True) if t == 0) <= min(
        s for s, t in zip(sizes, thirds, strict=True) if t == 2
    )


def test_rounds_until_a_goal() -> None:
    curve = [(4, 0.2), (8, 0.5), (12, 0.4)]
    assert (scaling.rounds_to(curve, 0.45), scaling.rounds_to(curve, 0.6)) == (8, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("backbones", 4), ("divergence", 6), ("scaling", 3)])
def test_smoke_of_each_question(name: str, rows: int, tmp_path: Path) -> None:
    code, output = run("experiment", name, "--profile", "smoke", "--out", tmp_path / "q", "--quiet")
    assert code == 0 and "NOT PRIVATE" in output and "phantom" in output.lower()
    results = json.loads((tmp_path / "q" / "results.json").read_text())
    assert len(results["rows"]) == rows and results["data"] == "phantoms"
    if name == "divergence":
        by_name = {row["row"]: row for row in results["rows"].values()}
        measured = by_name["none"]["on_phantoms"]
        assert measured["information"] == pytest.approx(measured["jensen_shannon"], rel=1e-3)
    code, _ = run("experiment", name, "--profile", "smoke", "--out", tmp_path / "q", "--quiet", "--resume")
    assert code == 0
