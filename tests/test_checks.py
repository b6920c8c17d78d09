"""Broken inputs, each made from a good one: the right code, and no false alarm on the good one."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from fediod_med.checks.case import inspect_subject
from fediod_med.checks.pairs import mutual_information
from fediod_med.cli.main import command_line
from fediod_med.data.layouts import Subject, find_cases, find_subject
from fediod_med.data.nifti.writing import write_segmentation
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.errors import FediodError
from fediod_med.findings import CATALOGUE, Severity, as_json, fatal
from fediod_med.labels import SEQUENCES, get_scheme

SUFFIX = {"T1c": "t1ce", "T1": "t1", "T2": "t2", "FLAIR": "flair"}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A phantom case on a 4 mm grid."""
    root = tmp_path_factory.mktemp("good")
    write_cohort(root, count=1, seed=5, grid=Grid((48, 48, 48), 4.0), profile=hospital_profiles()[0], prefix="CHK")
    (case,) = [path for path in root.glob("*/*") if path.is_dir()]
    return case


@pytest.fixture
def case(good, tmp_path) -> Path:
    """A copy of it to break."""
    folder = tmp_path / good.name
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def file_of(folder: Path, sequence: str = "T2") -> Path:
    (path,) = folder.glob(f"*_{SUFFIX.get(sequence, sequence)}.nii.gz")
    return path


def subject_of(folder: Path) -> Subject:
    images = {name: file_of(folder, name) for name in SEQUENCES}
    labels = list(folder.glob("*_seg.nii.gz"))
    return Subject(folder.name, images, label=labels[0] if labels else None)


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray] = lambda v: v, **header) -> None:
    """Save a file anew with other values or header fields."""
    image = nib.load(path)
    values = change(np.asarray(image.dataobj).astype(np.float32))
    new = nib.Nifti1Image(values, header.pop("affine", image.affine))
    new.header.set_xyzt_units("mm")
    for field, value in header.items():
        new.header[field] = value
    content = new.to_bytes()
    path.write_bytes(gzip.compress(content))


