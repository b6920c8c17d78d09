"""The teacher bundle as MONAI sees it: offline checks, properties of each phase, and runs from MONAI's command line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from monai.bundle import ConfigWorkflow, run, verify_metadata, verify_net_in_out

from fediod_med.checkpoints import read_provenance
from fediod_med.data.layouts import find_cases
from fediod_med.data.phantoms import Grid, write_cohort
from fediod_med.errors import SettingsError
from fediod_med.evaluation import evaluate_folder, read_scores
from fediod_med.labels import REGIONS, get_scheme
from fediod_med.plain_yaml import read_plain
from fediod_med.resources import NOT_FOR_CLINICAL_USE, bundle_dir
from fediod_med.sites import SITE_FILE, Site, load_sites
from fediod_med.teacher import quiet_monai

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = bundle_dir("teacher") / "configs"
HOSPITALS = sorted(path.parent.name for path in (ROOT / "sites").glob(f"*/{SITE_FILE}"))
TINY = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 1, "roi": 16, "spacing": 6.0, "width": 4, "depth": 3}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom hospital: `data/` in a BraTS layout, `site.yaml` beside it."""
    folder = tmp_path_factory.mktemp("hospitals") / "north"
    write_cohort(folder / "data", count=3, seed=5, grid=Grid((32, 32, 32), 6.0), prefix="NORTH")
    site = {
        "site_name": "north", "layout": "brats2018", "label_scheme": "brats2018", "folds": 3, "fold": 1,
        "backbone": "unet", "init": "random", "rehearsal": 0.0, "privacy_mode": "none", **TINY,
    }  # fmt: skip
    (folder / SITE_FILE).write_text(yaml.safe_dump(site))
    return folder


def workflow(phase: str, site: Path, **override: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(CONFIGS / "common.yaml"), str(CONFIGS / f"{phase}.yaml"), str(site / SITE_FILE)],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type="train" if phase == "train" else "inference",
        site_dir=str(site),
        device_name="cpu",
        **override,
    )


def monai_run(phase: str, site: Path, **override: Any) -> None:
    """What `python -m monai.bundle run` calls, without another interpreter for each phase."""
    files = [str(CONFIGS / "common.yaml"), str(CONFIGS / f"{phase}.yaml"), str(site / SITE_FILE)]
    values = {"site_dir": site, "device_name": "cpu", **override}
    with quiet_monai():
        run(config_file=files, logging_file=False, **{name: str(value) for name, value in values.items()})


@pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning")
def test_metadata_is_valid_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # whoever asks the network fails
    schema = CONFIGS / "metadata.schema.json"
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema), result_path=None)
    broken = json.loads((CONFIGS / "metadata.json").read_text())
    del broken["network_data_format"]
    (tmp_path / "metadata.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="network_data_format"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(schema))


@pytest.mark.parametrize("backbone", ["unet", "segresnet", "dynunet"])
def test_metadata_tells_the_shapes_that_each_backbone_gives(backbone: str) -> None:
    with quiet_monai():
        verify_net_in_out(
            net_id="network_def",
            meta_file=str(CONFIGS / "metadata.json"),
            config_file=str(CONFIGS / "common.yaml"),
            device="cpu",
            backbone=backbone,
            width=8,
        )


@pytest.mark.parametrize(("epochs", "steps"), [(2, 20), (6, 20), (15, 20), (60, 100)])
def test_the_averaged_weights_forget_the_start_whatever_the_schedule(hospital: Path, epochs: int, steps: int) -> None:
    """A fixed momentum kept 30 % of the random start in a schedule of 120 steps."""
    with quiet_monai():
        config = workflow("train", hospital, epochs=epochs, steps_per_epoch=steps).parser
        momentum = float(config.get_parsed_content("train#handlers#0#momentum"))
    assert 0 < momentum <= 0.5
    assert (1 - momentum) ** (epochs * steps) < 1e-3
    assert 1 / momentum <= epochs * steps / 10, "the average spans at most the last tenth"


def test_every_phase_has_all_properties_that_monai_asks_for(hospital: Path, tmp_path: Path) -> None:
    weights: dict[str, str] = {}
    for phase in ("train", "evaluate", "inference"):
        with quiet_monai():
            ready = workflow(
                phase, hospital, dataset_dir=str(hospital / "data"), ckpt_dir=str(tmp_path), val_interval=1, **weights
            )
            ready.initialize()
            assert ready.check_properties() == [], phase
            if phase == "train":
                ready.run()  # one epoch, with the held-out fold scored after it
                assert 0 <= ready.evaluator.state.metrics["val_mean_dice"] <= 1
            ready.finalize()
        weights = {"weights": str(tmp_path / "model.safetensors")}


def test_monai_runs_training_evaluation_and_inference(hospital: Path, tmp_path: Path) -> None:
    data, weights = hospital / "data", tmp_path / "models" / "model.safetensors"
    monai_run("train", hospital, dataset_dir=data, ckpt_dir=weights.parent)
    assert read_provenance(weights).sites == ("north",)

    monai_run("evaluate", hospital, dataset_dir=data, weights=weights, output_dir=tmp_path / "eval")
    scores = read_scores(tmp_path / "eval" / "metrics.csv")
    assert {(s.site, s.subject_id) for s in scores} == {("north", "Brats18_NORTH_2_1")}, "the held-out fold alone"
    assert sorted(s.region for s in scores) == sorted(REGIONS)
    summary = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert summary["notice"] == NOT_FOR_CLINICAL_USE and summary["privacy"]["north"]["mode"] == "none"

    # The scores are those of the files: another route to the same numbers.
    again = evaluate_folder(tmp_path / "eval" / "segmentations", data, get_scheme("brats2018"), layout="brats2018")
    assert {(s.region, s.dice, s.hd95) for s in again.scores} == {(s.region, s.dice, s.hd95) for s in scores}

    # New scans come without labels; the bundle must not ask for any.
    new = tmp_path / "new"
    for subject in find_cases(data)[:2]:
        (new / subject.subject_id).mkdir(parents=True)
        for image in subject.images.values():
            (new / subject.subject_id / image.name).symlink_to(image)
    monai_run("inference", hospital, dataset_dir=new, weights=weights, output_dir=tmp_path / "out")
    for subject in find_cases(new):
        written = nib.load(tmp_path / "out" / f"{subject.subject_id}_seg.nii.gz")
        scan = nib.load(subject.images["T1"])
        assert written.shape == scan.shape and written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(written.affine, scan.affine)
        assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2, 4}


