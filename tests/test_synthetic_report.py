"""The report of a run's synthetic volumes: public reference, honest control, and what a private hospital withholds."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from fediod_med.checkpoints import load_segmenter
from fediod_med.data.phantoms import Grid, load_anatomy
from fediod_med.data.sampler import PublicBatch, PublicSampler
from fediod_med.resources import public_prior
from fediod_med.synthetic_report import MEASURES, Judged, centre_crop, draw_phantoms, quality_report

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sampler() -> PublicSampler:
    return PublicSampler(spacing=10, roi=24, count=20, seed=3, anatomy=load_anatomy(Grid((24, 24, 24), 10.0)))


@pytest.fixture(scope="module")
def bases(sampler: PublicSampler) -> PublicBatch:
    found = draw_phantoms(sampler, count=8, without=set(), first=1)
    assert found is not None and len(found.base) == 8
    return found


def report(sampler: PublicSampler, x: Tensor, bases: PublicBatch | None, **changes) -> dict:
    first = None if bases is None else bases.only(0)
    network, _ = load_segmenter(public_prior(), CPU)
    arguments = {"scans": {}, "withheld": {}, "size": 24, "device": CPU}
    judged = Judged(x, bases, {"synthetic-00": (x[0], first)} if len(x) else {})
    return quality_report(judged, sampler=sampler, network=network, **{**arguments, **changes})


def brightened(bases: PublicBatch, by: float = 1.5) -> Tensor:
    return torch.where(bases.base != 0, bases.base + by, bases.base)


def test_a_generator_that_returns_its_phantoms_scores_as_they_do(sampler: PublicSampler, bases: PublicBatch) -> None:
    found = report(sampler, bases.base, bases)
    assert set(found["measures"]) == set(MEASURES)
    for row in found["measures"].values():
        assert row["synthetic"] == row["phantoms"]
    assert found["reference"]["synthetic"] == 8 and found["reference"]["phantoms"] == 12  # the rest of the pool
    nearest = found["nearest"]["synthetic-00"]
    assert nearest["made_from"] == int(bases.phantoms[0])
    assert nearest["made_from_distance"] == nearest["rms_change"] == 0
    assert nearest["nearest_other"] != nearest["made_from"] and nearest["nearest_other_distance"] > 0
    json.dumps(found, allow_nan=False)


def test_volumes_that_leave_the_phantoms_score_worse_in_every_distance(
    sampler: PublicSampler, bases: PublicBatch
) -> None:
    found = report(sampler, brightened(bases), bases)
    for key in ("kid", "mmd_gaussian", "frechet_patches"):
        assert found["measures"][key]["synthetic"] > found["measures"][key]["phantoms"]
    for key in ("kid_p", "precision", "density", "coverage"):
        assert found["measures"][key]["synthetic"] < found["measures"][key]["phantoms"]
    assert found["nearest"]["synthetic-00"]["rms_change"] == pytest.approx(1.5, rel=1e-3)


def test_copies_of_one_volume_are_found_out(sampler: PublicSampler, bases: PublicBatch) -> None:
    """Mode collapse: real looking, but nothing of the reference is reached, and all volumes are alike."""
    found = report(sampler, bases.base[:1].repeat(8, 1, 1, 1, 1), bases)["measures"]
    assert found["ms_ssim"]["synthetic"] > 0.99 > found["ms_ssim"]["phantoms"]
    assert found["recall"]["synthetic"] < found["recall"]["phantoms"]


def test_volumes_without_phantoms_are_compared_with_two_halves_of_the_pool(
    sampler: PublicSampler, bases: PublicBatch
) -> None:
    found = report(sampler, brightened(bases), None)
    assert found["reference"]["phantoms"] == 10
    kid = found["measures"]["kid"]
    assert kid["synthetic"] > kid["phantoms"] and kid["phantoms"] != 0
    assert set(found["nearest"]["synthetic-00"]) == {"nearest_other", "nearest_other_distance"}


def test_hospitals_that_promised_nothing_are_measured_and_the_others_named(
    sampler: PublicSampler, bases: PublicBatch
) -> None:
    scans = list(brightened(bases))
    found = report(sampler, brightened(bases), bases, scans={"open": scans}, withheld={"shut": "private"})
    assert found["per_site"]["shut"] == {"absent": "private"} and "absent" in found["dist_fid"]
    row = found["per_site"]["open"]
    assert row["scans"] == 8
    for key in ("kid", "frechet_patches"):  # the volumes are the hospital's own, the phantoms are not
        assert row[key]["synthetic"] < row[key]["phantoms"]
    assert row["frechet_patches"]["synthetic"] == pytest.approx(0, abs=1e-6)


def test_the_mean_over_hospitals_weighs_scans(sampler: PublicSampler, bases: PublicBatch) -> None:
    few, many = list(bases.base[:6]), list(brightened(bases, 0.7))
    found = report(sampler, bases.base, bases, scans={"few": few, "many": many})
    sites = found["per_site"]
    expected = (
        6 * sites["few"]["frechet_patches"]["synthetic"] + 8 * sites["many"]["frechet_patches"]["synthetic"]
    ) / 14
    assert found["dist_fid"]["synthetic"] == pytest.approx(expected)
    too_few = report(sampler, bases.base, bases, scans={"few": few[:5], "many": many})
    assert "fewer than 6" in too_few["per_site"]["few"]["absent"] and "absent" in too_few["dist_fid"]


def test_too_little_to_compare_is_said(sampler: PublicSampler, bases: PublicBatch) -> None:
    found = report(sampler, bases.base[:5], bases, scans={"open": list(bases.base)})
    assert found["measures"] == {} and "6 volumes" in found["reference"]["absent"]
    assert "absent" in found["per_site"]["open"] and found["nearest"]["synthetic-00"]["made_from_distance"] == 0
    empty = report(sampler, torch.empty(0), None)
    assert empty["measures"] == {} and empty["nearest"] == {}
    blank = report(sampler, torch.zeros_like(bases.base), bases)
    assert blank["reference"]["synthetic"] == 0 and blank["measures"] == {}


def test_crops_without_brain_are_left_out(sampler: PublicSampler, bases: PublicBatch) -> None:
    """A crop from a corner of the head holds nothing that features could be taken of."""
    x = bases.base.clone()
    x[0] = 0
    found = report(sampler, x, bases)
    assert found["reference"]["synthetic"] == 7 and found["nearest"]["synthetic-00"].keys() == {"absent"}
    assert found["measures"]["kid"]["synthetic"] == found["measures"]["kid"]["phantoms"]  # of the same seven


def test_drawn_phantoms_are_different_and_none_of_those_ruled_out(sampler: PublicSampler) -> None:
    found = draw_phantoms(sampler, count=50, without={0, 1, 2}, first=7)
    assert found is not None and sorted(found.phantoms.tolist()) == list(range(3, 20))
    assert not found.mirrored.any()
    assert draw_phantoms(sampler, count=5, without=set(range(20)), first=7) is None


def test_a_centre_crop_keeps_the_brain() -> None:
    scan = torch.zeros(4, 40, 20, 30)
    scan[:, 30:38, 2:10, 11:19] = 1
    crop = centre_crop(scan, 24)
    assert crop.shape == (4, 24, 24, 24) and crop.sum() == scan.sum()
