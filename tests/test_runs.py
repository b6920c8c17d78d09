"""Whole runs on two tiny phantom hospitals: what the folder holds, and that an interrupted run continues."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fediod_med.checkpoints import load_weights, read_provenance
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.distillation.settings import Schedule
from fediod_med.errors import SettingsError
from fediod_med.export import find_weights
from fediod_med.hospitals import Hospital
from fediod_med.privacy.gate import Gate
from fediod_med.runs.distill import run_distillation
from fediod_med.runs.volumes import scans_to_judge_by
from fediod_med.sites import Site, load_sites

TINY = Schedule(rounds=2, student_steps=1, checkpoint_every=1)


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> tuple[Site, ...]:
    root = tmp_path_factory.mktemp("federation")
    for number, profile in enumerate(hospital_profiles()[:2]):
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
            "spacing: 6.0\nroi: 32\nepochs: 1\nsteps_per_epoch: 1\nbackbone: unet\nwidth: 16\n"
        )
    return load_sites(root / "sites")


@pytest.fixture(scope="module")
def finished(sites, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run_distillation(sites, out=out, schedule=TINY, pool=3, data_name="phantoms", device="cpu")
    return out


def test_the_summary_has_every_row_and_says_what_it_is(finished) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["rows"]) == {"site:h0", "site:h1", "ensemble", "prior", "kd_phantoms", "student", "pooled"}
    for row in summary["rows"].values():
        assert all(0 <= row[key] <= 1 for key in ("TC", "WT", "ET", "mean"))
        assert row["mean"] == pytest.approx((row["TC"] + row["WT"] + row["ET"]) / 3)
        assert row["patients"] == 4
    assert summary["data"] == "phantoms"
    assert "NOT PRIVATE" in summary["privacy_statement"]
    assert all(sent > 0 for sent in summary["bytes"]["up"].values())


def test_the_folder_is_complete(finished) -> None:
    for name in ("comparison.png", "curves.png", "panel.png"):
        assert (finished / "figures" / name).read_bytes().startswith(b"\x89PNG")
    record = json.loads((finished / "run.json").read_text())
    assert {site: (terms["mode"], terms["epsilon"]) for site, terms in record["privacy"].items()} == {
        "h0": ("none", None),
        "h1": ("none", None),
    }
    synthetic = nib.load(finished / "synthetic" / "synthetic-00.nii.gz")
    assert synthetic.shape == (32, 32, 32, 4)
    labels = nib.load(finished / "synthetic" / "synthetic-00_labels.nii.gz")
    assert labels.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(labels.dataobj))) <= {0, 1, 2, 3}


def test_the_folder_keeps_the_generators_rounds_and_who_found_them_real(finished) -> None:
    """Two rounds, of which the second asks about phantoms: round 1 is the first and the last."""
    folders = sorted(path.name for path in (finished / "synthetic").iterdir() if path.is_dir())
    assert folders == ["round-000001"]
    kept = finished / "synthetic" / "round-000001"
    parts = ("", "_phantom", "_labels", "_teacher-h0", "_teacher-h1", "_ensemble", "_student")
    assert {path.name for path in kept.iterdir()} == {
        f"synthetic-{i:02d}{part}.nii.gz" for i in (0, 1) for part in parts
    }
    x, phantom = (np.asarray(nib.load(kept / f"synthetic-00{part}.nii.gz").dataobj) for part in ("", "_phantom"))
    assert np.array_equal(x, phantom)  # an untrained generator returns the phantom
    asked, _ = json.loads((finished / "history.json").read_text())["rounds"]
    assert asked["realism"] == pytest.approx((asked["realism:h0"] + asked["realism:h1"]) / 2)
    assert (finished / "figures" / "synthetic.png").read_bytes().startswith(b"\x89PNG")


def test_the_quality_file_says_what_it_is_and_what_it_could_not_measure(finished) -> None:
    """Three phantoms in the pool are too few for a distribution: that is said, and no figure is made up."""
    quality = json.loads((finished / "synthetic" / "quality.json").read_text())
    assert "Not for clinical use" in quality["notice"] and "NOT PRIVATE" in quality["privacy_statement"]
    assert quality["data"] == "phantoms" and quality["measures"] == {}
    assert "larger pool" in quality["reference"]["absent"]
    assert set(quality["per_site"]) == {"h0", "h1"} and "absent" in quality["dist_fid"]
    assert set(quality["nearest"]) == {f"synthetic-{i:02d}" for i in range(4)}


def test_a_private_hospital_lends_its_scans_to_no_figure(sites) -> None:
    scan = torch.zeros(4, 8, 8, 8)
    open_site, private = sites[0], dataclasses.replace(sites[1], privacy_mode="dp-sgd", epsilon=8.0)
    hospitals = [
        Hospital(site, Gate.unprotected(site.site_name), torch.nn.Identity(), torch.ones(1, 4), ((scan, scan),), ())
        for site in (open_site, private)
    ]
    found = scans_to_judge_by(hospitals)
    assert list(found["scans"]) == ["h0"] and len(found["scans"]["h0"]) == 2
    assert list(found["withheld"]) == ["h1"] and "dp-sgd" in found["withheld"]["h1"]


def test_the_bundle_holds_the_student(finished) -> None:
    found = find_weights(finished)
    student, provenance = load_weights(finished / "student.safetensors")
    bundled, _ = load_weights(found)
    assert all((bundled[name] == tensor).all() for name, tensor in student.items())
    assert provenance.privacy["h0"]["mode"] == "none"
    assert read_provenance(found).sites == ("h0", "h1")


def test_a_finished_folder_is_not_overwritten(finished, sites) -> None:
    with pytest.raises(SettingsError, match="--resume"):
        run_distillation(sites, out=finished, schedule=TINY, pool=3)


def test_a_resumed_run_gives_the_same_student(finished, sites, tmp_path) -> None:
    class InterruptedRunError(Exception):
        pass

    def stop(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "distil student" and done == 1:
            raise InterruptedRunError

    out = tmp_path / "out"
    common = {"out": out, "schedule": TINY, "pool": 3, "data_name": "phantoms", "device": "cpu", "compare": False}
    with pytest.raises(InterruptedRunError):
        run_distillation(sites, **common, progress=stop)
    run_distillation(sites, **common, resume=True)
    expected, _ = load_weights(finished / "student.safetensors")
    resumed, _ = load_weights(out / "student.safetensors")
    assert all((resumed[name] == tensor).all() for name, tensor in expected.items())


def test_hospitals_with_different_grids_are_refused(sites, tmp_path) -> None:
    mixed = [sites[0], dataclasses.replace(sites[1], spacing=5.0)]
    with pytest.raises(SettingsError, match="spacing"):
        run_distillation(mixed, out=tmp_path / "out", schedule=TINY)
    assert not (tmp_path / "out").exists()
