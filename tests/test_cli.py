"""The command line, in process: exit codes, one-line errors, and files that a user ends up with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from command import run  # type: ignore[import-not-found]

from fediod_med.cli.main import check_processes
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.errors import SettingsError


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hospital")
    write_cohort(
        folder / "data", count=2, seed=3, grid=Grid((32, 32, 32), 6.0), profile=hospital_profiles()[0], prefix="CLI"
    )
    return folder / "data"


def case_of(hospital: Path) -> Path:
    return sorted(path for path in hospital.glob("*/*") if path.is_dir())[0]


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from fediod_med.cli.main import command_line; from typer.testing import CliRunner; "
        "r = CliRunner().invoke(command_line(), ['--help']); assert r.exit_code == 0; "
        "assert 'segment' in r.output and 'Not for clinical use' in r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_segmenting_without_a_model_uses_the_public_prior_and_keeps_the_geometry(hospital, tmp_path) -> None:
    case = case_of(hospital)
    code, output = run("segment", "-i", case, "-o", tmp_path, "--quiet")
    assert code == 0
    assert "no patient" in output
    source = nib.load(case / f"{case.name}_t1ce.nii.gz")
    written = nib.load(tmp_path / f"{case.name}_seg.nii.gz")
    assert written.shape == source.shape
    assert np.array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.uint8
    statistics = json.loads((tmp_path / f"{case.name}_stats.json").read_text())
    assert statistics["notice"] == "Research software. Not for clinical use."
    voxels = np.isin(np.asarray(written.dataobj), (1, 2, 4)).sum()
    assert statistics["volumes_ml"]["WT"] == pytest.approx(voxels * 6.0**3 / 1000, abs=1e-3)
    assert (tmp_path / f"{case.name}_preview.png").read_bytes().startswith(b"\x89PNG")


def test_explicit_files_equal_the_folder(hospital, tmp_path) -> None:
    case = case_of(hospital)
    names = {"--t1c": "t1ce", "--t1": "t1", "--t2": "t2", "--flair": "flair"}
    words = [w for option, suffix in names.items() for w in (option, case / f"{case.name}_{suffix}.nii.gz")]
    assert run("segment", *words, "-o", tmp_path / "files", "--quiet", "--no-preview")[0] == 0
    assert run("segment", "-i", case, "-o", tmp_path / "folder", "--quiet", "--no-preview")[0] == 0
    (by_files,) = (tmp_path / "files").glob("*_seg.nii.gz")
    (by_folder,) = (tmp_path / "folder").glob("*_seg.nii.gz")
    assert np.array_equal(np.asarray(nib.load(by_files).dataobj), np.asarray(nib.load(by_folder).dataobj))


def test_an_incomplete_set_of_files_is_refused_by_name(hospital, tmp_path) -> None:
    code, message = run("segment", "--t1c", case_of(hospital) / "x.nii.gz", "-o", tmp_path)
    assert code == 2
    assert "found only T1c" in message
    assert not list(tmp_path.iterdir())


def test_a_truncated_scan_gives_no_output_and_exit_2(hospital, tmp_path) -> None:
    broken = tmp_path / "Brats18_BROKEN_1_1"
    broken.mkdir()
    case = case_of(hospital)
    for suffix in ("t1ce", "t1", "t2", "flair"):
        data = (case / f"{case.name}_{suffix}.nii.gz").read_bytes()
        (broken / f"{broken.name}_{suffix}.nii.gz").write_bytes(data[: len(data) // 2] if suffix == "t2" else data)
    code, message = run("segment", "-i", broken, "-o", tmp_path / "out", "--quiet")
    assert code == 2
    assert "_t2.nii.gz" in message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_one_broken_scan_of_several_is_reported_and_the_others_are_done(hospital, tmp_path) -> None:
    cases = [path for path in hospital.glob("*/*") if path.is_dir()]
    for case in cases:
        folder = tmp_path / "in" / case.name
        folder.mkdir(parents=True)
        for path in case.glob("*.nii.gz"):
            (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / cases[0].name / f"{cases[0].name}_flair.nii.gz").write_bytes(b"not a scan")
    code, output = run("segment", "-i", tmp_path / "in", "-o", tmp_path / "out", "--quiet", "--no-preview")
    assert code == 1
    assert "1 of 2 scans failed" in output
    assert [p.name for p in (tmp_path / "out").glob("*_seg.nii.gz")] == [f"{cases[1].name}_seg.nii.gz"]


def test_evaluating_the_experts_against_themselves_is_perfect(hospital, tmp_path) -> None:
    for case in (path for path in hospital.glob("*/*") if path.is_dir()):
        (tmp_path / "pred").mkdir(exist_ok=True)
        target = tmp_path / "pred" / f"{case.name}_seg.nii.gz"
        target.write_bytes((case / f"{case.name}_seg.nii.gz").read_bytes())
    out = tmp_path / "metrics.csv"
    code, output = run("evaluate", "-p", tmp_path / "pred", "-r", hospital, "--scheme", "brats2018", "-o", out)
    assert code == 0
    assert "mean 1.000" in output
    assert out.is_file() and out.with_suffix(".json").is_file()


def test_a_missing_prediction_is_named_and_exits_1(hospital, tmp_path) -> None:
    cases = sorted(path for path in hospital.glob("*/*") if path.is_dir())
    (tmp_path / "pred").mkdir()
    name = f"{cases[0].name}_seg.nii.gz"
    (tmp_path / "pred" / name).write_bytes((cases[0] / name).read_bytes())
    out = tmp_path / "m.csv"
    code, output = run("evaluate", "-p", tmp_path / "pred", "-r", hospital, "--scheme", "brats2018", "-o", out)
    assert code == 1
    assert f"no prediction for {cases[1].name}" in output


def test_a_new_site_file_is_valid_and_never_overwritten(hospital, tmp_path) -> None:
    assert run("site", "init", "north", "--sites", tmp_path)[0] == 0
    path = tmp_path / "north" / "site.yaml"
    path.write_text(path.read_text().replace("brats2021", "brats2018").replace("folds: 5", "folds: 2"))
    code, output = run("site", "verify", "north", "--sites", tmp_path, "--data-root", hospital)
    assert code == 0
    assert "1 scans to train on, 1 held out" in output
    assert "NOT PRIVATE" in output
    before = path.read_text()
    assert run("site", "init", "north", "--sites", tmp_path)[0] == 2
    assert path.read_text() == before


def test_unknown_weights_are_refused(hospital, tmp_path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    code, message = run("segment", "-i", case_of(hospital), "-o", tmp_path / "o", "--model", tmp_path / "w.safetensors")
    assert code == 2
    assert "expected safetensors" in message


def test_only_distill_is_shared_by_torchrun() -> None:
    started = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
    with pytest.raises(SettingsError, match="expected the command distill, which shares its work, found demo"):
        check_processes(["demo", "--out", "x"], started)
    with pytest.raises(SettingsError, match="found no command"):
        check_processes([], started)
    check_processes(["distill", "--out", "x"], started)
    check_processes(["demo"], {**started, "WORLD_SIZE": "1"})
    check_processes(["demo"], {"WORLD_SIZE": "2"})  # another launcher's variable
