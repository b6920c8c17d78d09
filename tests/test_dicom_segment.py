"""From a DICOM study to a DICOM SEG by the command: recognised, segmented, written, read back by another reader."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from fediod_med.cli.main import command_line
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.labels import SEQUENCES

pytest.importorskip("highdicom", reason="the extra `dicom` is not installed")

from dicom_writer import VIEWS, rotation, write_study  # type: ignore[import-not-found]

SUFFIX = {"T1c": "t1ce", "T1": "t1", "T2": "t2", "FLAIR": "flair"}


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Intensities of a phantom by sequence, and an oblique affine."""
    root = tmp_path_factory.mktemp("phantom")
    write_cohort(root, count=1, seed=8, grid=Grid((40, 36, 32), 5.0), profile=hospital_profiles()[0], prefix="DCM")
    (case,) = [path for path in root.glob("*/*") if path.is_dir()]
    images = {n: np.asarray(nib.load(case / f"{case.name}_{SUFFIX[n]}.nii.gz").dataobj) for n in SEQUENCES}
    scaled = {name: np.round(values / values.max() * 3000).astype(np.int16) for name, values in images.items()}
    affine = np.eye(4)
    affine[:3, :3] = rotation(8.0, -5.0, 11.0) * 5.0
    affine[:3, 3] = (-90.0, -70.0, -60.0)
    return scaled, affine


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_study_becomes_a_seg_that_equals_the_nifti_map(scan, tmp_path, view):
    import highdicom

    images, affine = scan
    study = write_study(tmp_path / "study", images, affine, view=view)
    out = tmp_path / "out"
    words = ["segment", "-i", study, "-o", out, "--quiet", "--no-preview", "--smallest-lesion", "0"]
    words += ["--output-type", "dicom-seg", "--output-type", "dicom-labelmap"]
    result = CliRunner().invoke(command_line(), [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    label_map = nib.load(out / "study_seg.nii.gz")
    values = np.asarray(label_map.dataobj)
    assert np.count_nonzero(values) > 50
    record = json.loads((out / "records" / "study.json").read_text())
    assert set(record["kinds"]) >= {"dicom-seg", "dicom-labelmap", "segmentation"}
    assert sum("series" in note for note in record["notes"]) >= 4  # why each series was taken
    for name in ("study_seg.dcm", "study_labelmap.dcm"):
        volume = highdicom.seg.segread(out / name).get_volume(combine_segments=True, relabel=False)
        mask = highdicom.Volume(
            array=values,
            affine=label_map.affine,
            coordinate_system="PATIENT",
            frame_of_reference_uid=volume.frame_of_reference_uid,
            from_reference_convention="RAS",
        ).match_geometry(volume)
        expected = np.where(mask.array == 4, 3, mask.array)  # BraTS writes enhancing tumour as 4, DICOM as segment 3
        assert np.array_equal(volume.array, expected), name
    checked = CliRunner().invoke(command_line(), ["check", str(study), "--json"], catch_exceptions=False)
    assert checked.exit_code == 0
    assert "E1" not in "".join(f["code"] for f in json.loads(checked.output)["findings"])


def test_a_study_without_flair_is_refused_by_name(scan, tmp_path):
    images, affine = scan
    study = write_study(tmp_path / "study", {n: v for n, v in images.items() if n != "FLAIR"}, affine)
    result = CliRunner().invoke(command_line(), ["segment", "-i", str(study), "-o", str(tmp_path / "out"), "--quiet"])
    assert str(result.exception).startswith("E133 FLAIR")
    assert not (tmp_path / "out").exists()


def test_several_studies_are_a_cohort(scan, tmp_path):
    images, affine = scan
    for name in ("one", "two"):
        write_study(tmp_path / "in" / name, images, affine)
    out = tmp_path / "out"
    words = [
        "segment",
        "-i",
        str(tmp_path / "in"),
        "-o",
        str(out),
        "--quiet",
        "--no-preview",
        "--output-type",
        "dicom-seg",
    ]
    assert CliRunner().invoke(command_line(), words, catch_exceptions=False).exit_code == 0
    assert sorted(path.name for path in out.glob("*.dcm")) == ["one_seg.dcm", "two_seg.dcm"]
