"""The written central bundle: complete, self-contained, honest about privacy, equal to the library voxel by voxel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out

from fediod_med.checkpoints import Provenance, load_segmenter
from fediod_med.data.layouts import find_cases
from fediod_med.data.phantoms import Grid, write_cohort
from fediod_med.errors import SettingsError, WeightsError
from fediod_med.export import bundle_weights, locate_bundle, write_central_bundle
from fediod_med.inference import segment_subject, write_case
from fediod_med.labels import get_scheme
from fediod_med.networks import build_segmenter
from fediod_med.resources import bundle_dir

NETWORK = {"backbone": "unet", "width": 4, "depth": 3, "in_channels": 4, "out_channels": 4}
PROVENANCE = Provenance(
    kind="student",
    network=NETWORK,
    spacing=5.0,
    label_scheme="brats2018",
    sites=("north", "south"),
    privacy={
        "north": {"mode": "none", "epsilon": None, "delta": None},
        "south": {"mode": "dp-sgd", "epsilon": 4.0, "delta": 1e-3},
    },
    trained_on="patients",
    seed=7,
    settings={"roi": 16, "rounds": 3},
    commit="0123abc",
)
SUMMARY = {
    "TC": 0.5,
    "WT": 0.75,
    "ET": 0.25,
    "mean": 0.5,
    "patients": 3,
    "ci95": {k: [0.1, 0.9] for k in ("TC", "WT", "ET", "mean")},
    "hd95_mm": {"TC": 5.0, "WT": 6.0, "ET": 7.0, "mean": 6.0},
    "sites": {"north": {"TC": 0.4, "WT": 0.7, "ET": 0.2, "mean": 0.433}},
}
pytestmark = [
    # A bundle's configuration is code, and MONAI says so each time one is read.
    pytest.mark.filterwarnings("ignore::UserWarning:monai.bundle"),
    # The schema lies in the bundle: nothing is downloaded whose hash could be checked.
    pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    network = build_segmenter(**NETWORK)
    return write_central_bundle(
        tmp_path_factory.mktemp("run") / "central", network.state_dict(), PROVENANCE, summary=SUMMARY
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    write_cohort(root, count=2, seed=5, grid=Grid((32, 36, 28), 5.5), prefix="NEW")
    return root


def test_the_bundle_is_complete_and_has_no_pickle(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE",
        "configs/inference.yaml",
        "configs/logging.conf",
        "configs/metadata.json",
        "configs/metadata.schema.json",
        "docs/README.md",
        "models/model.safetensors",
    }


def test_metadata_pass_the_offline_check(bundle: Path) -> None:
    configs = bundle / "configs"
    verify_metadata(meta_file=str(configs / "metadata.json"), filepath=str(configs / "metadata.schema.json"))
    broken = json.loads((configs / "metadata.json").read_text()) | {"intended_use": "diagnosis"}
    other = bundle.parent / "broken.json"
    other.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(other), filepath=str(configs / "metadata.schema.json"))


def test_network_has_the_shapes_that_metadata_promise(bundle: Path) -> None:
    configs = bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.yaml"),
        device="cpu",
        bundle_root=str(bundle),
    )


def test_monai_finds_no_property_missing(bundle: Path, cases: Path, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.yaml"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(cases),
        output_dir=str(tmp_path),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.version == PROVENANCE.version
    assert workflow.channel_def == {"0": "background", "1": "NCR", "2": "ED", "3": "ET"}


def test_bundle_and_library_write_equal_voxels(bundle: Path, cases: Path, tmp_path: Path) -> None:
    """The command of the model card, in a process of its own, from a folder that has nothing to do with the bundle."""
    moved = tmp_path / "moved" / "model of another name"
    shutil.copytree(bundle, moved)
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(moved / "configs" / "inference.yaml")]
    done = subprocess.run(
        [*command, "--dataset_dir", str(cases), "--output_dir", str(tmp_path / "bundle"), "--device_name", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    network, provenance = load_segmenter(bundle_weights(bundle))
    for subject in find_cases(cases):
        result = segment_subject(subject, network, provenance, device=torch.device("cpu"))
        paths = write_case(result, tmp_path / "library", scheme=get_scheme("brats2018"), provenance=provenance)
        ours = nib.load(paths["segmentation"])
        theirs = nib.load(tmp_path / "bundle" / paths["segmentation"].name)
        scan = nib.load(subject.images["T1c"])
        assert result.classes.any()
        assert np.array_equal(np.asarray(theirs.dataobj), np.asarray(ours.dataobj))
        assert np.array_equal(theirs.affine, scan.affine)
        stats = [
            json.loads((tmp_path / d / f"{subject.subject_id}_stats.json").read_text()) for d in ("bundle", "library")
        ]
        assert stats[0]["volumes_ml"] == stats[1]["volumes_ml"]


def test_card_and_metadata_say_not_private_in_plain_words(bundle: Path) -> None:
    card = (bundle / "docs" / "README.md").read_text()
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert "Not for clinical use" in card
    assert "NOT PRIVATE: north" in card.splitlines()[2]
    assert "- north: NOT PRIVATE (mode none)" in card
    assert "- south: dp-sgd, epsilon 4 at delta 1.0e-03, per patient" in card
    assert metadata["fediod"]["privacy_banner"] == "NOT PRIVATE: north"
    assert metadata["fediod"]["privacy"]["south"]["epsilon"] == 4.0
    assert "$" not in card


def test_card_and_metadata_carry_scores_and_origin(bundle: Path) -> None:
    card = (bundle / "docs" / "README.md").read_text()
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert "| Dice | 0.500 | 0.750 | 0.250 | 0.500 |" in card
    assert "| Dice at north | 0.400 |" in card
    assert "| Setting `rounds` | 3 |" in card
    assert metadata["eval_metrics"] == {"dice_TC": 0.5, "dice_WT": 0.75, "dice_ET": 0.25, "dice_mean": 0.5}
    assert metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] == ["8*n"] * 3
    assert metadata["pytorch_version"] == torch.__version__.partition("+")[0]
    assert not [key for key, value in metadata.items() if value is None]


def test_an_unscored_model_on_phantoms_says_so(tmp_path: Path) -> None:
    prior = replace(PROVENANCE, kind="public prior", sites=(), privacy={}, trained_on="phantoms")
    write_central_bundle(tmp_path, build_segmenter(**NETWORK).state_dict(), prior)
    card = (tmp_path / "docs" / "README.md").read_text()
    assert "Not scored." in card
    assert "No hospital's patients: trained on phantoms" in card
    assert "NOT PRIVATE" not in card
    configs = tmp_path / "configs"
    verify_metadata(meta_file=str(configs / "metadata.json"), filepath=str(configs / "metadata.schema.json"))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="fit"):
        write_central_bundle(tmp_path, build_segmenter("unet", width=8, depth=3).state_dict(), PROVENANCE)
    assert not (tmp_path / "configs" / "inference.yaml").exists()


def test_a_bundle_never_runs_other_weights(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    config = (copy / "configs" / "inference.yaml").read_text()
    digest = config.split('weights_sha256: "')[1].split('"')[0]
    monkeypatch.setattr(sys, "argv", ["run", f"--config_file={copy / 'configs' / 'inference.yaml'}"])
    assert locate_bundle(digest) == str(copy)
    assert bundle_weights(copy) == copy / "models" / "model.safetensors"
    write_central_bundle(tmp_path / "other", build_segmenter(**NETWORK).state_dict(), PROVENANCE)
    shutil.copyfile(tmp_path / "other" / "models" / "model.safetensors", copy / "models" / "model.safetensors")
    with pytest.raises(SettingsError, match="SHA-256"):
        locate_bundle(digest)
    with pytest.raises(WeightsError, match="not the weights"):
        bundle_weights(copy)


def test_the_template_holds_no_numbers_of_a_run_and_does_not_run(bundle: Path) -> None:
    template = bundle_dir("central")
    metadata = json.loads((template / "configs" / "metadata.json").read_text())
    assert {key for key, value in metadata.items() if value is None} >= {"version", "eval_metrics", "fediod"}
    assert 'weights_sha256: ""' in (template / "configs" / "inference.yaml").read_text()
    assert not (template / "models").exists()
    with pytest.raises(SettingsError, match="template"):
        locate_bundle("")
    with pytest.raises(SettingsError, match="template"):
        write_central_bundle(template, {}, PROVENANCE)
