"""Segmented cases read for review: images inside the roots only, several models side by side, failures with reasons."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fediod_med.errors import SettingsError
from fediod_med.labels import SEQUENCES, get_scheme
from fediod_med.review.case_folder import CaseFolder, read_cases
from fediod_med.review.content import changed_outputs, content_hashes
from fediod_med.review.queue import Waiting, waiting
from fediod_med.review.roots import Roots
from fediod_med.review.volumes import VolumeCache

SUFFIX = {"T1c": "t1c", "T1": "t1n", "T2": "t2w", "FLAIR": "t2f"}


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def scan(folder: Path, case: str, *, seed: int = 0) -> dict[str, Path]:
    values = np.random.default_rng(seed).random((4, 6, 6, 6), dtype=np.float32)
    return {s: write(folder / case / f"{case}-{SUFFIX[s]}.nii.gz", v) for s, v in zip(SEQUENCES, values, strict=True)}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def statistics(folder: Path, case: str, scheme: str = "brats2023", **more: object) -> None:
    told = {"subject": case, "label_scheme": scheme, "volumes_ml": {"WT": 1.5}, **more}
    (folder / f"{case}_stats.json").write_text(json.dumps(told))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`data/` with two scans and `out/` with one segmented and one failed case, as `fediod segment` leaves them."""
    out = tmp_path / "out"
    (out / "records").mkdir(parents=True)
    images = scan(tmp_path / "data", "c1")
    scan(tmp_path / "data", "c2")
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[2:4, 2:4, 2:4] = 3
    write(out / "c1_seg.nii.gz", mask)
    write(out / "c1_entropy.nii.gz", mask.astype(np.float32))
    (out / "c1_preview.png").write_bytes(b"png")
    statistics(out, "c1", model={"privacy_banner": "NOT PRIVATE: north"})
    record = {
        "case": "c1",
        "status": "done",
        "inputs": {str(path): sha(path) for path in images.values()},
        "outputs": {name: sha(out / name) for name in ("c1_seg.nii.gz", "c1_preview.png")},
        "kinds": {"segmentation": "c1_seg.nii.gz", "preview": "c1_preview.png"},
        "volumes_ml": {"WT": 2.5},
        "quality": {"value": 0.62, "low": 0.5, "high": 0.7, "beside": {"teacher_disagreement": 0.11}},
        "findings": [{"code": "W142", "severity": "warning", "message": "m", "fix": "f"}],
        "notes": ["smaller windows"],
    }
    failed = {"case": "c2", "status": "failed", "reason": "c2: truncated", "findings": [], "outputs": {}}
    (out / "records" / "c1.json").write_text(json.dumps(record))
    (out / "records" / "c2.json").write_text(json.dumps(failed))
    (out / "run.json").write_text(json.dumps({"command": "segment", "privacy": "NOT PRIVATE: north"}))
    return tmp_path


def cases(tree: Path, **options: object) -> CaseFolder:
    return read_cases(tree / "out", Roots([tree]), **options)


def test_a_recorded_case_has_its_scan_findings_and_quality(tree: Path) -> None:
    folder = cases(tree)
    assert list(folder.cases) == ["c1", "c2"] and folder.banner == "NOT PRIVATE: north"
    case = folder.cases["c1"]
    assert case.status == "done" and case.quality == 0.62 and case.disagreement == 0.11
    assert case.volumes_ml == {"WT": 2.5} and case.notes == ("smaller windows",)
    assert case.findings[0]["code"] == "W142"
    assert [image.path.name for image in case.images.values()] == [f"c1-{SUFFIX[s]}.nii.gz" for s in SEQUENCES]
    assert list(case.images) == list(SEQUENCES)
    assert set(case.files) == {"preview", "entropy"}
    assert case.label_map is not None
    volume = VolumeCache().classes(case.label_map.path, case.label_map.scheme)
    assert int((volume.array == 3).sum()) == 8
    assert case.reference is None and "no expert" in case.why("reference")


def test_a_failed_case_says_why_and_shows_no_mask(tree: Path) -> None:
    write(tree / "out" / "c2_seg.nii.gz", np.zeros((6, 6, 6), np.uint8))  # left by an earlier call
    case = cases(tree).cases["c2"]
    assert case.label_map is None and case.why("label_map") == "c2: truncated" and case.status == "failed"


def test_only_cases_with_a_mask_wait_for_review(tree: Path) -> None:
    assert waiting(cases(tree).cases.values()) == (Waiting("c1", 0.62, 0.11),)


def test_scans_outside_the_roots_are_never_opened(tree: Path) -> None:
    case = read_cases(tree / "out", Roots([tree / "out"])).cases["c1"]
    assert case.images == {} and "outside the chosen folders" in case.why("images")
    assert str(tree) not in case.why("images")
    with pytest.raises(SettingsError):
        read_cases(tree / "out", Roots([tree / "out"]), images=tree / "data")
    with pytest.raises(SettingsError):
        read_cases(tree / "data", Roots([tree / "out"]))


