"""Many scans: one failure stops no other, nothing is done twice, and a kill leaves whole files only."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from command import run  # type: ignore[import-not-found]

import fediod_med
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.errors import InputError, SettingsError
from fediod_med.findings import RefusedInput
from fediod_med.segmentation.cohort import segment_cohort
from fediod_med.segmentation.inputs import find_inputs, part_of
from fediod_med.segmentation.options import SegmentOptions, load_model
from fediod_med.segmentation.steps import CaseSegmenter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Five phantom cases."""
    root = tmp_path_factory.mktemp("scans")
    write_cohort(root, count=5, seed=11, grid=Grid((32, 32, 32), 6.0), profile=hospital_profiles()[0], prefix="COH")
    flat = root / "cases"
    flat.mkdir()
    for case in [path for path in root.glob("[HL]GG/*") if path.is_dir()]:
        shutil.move(case, flat / case.name)
    return flat


@pytest.fixture
def folder(scans, tmp_path) -> Path:
    return Path(shutil.copytree(scans, tmp_path / "in"))


def segmenter(out: Path, **options) -> CaseSegmenter:
    chosen = SegmentOptions(**{"preview": False, **options})
    return CaseSegmenter(load_model(None, device=CPU, options=chosen), options=chosen, out=out, device=CPU)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def label_maps(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*_seg.nii.gz"))}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_broken_cases_are_reported_and_the_others_done(folder, tmp_path):
    first, second, third, *others = sorted(folder.iterdir())
    path = next(first.glob("*_t2.nii.gz"))
    path.write_bytes(path.read_bytes()[:500])
    next(second.glob("*_flair.nii.gz")).unlink()
    twin = next(third.glob("*_t1.nii.gz"))
    twin.write_bytes(next(third.glob("*_t1ce.nii.gz")).read_bytes())
    out = tmp_path / "out"
    code, output = run("segment", "-i", folder, "-o", out, "--quiet", "--no-preview")
    assert code == 1
    assert "3 of 5 scans failed" in output
    assert sorted(label_maps(out)) == [f"{case.name}_seg.nii.gz" for case in others]
    failures = {row["case"]: row for row in table(out / "failures.csv")}
    assert {case: row["codes"] for case, row in failures.items()} == {
        first.name: "E101",
        second.name: "E140",
        third.name: "E141",
    }
    assert all(row["reason"] for row in failures.values())
    volumes = table(out / "volumes.csv")
    assert [row["case"] for row in volumes] == [case.name for case in others]
    record = json.loads((out / "run.json").read_text())
    assert {case: entry["status"] for case, entry in record["cases"].items()} == {
        **dict.fromkeys(failures, "failed"),
        **{case.name: "done" for case in others},
    }
    assert record["notice"] == "Research software. Not for clinical use."
    assert record["versions"]["torch"] and record["inputs_sha256"] and record["privacy"]
    values = np.asarray(nib.load(out / f"{others[0].name}_seg.nii.gz").dataobj)
    stated = next(float(row["WT_ml"]) for row in volumes if row["case"] == others[0].name)
    assert stated == pytest.approx(np.count_nonzero(values) * 6.0**3 / 1000, abs=1e-3)


def test_resume_keeps_what_is_done_and_only_that(folder, tmp_path):
    out = tmp_path / "out"
    cases = find_inputs(folder)
    assert [r.status for r in segment_cohort(cases, segmenter(out))] == ["done"] * 5
    before = {path: path.stat().st_mtime_ns for path in out.glob("*_seg.nii.gz")}
    changed_output, changed_input, lost_record = (case.case_id for case in cases[:3])
    path = out / f"{changed_output}_seg.nii.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    scan = folder / changed_input / f"{changed_input}_t2.nii.gz"
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 1.5, image.affine, image.header), scan)
    (out / "records" / f"{lost_record}.json").unlink()
    statuses = {r.case_id: r.status for r in segment_cohort(find_inputs(folder), segmenter(out), resume=True)}
    assert [case for case, status in statuses.items() if status == "done"] == [
        changed_output,
        changed_input,
        lost_record,
    ]
    kept = [case for case, status in statuses.items() if status == "kept"]
    assert len(kept) == 2
    assert all((out / f"{case}_seg.nii.gz").stat().st_mtime_ns == before[out / f"{case}_seg.nii.gz"] for case in kept)
    assert len(table(out / "volumes.csv")) == 5