def patch(path: Path, **fields) -> None:
    """Change header fields in the bytes of a file, behind nibabel's back."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)))


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def short_stream(path: Path) -> None:
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[: len(raw) // 2]))


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[20:23, 20, 20] = value
        return values

    return change


def sheared(path: Path) -> None:
    affine = nib.load(path).affine.copy()
    affine[0, 1] = affine[0, 0] * 0.2
    rewrite(path, affine=affine, qform_code=0)


def copy_of(other: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(file_of(path.parent, other).read_bytes())

    return change


def moved(path: Path) -> None:
    affine = nib.load(path).affine.copy()
    affine[0, 3] += 7.3
    rewrite(path, affine=affine)


def pair_header(path: Path) -> None:
    patch(path, magic=b"ni1\0")


def colour(path: Path) -> None:
    patch(path, datatype=128, bitpix=24)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def extension(path: Path) -> None:
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    path.write_bytes(gzip.compress(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header).to_bytes()))


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "half of the gzip stream": ("E101", truncate),
    "half of the voxels": ("E101", short_stream),
    "a flipped byte in the stream": (
        "E101",
        lambda p: p.write_bytes(p.read_bytes()[:-6] + b"\x00\x01\x02\x03\x04\x05"),
    ),
    "not gzip though named so": ("E102", lambda p: p.write_bytes(gzip.decompress(p.read_bytes()))),
    "empty file": ("E103", lambda p: p.write_bytes(b"")),
    "some text in gzip": ("E104", lambda p: p.write_bytes(gzip.compress(b"not a scan " * 99))),
    "an impossible number of dimensions": ("E104", lambda p: patch(p, dim=[9, 48, 48, 48, 1, 1, 1, 1])),
    "removed file": ("E105", lambda p: p.unlink()),
    "a folder of that name": ("E105", folder_instead),
    "header of a pair": ("E106", pair_header),
    "NaN": ("E110", lambda p: rewrite(p, with_value(np.nan))),
    "infinite": ("E110", lambda p: rewrite(p, with_value(np.inf))),
    "4-D": ("E111", lambda p: rewrite(p, lambda v: np.stack([v, v], axis=-1))),
    "2-D": ("E112", lambda p: rewrite(p, lambda v: v[:, :, 20])),
    "colour": ("E113", colour),
    "no geometry": ("E120", lambda p: patch(p, sform_code=0, qform_code=0)),
    "NaN in the affine": ("E121", lambda p: patch(p, srow_x=[np.nan, 0, 0, 0], qform_code=0)),
    "a singular affine": ("E121", lambda p: patch(p, srow_x=[0, 0, 0, 0], qform_code=0)),
    "sheared": ("E122", sheared),
    "metres": ("E123", lambda p: patch(p, xyzt_units=1)),
    "the same scan twice": ("E141", copy_of("T1")),
    "the same scan on another scale": (
        "E141",
        lambda p: p.write_bytes(gzip.compress(scaled(file_of(p.parent, "T1"), 3, 20))),
    ),
    "one slice less": ("E150", lambda p: rewrite(p, lambda v: v[:, :, :-1])),
    "another position": ("E150", moved),
    "constant": ("E161", lambda p: rewrite(p, lambda v: np.full_like(v, 3))),
    "all zero": ("E161", lambda p: rewrite(p, np.zeros_like)),
    "two contradictory geometries": ("W121", lambda p: patch(p, qoffset_x=30.0)),
    "swapped with T1": ("W142", lambda p: swap(p, file_of(p.parent, "T1"))),
    "swapped with FLAIR": ("W142", lambda p: swap(p, file_of(p.parent, "FLAIR"))),
    "moved content": ("W151", lambda p: rewrite(p, lambda v: np.roll(v, 2, axis=1))),
    "a skull": ("W160", lambda p: rewrite(p, lambda v: v + 20)),
    "a scrap of brain": ("W162", lambda p: rewrite(p, lambda v: np.where(scrap(v.shape), v, 0))),
    "negative values": ("W173", lambda p: rewrite(p, lambda v: np.where(v > 0, v - 2 * v.mean(), 0))),
    "a negative scale": ("W173", lambda p: patch(p, scl_slope=-1.0, scl_inter=0.0)),
    "two values": ("W173", lambda p: rewrite(p, lambda v: (v > 0).astype(np.float32))),
    "a name in the description": ("P200", lambda p: patch(p, descrip=b"Jane Doe 1961-02-03")),
    "a name in an extension": ("P200", extension),
}


def scaled(path: Path, factor: float, offset: float) -> bytes:
    """A NIfTI file with other values of the same scan, zero outside the brain."""
    image = nib.load(path)
    values = np.asarray(image.dataobj, np.float32)
    return nib.Nifti1Image(np.where(values != 0, values * factor + offset, 0), image.affine).to_bytes()


def swap(one: Path, other: Path) -> None:
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def scrap(shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[20:26, 20:26, 20:26] = True
    return mask


def codes(folder: Path) -> set[str]:
    return {found.code for found in inspect_subject(subject_of_any(folder)).findings}


def subject_of_any(folder: Path) -> Subject:
    """As `subject_of`, also when a file was removed."""
    stem = folder.name
    return Subject(folder.name, {name: folder / f"{stem}_{SUFFIX[name]}.nii.gz" for name in SEQUENCES})


def test_a_good_case_has_no_finding_but_notes(case):
    inspection = inspect_subject(subject_of(case), label_scheme=get_scheme("brats2018"))
    assert {found.code for found in inspection.findings} <= {"N171", "N172", "W170"}
    assert inspection.volume is not None
    assert inspection.volume.array.shape == (4, 48, 48, 48)


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_file_gets_its_code_and_no_volume_with_an_error(case, name):
    code, damage = BROKEN[name]
    damage(case / f"{case.name}_t2.nii.gz")
    inspection = inspect_subject(subject_of_any(case))
    found = {f.code: f for f in inspection.findings}
    assert code in found, sorted(found)
    assert (inspection.volume is None) == bool(fatal(inspection.findings))
    assert bool(fatal(inspection.findings)) == code.startswith("E")
    assert found[code].fix == CATALOGUE[code].fix
    assert found[code].message
    assert "Jane" not in as_json(inspection.findings)


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("E101", lambda raw: raw[: len(raw) // 2]),
        ("E102", gzip.compress),
        ("E103", lambda raw: b""),
        ("E104", lambda raw: raw[:200]),
        ("E104", lambda raw: b"\x89PNG" + raw[4:]),
    ],
)
def test_uncompressed_files_are_checked_alike(case, code, content):
    images = dict(subject_of(case).images)
    images["T2"] = case / "t2.nii"
    images["T2"].write_bytes(content(gzip.decompress(file_of(case, "T2").read_bytes())))
    assert {f.code for f in fatal(inspect_subject(Subject("plain", images)).findings)} == {code}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("change", ["cut", "padded"])
def test_one_voxel_more_or_less_along_any_axis_is_another_grid(case, axis, change):
    def other(values: np.ndarray) -> np.ndarray:
        if change == "cut":
            return np.delete(values, -1, axis=axis)
        return np.pad(values, [(0, int(a == axis)) for a in range(3)])

    rewrite(file_of(case, "T1"), other)
    assert {f.code for f in fatal(inspect_subject(subject_of(case)).findings)} == {"E150"}


def test_a_name_in_an_nrrd_field_is_noticed_and_not_repeated(case):
    images = dict(subject_of(case).images)
    image = SimpleITK.ReadImage(str(images["T2"]))
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    images["T2"] = case / "t2.nrrd"
    SimpleITK.WriteImage(image, str(images["T2"]))
    assert "P200" not in {f.code for f in inspect_subject(Subject("nrrd", images)).findings}
    image.SetMetaData("0010|0010", "Doe^Jane")
    SimpleITK.WriteImage(image, str(images["T2"]))
    findings = inspect_subject(Subject("nrrd", images)).findings
    assert "P200" in {f.code for f in findings}
    assert "Jane" not in as_json(findings)


def test_the_corner_distance_is_stated_in_mm(case):
    moved(case / f"{case.name}_t2.nii.gz")
    (found,) = [f for f in inspect_subject(subject_of_any(case)).findings if f.code == "E150"]
    assert found.value == pytest.approx(7.3, abs=0.01)
    assert "7.30 mm" in found.message


def test_all_defects_of_a_case_are_found_in_one_pass(case):
    truncate(case / f"{case.name}_t1.nii.gz")
    rewrite(case / f"{case.name}_t2.nii.gz", with_value(np.nan))
    patch(case / f"{case.name}_flair.nii.gz", sform_code=0, qform_code=0)
    found = inspect_subject(subject_of_any(case)).findings
    assert {f.code for f in found} >= {"E101", "E110", "E120"}
    assert [f.severity for f in found] == sorted((f.severity for f in found), key=list(Severity).index)


def test_grids_that_will_be_registered_are_a_note_and_no_volume(case):
    moved(case / f"{case.name}_t2.nii.gz")
    inspection = inspect_subject(subject_of_any(case), one_grid=False)
    assert "N156" in {f.code for f in inspection.findings}
    assert not fatal(inspection.findings)
    assert inspection.volume is None
    assert set(inspection.scans) == set(SEQUENCES)


def test_a_missing_sequence_is_named(case):
    subject = subject_of(case)
    images = {name: path for name, path in subject.images.items() if name != "T1"}
    (found,) = fatal(inspect_subject(Subject("x", images)).findings)
    assert found.code == "E140"
    assert "T1" in found.message


def test_one_file_for_two_sequences_is_refused(case):
    images = dict(subject_of(case).images)
    images["T2"] = images["FLAIR"]
    assert "E141" in {f.code for f in fatal(inspect_subject(Subject("x", images)).findings)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_named(case):
    path = case / f"{case.name}_t2.nii.gz"
    path.chmod(0)
    assert "E105" in codes(case)


def label_codes(case: Path) -> set[str]:
    found = inspect_subject(subject_of(case), label_scheme=get_scheme("brats2018")).findings
    return {f.code for f in fatal(found)}


def test_label_maps_are_checked_by_the_declared_scheme(case):
    path = file_of(case, "seg")
    original = path.read_bytes()
    rewrite(path, lambda v: np.where(v == 4, 3, v))
    assert label_codes(case) == {"E190"}
    path.write_bytes(original)
    rewrite(path, lambda v: v + 0.5)
    assert label_codes(case) == {"E190"}
    path.write_bytes(original)
    moved(path)
    assert label_codes(case) == {"E191"}
    path.write_bytes(original)
    rewrite(path, lambda v: v[1:])
    assert label_codes(case) == {"E191"}
    path.unlink()
    assert label_codes(case) == {"E193"}


def test_other_formats_go_through_the_same_checks(case):
    images = {}
    for name in SEQUENCES:
        source = file_of(case, name)
        images[name] = case / f"{name}.nrrd"
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(source)), str(images[name]))
    inspection = inspect_subject(Subject("nrrd", images))
    assert not fatal(inspection.findings)
    assert inspection.volume is not None
    expected = inspect_subject(subject_of(case)).volume
    assert expected is not None
    assert np.array_equal(inspection.volume.array, expected.array)
    assert np.allclose(inspection.volume.affine, expected.affine, atol=1e-4)
    images["T2"].write_bytes(images["T2"].read_bytes()[:-5000])
    assert {f.code for f in fatal(inspect_subject(Subject("nrrd", images)).findings)} == {"E101"}


def test_mutual_information_of_a_copy_is_its_entropy_and_of_strangers_nothing(rng):
    values = np.repeat(np.arange(8.0), 1000)
    assert mutual_information(values, values, bins=8) == pytest.approx(np.log(8))
    assert mutual_information(values, -values, bins=8) == pytest.approx(np.log(8))
    assert mutual_information(values, np.tile(np.arange(8.0), 1000), bins=8) == pytest.approx(0, abs=1e-12)
    noise = rng.normal(size=(2, 20_000))
    assert mutual_information(noise[0], noise[1], bins=8) < 0.005


def test_every_code_has_words_and_a_fix():
    assert all(code.code == key and code.title and code.fix for key, code in CATALOGUE.items())
    assert {key[0] for key in CATALOGUE} == set("EWPN")


AXES = st.sampled_from([np.diag([1, 1, 1]), np.diag([-1, -1, 1]), np.eye(3)[[2, 0, 1]], np.diag([-1, 1, -1])])


@given(
    turn=st.tuples(*[st.floats(-40, 40) for _ in range(3)]),
    axes=AXES,
    spacing=st.tuples(*[st.floats(3.2, 6.0) for _ in range(3)]),
    cut=st.tuples(*[st.integers(0, 1) for _ in range(3)]),
    offset=st.tuples(*[st.floats(-200, 200) for _ in range(3)]),
)
@settings(max_examples=25, deadline=None)
def test_no_geometry_is_a_false_error_and_output_keeps_it(tmp_path_factory, good, turn, axes, spacing, cut, offset):
    """Oblique, anisotropic, odd-sized, flipped: no error finding, and a label map with exactly the input's header."""
    folder = tmp_path_factory.mktemp("any")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ axes @ np.diag(spacing)
    affine[:3, 3] = offset
    images = {}
    for name in SEQUENCES:
        values = np.asarray(nib.load(file_of(good, name)).dataobj)
        values = values[cut[0] :, cut[1] :, cut[2] :]
        images[name] = folder / f"{name}.nii"
        nib.save(nib.Nifti1Image(values, affine), images[name])
    inspection = inspect_subject(Subject("any", images))
    assert not fatal(inspection.findings), [f.message for f in fatal(inspection.findings)]
    assert inspection.volume is not None
    classes = np.zeros(inspection.volume.array.shape[1:], np.uint8)
    write_segmentation(folder / "seg.nii", classes, reference=images["T1c"], scheme=get_scheme("brats2018"))
    written, source = nib.load(folder / "seg.nii"), nib.load(images["T1c"])
    assert written.shape == source.shape
    assert np.array_equal(written.affine, source.affine)
    assert written.header.get_zooms() == source.header.get_zooms()