def test_links_that_lead_out_are_left_alone(tree: Path) -> None:
    out = tree / "out"
    (out / "c1_seg.nii.gz").rename(tree / "secret_seg.nii.gz")
    (out / "c1_seg.nii.gz").symlink_to(tree / "secret_seg.nii.gz")
    (out / "c1_entropy.nii.gz").unlink()
    (out / "c1_entropy.nii.gz").symlink_to(tree / "data" / "c1" / "c1-t1c.nii.gz")
    case = read_cases(out, Roots([out])).cases["c1"]
    assert case.label_map is None and "outside" in case.why("label_map")
    assert "entropy" not in case.files
    record = json.loads((out / "records" / "c1.json").read_text())
    record["kinds"]["report"] = "../data/c1/c1-t1c.nii.gz"
    (out / "records" / "c1.json").write_text(json.dumps(record))
    assert "report" not in read_cases(out, Roots([out])).cases["c1"].files


def test_a_demo_folder_without_records_finds_its_scan_and_reference_beside(tree: Path) -> None:
    run = tree / "demo"
    scan(run / "unseen", "c9")
    write(run / "unseen" / "c9" / "c9-seg.nii.gz", np.full((6, 6, 6), 2, np.uint8))
    write(run / "segmented" / "c9_seg.nii.gz", np.ones((6, 6, 6), np.uint8))
    statistics(
        run / "segmented", "c9", model={"privacy_banner": "Differentially private per patient: epsilon at most 8"}
    )
    folder = read_cases(run / "segmented", Roots([run]))
    case = folder.cases["c9"]
    assert case.status == "unrecorded" and set(case.images) == set(SEQUENCES)
    assert list(case.label_maps("student")) == ["student", "reference"]
    assert case.reference is not None and case.reference.scheme == get_scheme("brats2023")
    assert folder.banner.startswith("Differentially private") and folder.name == "demo/segmented"


def test_other_models_stand_beside_with_their_own_scheme(tree: Path) -> None:
    other = tree / "ensemble"
    write(other / "c1_seg.nii.gz", np.full((6, 6, 6), 4, np.uint8))
    statistics(other, "c1", scheme="brats2018")
    case = cases(tree, models={"ensemble": other, "teacher": tree / "data"}).cases["c1"]
    assert list(case.label_maps("student")) == ["student", "ensemble"]
    assert case.others["ensemble"].scheme.name == "brats2018"
    assert content_hashes(case, case.others["ensemble"])[0] == sha(other / "c1_seg.nii.gz")


def test_references_come_from_a_folder_of_masks_with_a_stated_scheme(tree: Path) -> None:
    write(tree / "experts" / "c1_seg.nii.gz", np.full((6, 6, 6), 4, np.uint8))
    found = cases(tree, references=tree / "experts", reference_scheme=get_scheme("brats2018")).cases["c1"].reference
    assert found is not None and found.scheme.name == "brats2018"
    assert VolumeCache().classes(found.path, found.scheme).array.max() == 3
    (tree / "empty").mkdir()
    assert "no case folder" in cases(tree, references=tree / "empty").absent["references"]


def test_a_mask_without_a_scheme_is_not_guessed(tree: Path) -> None:
    (tree / "out" / "c1_stats.json").unlink()
    case = cases(tree).cases["c1"]
    assert case.label_map is None and "label scheme" in case.why("label_map")
    assert cases(tree, scheme=get_scheme("msd")).cases["c1"].label_map is not None


def test_one_file_with_four_sequences_and_dicom_studies(tree: Path) -> None:
    path = tree / "out" / "records" / "c1.json"
    record = json.loads(path.read_text())
    four = write(tree / "data" / "BRATS_001.nii.gz", np.zeros((6, 6, 6, 4), np.float32))
    path.write_text(json.dumps({**record, "inputs": {str(four): "x"}}))
    images = cases(tree).cases["c1"].images
    assert {s: image.channel for s, image in images.items()} == {"T1c": 2, "T1": 1, "T2": 3, "FLAIR": 0}
    path.write_text(json.dumps({**record, "inputs": {f"{tree}/study (640 files)": "x"}}))
    case = cases(tree).cases["c1"]
    assert case.images == {} and "DICOM" in case.why("images")


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"findings": 3, "inputs": [], "outputs": 1, "quality": "x", "kinds": 2}']
)
def test_a_damaged_record_hides_no_other_case(tree: Path, damage: str) -> None:
    (tree / "out" / "records" / "c1.json").write_text(damage)
    folder = cases(tree)
    assert set(folder.cases) == {"c1", "c2"}
    assert folder.cases["c1"].label_map is not None and folder.cases["c1"].quality is None


def test_hashes_tell_what_was_seen(tree: Path) -> None:
    folder = cases(tree)
    case = folder.cases["c1"]
    mask, images = content_hashes(case)
    assert mask == sha(tree / "out" / "c1_seg.nii.gz") and len(images) == 64
    assert changed_outputs(case, folder) == ()
    write(tree / "out" / "c1_seg.nii.gz", np.zeros((6, 6, 6), np.uint8))
    scan(tree / "data", "c1", seed=1)
    assert content_hashes(case)[0] != mask and content_hashes(case)[1] != images
    (tree / "out" / "c1_preview.png").unlink()
    assert changed_outputs(case, folder) == ("c1_seg.nii.gz", "c1_preview.png")
    assert content_hashes(folder.cases["c2"]) == ("", "")