def test_a_record_names_its_scans_from_anywhere(folder, tmp_path, monkeypatch):
    case = min(folder.iterdir())
    monkeypatch.chdir(folder)
    assert run("segment", "-i", case.name, "-o", "../out", "--quiet", "--no-preview")[0] == 0
    record = json.loads((tmp_path / "out" / "records" / f"{case.name}.json").read_text())
    monkeypatch.chdir("/")
    assert {Path(name).parent for name in record["inputs"]} == {case}


def test_resume_with_other_options_or_model_does_everything_again(folder, tmp_path):
    out = tmp_path / "out"
    cases = find_inputs(folder)[:2]
    segment_cohort(cases, segmenter(out))
    assert [r.status for r in segment_cohort(cases, segmenter(out), resume=True)] == ["kept", "kept"]
    assert [r.status for r in segment_cohort(cases, segmenter(out, scheme="brats2023"), resume=True)] == [
        "done",
        "done",
    ]


def test_an_old_result_never_passes_for_a_new_one(folder, tmp_path):
    case, other, *rest = sorted(folder.iterdir())
    for path in rest:
        shutil.rmtree(path)
    out = tmp_path / "out"
    first = run("segment", "-i", folder, "-o", out, "--quiet", "--report")
    assert first[0] == 0
    before = label_maps(out)
    run("segment", "-i", folder, "-o", out, "--quiet", "--no-preview")
    assert not (out / f"{other.name}_report.html").exists(), "a report of another call than the map beside it"
    assert (out / f"{other.name}_report.html.superseded").is_file()
    truncated = next(case.glob("*_t2.nii.gz"))
    truncated.write_bytes(truncated.read_bytes()[:500])
    for _ in range(2):
        code, _ = run("segment", "-i", folder, "-o", out, "--quiet", "--no-preview")
        assert code == 1
        assert sorted(label_maps(out)) == [f"{other.name}_seg.nii.gz"]
        kept = sorted(out.glob(f"{case.name}_seg.nii.gz.superseded*"))
        assert [path.read_bytes() for path in kept] == [before[f"{case.name}_seg.nii.gz"]]
    broken = next(other.glob("*_t2.nii.gz"))
    broken.write_bytes(broken.read_bytes()[:500])
    code, _ = run("segment", "-i", other, "-o", out, "--quiet", "--no-preview")
    assert code == 2
    assert not label_maps(out)


def test_parts_are_disjoint_and_complete(folder, tmp_path):
    cases = find_inputs(folder)
    parts = [part_of(cases, parts=3, part=i) for i in range(3)]
    assert sorted(case.case_id for part in parts for case in part) == [case.case_id for case in cases]
    assert sum(map(len, parts)) == len(cases)
    with pytest.raises(SettingsError, match="part id"):
        part_of(cases, parts=3, part=3)
    for i in range(2):
        words = ["segment", "-i", folder, "-o", tmp_path / "out", "--num-parts", 2, "--part-id", i]
        assert run(*words, "--quiet", "--no-preview", "--no-statistics")[0] == 0
    assert len(label_maps(tmp_path / "out")) == 5
    rows = [row for i in range(2) for row in table(tmp_path / "out" / f"volumes-part-{i}-of-2.csv")]
    assert len(rows) == 5