def test_a_person_trains_from_the_command_line(hospital: Path, tmp_path: Path) -> None:
    """The command of the manual, typed from the repository root, in an interpreter of its own."""
    files = [f"bundles/teacher/configs/{name}.yaml" for name in ("common", "train")] + [str(hospital / SITE_FILE)]
    options = {
        "dataset_dir": hospital / "data",
        "ckpt_dir": tmp_path,
        "device_name": "cpu",
        "epochs": 2,
        "val_interval": 2,
    }
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
        + [word for name, value in options.items() for word in (f"--{name}", str(value))],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch 2 of 2, loss" in done.stdout and "held-out fold, val_mean_dice" in done.stdout
    assert read_provenance(tmp_path / "model.safetensors").settings == {"roi": 16, "steps": 4}


def test_a_site_file_that_acts_is_refused_before_its_values_are_used(hospital: Path, tmp_path: Path) -> None:
    site, trace = tmp_path / "site", tmp_path / "trace"
    site.mkdir()
    (site / SITE_FILE).write_text(
        (hospital / SITE_FILE).read_text() + f"subject_pattern: \"$open('{trace}', 'w').name\"\n"
    )
    with pytest.raises(RuntimeError) as caught:
        monai_run("train", site, dataset_dir=hospital / "data", ckpt_dir=tmp_path / "models")
    innermost: BaseException = caught.value
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    assert isinstance(innermost, SettingsError) and "subject_pattern" in str(innermost)
    assert not trace.exists() and not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", HOSPITALS)
def test_site_files_override_only_what_every_phase_reads(name: str) -> None:
    """A key that common.yaml lacks would be ignored by MONAI; a nested one would break the other phases."""
    common = yaml.safe_load((CONFIGS / "common.yaml").read_text())
    assert set(read_plain(ROOT / "sites" / name / SITE_FILE)) <= set(common)


def test_bundle_defaults_are_those_of_a_site() -> None:
    common = yaml.safe_load((CONFIGS / "common.yaml").read_text())
    defaults = {f.name: f.default for f in dataclasses.fields(Site) if f.default is not dataclasses.MISSING}
    del defaults["dataset_dir"]  # the bundle needs a value, a site may leave it to --data-root
    assert {key: common[key] for key in defaults} == defaults


def test_hospitals_share_the_working_grid_and_differ_in_backbone() -> None:
    sites = load_sites(ROOT / "sites")
    assert {site.site_name for site in sites} == {"cbica", "tcia-hgg", "brats-2013", "tcia-lgg"}
    assert len({(site.spacing, site.roi, site.label_scheme) for site in sites}) == 1
    assert {site.backbone for site in sites} == {"unet", "segresnet", "dynunet"}


def test_configurations_call_named_functions_only() -> None:
    """Expressions stay short: no lambda, no assignment, no loop, nothing that a linter should have seen."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        code = [
            line.partition("  # ")[0] for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
        ]
        banned = [line for line in code if re.search(r"lambda|setattr|exec\(|eval\(|torch\.load|:=|\bfor\b", line)]
        assert banned == [], path.name


def test_bundle_carries_licence_terms_and_manual() -> None:
    bundle = bundle_dir("teacher")
    assert (bundle / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    terms = (bundle / "docs" / "data_license.txt").read_text()
    assert "Menze" in terms and "Bakas" in terms
    manual = (bundle / "docs" / "README.md").read_text()
    assert "not for clinical use" in manual.lower()
    for path in re.findall(r"bundles/teacher/[\w./]+\.(?:yaml|json|conf)", manual):
        assert (ROOT / path).is_file(), path


def test_versions_in_the_metadata_are_those_that_were_run_together() -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    named = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    named |= {k: v for k, v in metadata["required_packages_version"].items() if k != "fediod-med"}
    assert {name: pins[name].partition("+")[0] for name in named} == named