def test_real_scans_raise_no_error_and_no_false_suspicion(shared_data):
    subjects = [*find_cases(shared_data / "brats18_2mm")[:6], find_subject(next((shared_data / "brats23").iterdir()))]
    for subject in subjects:
        found = {f.code for f in inspect_subject(subject).findings}
        assert not any(code.startswith("E") for code in found), (subject.subject_id, found)
        assert not found & {"W142", "W151", "W160", "W162"}, (subject.subject_id, found)


@pytest.mark.parametrize(("one", "other"), [("T1c", "T1"), ("T1", "T2"), ("T2", "FLAIR")])
def test_swapped_real_sequences_are_noticed(shared_data, one, other):
    for subject in find_cases(shared_data / "brats18_2mm")[:4]:
        images = dict(subject.images)
        images[one], images[other] = images[other], images[one]
        assert "W142" in {f.code for f in inspect_subject(Subject("swapped", images)).findings}


@pytest.mark.parametrize("name", sorted(name for name, (code, _) in BROKEN.items() if code.startswith("E")))
def test_the_command_refuses_it_in_one_line_and_writes_nothing(case, tmp_path, name):
    code, damage = BROKEN[name]
    damage(case / f"{case.name}_t2.nii.gz")
    words = [f for n in SEQUENCES for f in (f"--{n.lower()}", str(case / f"{case.name}_{SUFFIX[n]}.nii.gz"))]
    result = CliRunner().invoke(command_line(), ["segment", *words, "-o", str(tmp_path / "out"), "--quiet"])
    assert isinstance(result.exception, FediodError)  # `main` prints it and exits with code 2
    message = str(result.exception)
    assert message.startswith(code)
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