def test_two_processes_do_not_write_one_folder(folder, tmp_path):
    code = (
        "import fcntl, sys, time; h = open(sys.argv[1], 'w'); fcntl.flock(h, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out" / ".lock")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SettingsError, match="another process"):
            segment_cohort(find_inputs(folder)[:1], segmenter(tmp_path / "out"))
        other.kill()


@pytest.mark.parametrize("delay", [0.0, 0.15, 0.4, 0.9])
def test_killed_half_way_and_resumed_it_ends_like_an_uninterrupted_run(folder, tmp_path, delay):
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "fediod_med.cli.main", "segment", "-i", str(folder), "-o", str(out), "--quiet"]
    command += ["--no-preview", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not label_maps(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    for name in label_maps(out):  # whatever has its name is whole
        assert np.asarray(nib.load(out / name).dataobj).shape == (32, 32, 32)
    done = {path.stem for path in (out / "records").glob("*.json")}
    times = {name: (out / name).stat().st_mtime_ns for name in label_maps(out)}
    results = segment_cohort(find_inputs(folder), segmenter(out), resume=True)
    assert {r.case_id for r in results if r.status == "kept"} == done
    assert all((out / f"{case}_seg.nii.gz").stat().st_mtime_ns == times[f"{case}_seg.nii.gz"] for case in done)
    segment_cohort(find_inputs(folder), segmenter(whole))
    assert label_maps(out) == label_maps(whole)


def test_an_unexpected_error_of_one_case_is_recorded_with_its_type(folder, tmp_path, monkeypatch):
    tool = segmenter(tmp_path / "out")
    compute = tool.compute

    def broken(loaded):
        if loaded.case.case_id.endswith("3_1") or loaded.case == cases[1]:
            raise ZeroDivisionError("surprise")
        return compute(loaded)

    cases = find_inputs(folder)[:3]
    monkeypatch.setattr(tool, "compute", broken)
    results = segment_cohort(cases, tool)
    assert [r.status for r in results].count("failed") >= 1
    failed = next(r for r in results if r.case_id == cases[1].case_id)
    assert failed.record["reason"] == "unexpected ZeroDivisionError: surprise"
    assert failed.record["expected"] is False


def test_a_single_broken_case_gives_no_output_at_all_and_exit_2(folder, tmp_path):
    case = sorted(folder.iterdir())[0]
    path = next(case.glob("*_t2.nii.gz"))
    path.write_bytes(path.read_bytes()[:500])
    code, message = run("segment", "-i", case, "-o", tmp_path / "out", "--quiet")
    assert code == 2
    assert message.startswith("E101")
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_strict_turns_warnings_into_refusals(folder, tmp_path):
    case = sorted(folder.iterdir())[0]
    path = next(case.glob("*_t2.nii.gz"))
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float32) + 20, image.affine), path)
    assert run("segment", "-i", case, "-o", tmp_path / "a", "--quiet", "--no-preview")[0] == 0
    code, message = run("segment", "-i", case, "-o", tmp_path / "b", "--quiet", "--strict")
    assert code == 2
    assert "W160" in message
    assert not (tmp_path / "b").exists()


def test_check_names_every_finding_of_every_case(folder):
    first, second, *_ = sorted(folder.iterdir())
    path = next(first.glob("*_t2.nii.gz"))
    path.write_bytes(b"")
    next(second.glob("*_flair.nii.gz")).unlink()
    code, output = run("check", folder, "--json")
    assert code == 1
    found = {(f["case"], f["code"]) for f in json.loads(output)["findings"]}
    assert {(first.name, "E103"), (second.name, "E140")} <= found
    code, output = run("check", folder)
    assert code == 1
    assert "5 cases, 2 cannot be segmented" in output


def test_tables_lists_and_folders_name_the_same_cases(folder, tmp_path):
    by_folder = find_inputs(folder)
    rows = ["PatientID,T1,T1GD,T2,T2FLAIR"]
    entries, lines = [], []
    for case in by_folder:
        assert case.subject is not None
        images = {name: os.path.relpath(path, tmp_path) for name, path in case.subject.images.items()}
        rows.append(f"{case.case_id},{images['T1']},{images['T1c']},{images['T2']},{images['FLAIR']}")
        entries.append({"case": case.case_id, "image": [images[name] for name in ("FLAIR", "T1", "T1c", "T2")]})
        lines.append(os.path.relpath(folder / case.case_id, tmp_path))
    (tmp_path / "a.csv").write_text("\n".join(rows))
    (tmp_path / "b.json").write_text(json.dumps({"testing": entries}))
    (tmp_path / "c.txt").write_text("# cases\n" + "\n".join(lines))
    for name in ("a.csv", "b.json", "c.txt"):
        found = find_inputs(tmp_path / name)
        assert [case.case_id for case in found] == [case.case_id for case in by_folder]
        for one, other in zip(found, by_folder, strict=True):
            assert one.subject is not None and other.subject is not None
            assert {k: p.resolve() for k, p in one.subject.images.items()} == {
                k: p.resolve() for k, p in other.subject.images.items()
            }


def test_a_row_that_cannot_be_used_is_a_case_with_a_problem(folder, tmp_path):
    (tmp_path / "a.csv").write_text(
        f"case,folder,t1c\ngood,{folder / sorted(folder.iterdir())[0].name},\nbad,,x.nii.gz\n"
    )
    bad, good = find_inputs(tmp_path / "a.csv")
    assert good.problem is None and good.subject is not None
    assert bad.problem is not None and "T1, T2, FLAIR" in bad.problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "case,folder\n", "at least one case"),
        ("a.json", "{", "could not read it"),
        ("a.json", '{"x": 1}', "expected a list"),
        ("a.nii.gz", "x", "found .gz"),
        ("a.csv", "case,folder\nx,.\nx,.\n", "twice"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        find_inputs(tmp_path / name)


def test_python_gets_arrays_and_paths(folder, tmp_path):
    case = sorted(folder.iterdir())[0]
    found = fediod_med.segment(case, out=tmp_path / "out", probabilities=True, preview=False)
    assert found.classes.shape == (32, 32, 32) and found.classes.dtype == np.uint8
    assert found.probabilities is not None and found.probabilities.shape == (4, 32, 32, 32)
    assert np.allclose(found.probabilities.sum(axis=0), 1, atol=1e-4)
    assert np.array_equal(found.labels, np.asarray(nib.load(found.paths["segmentation"]).dataobj))
    assert set(np.unique(found.labels)) <= {0, 1, 2, 4}
    assert np.array_equal(found.affine, nib.load(next(case.glob("*_t1ce.nii.gz"))).affine)
    assert 0 <= found.quality["value"] <= 1
    images = {"T1c": "t1ce", "T1": "t1", "T2": "t2", "FLAIR": "flair"}
    again = fediod_med.segment({name: case / f"{case.name}_{suffix}.nii.gz" for name, suffix in images.items()})
    assert np.array_equal(again.classes, found.classes)
    assert not again.paths
    with pytest.raises(SettingsError, match="found colour"):
        fediod_med.segment(case, colour=True)
    next(case.glob("*_t2.nii.gz")).write_bytes(b"")
    with pytest.raises(RefusedInput) as refused:
        fediod_med.segment(case)
    assert [f.code for f in refused.value.findings] == ["E103"]


def test_uncertainty_maps_lie_on_the_scan(folder, tmp_path):
    case = sorted(folder.iterdir())[0]
    found = fediod_med.segment(case, out=tmp_path / "out", uncertainty=True, preview=False, report=True)
    entropy = nib.load(found.paths["entropy"])
    assert entropy.shape == (32, 32, 32)
    assert np.array_equal(entropy.affine, found.affine)
    values = np.asarray(entropy.dataobj)
    assert values.min() >= 0 and 0.1 < values.max() <= np.log(4) + 1e-3
    assert any("disagreement" in note for note in found.notes)
    assert found.paths["report"].read_text().startswith("<!DOCTYPE html>")


def test_dicom_output_of_other_input_is_refused_before_anything_is_written(folder, tmp_path):
    code, message = run(
        "segment", "-i", sorted(folder.iterdir())[0], "-o", tmp_path / "out", "--output-type", "dicom-seg"
    )
    assert code == 2
    assert "expected DICOM input" in message
    assert not label_maps(tmp_path / "out")


def resident_mb() -> float:
    """Memory of this process that lies in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to ask for resident memory")
def test_memory_does_not_grow_over_fifty_cases(tmp_path):
    write_cohort(
        tmp_path / "in", count=2, seed=4, grid=Grid((96, 96, 96), 2.0), profile=hospital_profiles()[0], prefix="MEM"
    )
    folders = sorted(path for path in (tmp_path / "in").glob("*/*") if path.is_dir())
    rows = [f"case{i:02d},{folders[i % 2]}" for i in range(50)]
    (tmp_path / "cohort.csv").write_text("case,folder\n" + "\n".join(rows))
    seen: list[float] = []
    results = segment_cohort(
        find_inputs(tmp_path / "cohort.csv"),
        segmenter(tmp_path / "out", preview=True),
        on_result=lambda _: seen.append(resident_mb()),
    )
    assert [r.status for r in results] == ["done"] * 50
    one_case_mb = 4 * 96**3 * 4 / 1e6
    assert max(seen[25:]) - max(seen[5:25]) < one_case_mb  # a leak of one volume a case would be 25 times that


def test_an_external_program_strips_the_skull_first(folder, tmp_path):
    case = sorted(folder.iterdir())[0]
    script = tmp_path / "strip.py"
    script.write_text(
        "import sys, nibabel as nib, numpy as np\n"
        "image = nib.load(sys.argv[1]); values = np.asarray(image.dataobj)\n"
        "nib.save(nib.Nifti1Image(np.where(values > 21, values, 0).astype(np.float32), image.affine), sys.argv[2])\n"
    )
    clean = fediod_med.segment(case)
    for path in case.glob("*.nii.gz"):
        if not path.name.endswith("_seg.nii.gz"):
            image = nib.load(path)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float32) + 20, image.affine), path)
    assert "W160" in {f.code for f in fediod_med.segment(case).findings}
    command = f"{sys.executable} {script} {{input}} {{output}}"
    found = fediod_med.segment(case, preprocess=command, smallest_lesion_ml=0)
    assert "W160" not in {f.code for f in found.findings}
    assert np.mean(found.classes != clean.classes) < 0.05
    with pytest.raises(SettingsError, match="found none called"):
        fediod_med.segment(case, preprocess="no-such-program {input} {output}")


def test_registered_scans_are_segmented_and_the_map_lies_on_the_chosen_grid(folder, tmp_path):
    case = sorted(folder.iterdir())[0]
    flair = next(case.glob("*_flair.nii.gz"))
    image = nib.load(flair)
    affine = image.affine.copy()
    affine[:3, 3] += (3.0, -2.0, 1.0)  # the header is off, as after a patient has moved
    nib.save(
        nib.Nifti1Image(np.asarray(image.dataobj)[1:], affine @ nib.affines.from_matvec(np.eye(3), (1, 0, 0))), flair
    )
    with pytest.raises(RefusedInput, match="E150"):
        fediod_med.segment(case)
    found = fediod_med.segment(case, out=tmp_path / "out", coregister=True, native="FLAIR")
    written, source = nib.load(found.paths["segmentation"]), nib.load(flair)
    assert written.shape == source.shape == (31, 32, 32)
    assert np.array_equal(written.affine, source.affine)
    assert {f.code for f in found.findings} >= {"N156"}
