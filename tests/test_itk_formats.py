from __future__ import annotations

import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fediod_med.data.itk_formats import read_any_scan, read_scans
from fediod_med.data.layouts import Subject, find_cases, find_subject
from fediod_med.data.nifti.reading import read_scan, read_subject
from fediod_med.data.nifti.writing import write_label_map, write_volumes
from fediod_med.data.scans import on_one_grid
from fediod_med.errors import GeometryError, InputError, LabelError
from fediod_med.labels import SCHEMES, SEQUENCES

SHAPE = (5, 6, 7)
ENDINGS = [".nrrd", ".mha", ".mhd"]


def noise(seed=0, shape=SHAPE, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(dtype)


def oblique(spacing=(0.9, 1.1, 5.0), angles=(10, -25, 40), offset=(-70.0, 33.0, 12.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = offset
    return affine


def nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def convert(source: Path, target: Path, *, compressed=False) -> Path:
    """Let ITK itself turn a NIfTI file into another format: its idea of left and right, not ours."""
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(source)), str(target), compressed)
    return target


def make(folder: Path, ending: str, *, compressed=False, seed=0) -> Path:
    source = nifti(folder / "source.nii.gz", noise(seed), oblique())
    return convert(source, folder / f"scan{ending}", compressed=compressed)


def data_file(path: Path) -> Path:
    """Where the values of a file that ITK wrote lie."""
    packed = [path.with_suffix(suffix) for suffix in (".raw", ".zraw") if path.with_suffix(suffix).exists()]
    return packed[0] if path.suffix == ".mhd" else path


def edit(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_each_format_gives_the_values_and_place_of_the_nifti_file_it_came_from(tmp_path, ending, compressed):
    path = make(tmp_path, ending, compressed=compressed)
    found, expected = read_any_scan(path, "T1"), read_scan(tmp_path / "source.nii.gz", "T1")
    assert np.array_equal(found.array, expected.array)
    assert found.array.dtype == np.float32
    assert found.array.flags["C_CONTIGUOUS"]
    assert np.allclose(found.affine, oblique(), atol=1e-4)
    assert found.path == path


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    ending=st.sampled_from(ENDINGS),
)
def test_a_voxel_lies_where_it_lay_whatever_the_orientation(tmp_path, angles, spacing, flips, ending):
    affine = oblique(spacing, angles) @ np.diag([*flips, 1])
    image = SimpleITK.GetImageFromArray(noise().T)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    image.SetSpacing(spacing)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / np.array(spacing)).ravel().tolist())
    SimpleITK.WriteImage(image, str(tmp_path / f"x{ending}"))
    found = read_any_scan(tmp_path / f"x{ending}", "T1")
    assert np.allclose(found.affine, affine, atol=1e-6)
    assert np.array_equal(found.array, noise())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_any_number_type_is_read(tmp_path, dtype):
    image = SimpleITK.GetImageFromArray(noise(shape=SHAPE).astype(dtype).T)
    for ending in ENDINGS:
        SimpleITK.WriteImage(image, str(tmp_path / f"x{ending}"))
        assert np.array_equal(read_any_scan(tmp_path / f"x{ending}", "T2").array, noise().astype(dtype))


def test_a_real_case_is_the_same_in_every_format(tmp_path, shared_data):
    subject = find_subject(shared_data / "brats18_2mm" / "HGG" / "Brats18_2013_3_1")
    endings = dict(zip(SEQUENCES, [".nrrd", ".mha", ".mhd", ".nii.gz"], strict=True))
    images = {name: convert(path, tmp_path / f"c_{name}{endings[name]}") for name, path in subject.images.items()}
    found, expected = on_one_grid(read_scans(find_subject(tmp_path))), read_subject(subject)
    assert find_subject(tmp_path).images == images
    assert np.array_equal(found.array, expected.array)
    assert np.allclose(found.affine, expected.affine, atol=1e-4)


# ---------------------------------------------------------------- subjects


def case_of(folder: Path, ending: str) -> Path:
    folder.mkdir()
    for i, name in enumerate(("t1ce", "t1", "t2", "flair")):
        nifti(folder / "x.nii", noise(i), oblique())
        convert(folder / "x.nii", folder / f"case_{name}{ending}")
    (folder / "x.nii").unlink()
    return folder


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_of_such_files_is_a_case(tmp_path, ending):
    subject = find_subject(case_of(tmp_path / "case", ending))
    volume = on_one_grid(read_scans(subject))
    assert volume.array.shape == (4, *SHAPE)
    for i in range(4):
        assert np.array_equal(volume.array[i], noise(i))
    assert volume.path == subject.images["T1c"]
    assert [found.subject_id for found in find_cases(tmp_path)] == ["case"]


def test_scans_keep_their_own_grids_and_one_volume_needs_one_grid(tmp_path):
    subject = find_subject(case_of(tmp_path / "case", ".nrrd"))
    nifti(tmp_path / "x.nii", noise(2, (4, 4, 4)), np.eye(4))
    convert(tmp_path / "x.nii", subject.images["T2"])
    scans = read_scans(subject)
    assert list(scans) == list(SEQUENCES)
    assert scans["T2"].array.shape == (4, 4, 4)
    assert np.array_equal(scans["T2"].affine, np.eye(4))
    with pytest.raises(GeometryError, match="expected shape"):
        on_one_grid(read_scans(subject))


def test_a_4d_nifti_file_gives_its_scans_too(tmp_path):
    stack = noise(shape=(*SHAPE, 4))
    path = nifti(tmp_path / "BRATS_001.nii.gz", stack, np.eye(4))
    channels = {"T1c": 2, "T1": 1, "T2": 3, "FLAIR": 0}
    scans = read_scans(Subject("x", dict.fromkeys(SEQUENCES, path), channels))
    for name, channel in channels.items():
        assert np.array_equal(scans[name].array, stack[..., channel])
    with pytest.raises(InputError, match="one sequence per file"):
        read_any_scan(make(tmp_path, ".mha"), "T1", channel=0)


def test_a_missing_sequence_is_named(tmp_path):
    subject = find_subject(case_of(tmp_path / "case", ".mha"))
    images = {name: path for name, path in subject.images.items() if name != "T2"}
    with pytest.raises(InputError, match="missing T2"):
        read_scans(Subject("x", images))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kept", [0.4, 0.9])
def test_a_truncated_file_is_refused(tmp_path, ending, compressed, kept):
    path = make(tmp_path, ending, compressed=compressed)
    data = data_file(path)
    content = data.read_bytes()
    data.write_bytes(content[: len(content) - int((1 - kept) * 400)])
    with pytest.raises(InputError, match=r"truncated|damaged|defect|could not read"):
        read_any_scan(path, "T1")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_changed_byte_in_a_compressed_stream_is_refused(tmp_path, ending):
    """ITK reads such a MetaImage file without an error, half of it wrong."""
    path = make(tmp_path, ending, compressed=True)
    data = data_file(path)
    content = bytearray(data.read_bytes())
    content[-100] ^= 0x55
    data.write_bytes(content)
    with pytest.raises(InputError, match=r"copy it again|could not read"):
        read_any_scan(path, "T1")


def test_a_stream_that_unpacks_to_too_little_is_refused(tmp_path):
    path = make(tmp_path, ".mhd", compressed=True)
    data_file(path).write_bytes(zlib.compress(bytes(10)))
    with pytest.raises(InputError, match="expected 420 bytes of voxels, found 10"):
        read_any_scan(path, "T1")


@pytest.mark.parametrize("ending", ENDINGS)
def test_missing_empty_and_foreign_files_are_refused(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    with pytest.raises(InputError, match="found nothing"):
        read_any_scan(path, "T1")
    path.touch()
    with pytest.raises(InputError, match="empty file"):
        read_any_scan(path, "T1")
    path.write_bytes(b"\x89PNG" * 100)
    with pytest.raises(InputError, match="does not fit the content"):
        read_any_scan(path, "T1")


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        (".nrrd", b"space: left-posterior-superior\n"),
        (".nrrd", b"space origin: "),
        (".mha", b"TransformMatrix = "),
        (".mha", b"Offset = "),
    ],
)
def test_a_header_that_does_not_state_where_the_scan_lies_is_refused(tmp_path, ending, line):
    path = make(tmp_path, ending)
    content = path.read_bytes()
    start = content.index(line)
    path.write_bytes(content[:start] + content[content.index(b"\n", start) + 1 :])
    with pytest.raises(GeometryError, match="left and right cannot be told"):
        read_any_scan(path, "T1")


def test_units_other_than_millimetres_are_refused(tmp_path):
    path = edit(make(tmp_path, ".nrrd"), b"encoding: raw\n", b'encoding: raw\nspace units: "mm" "mm" "mm"\n')
    read_any_scan(path, "T1")
    edit(path, b'"mm" "mm" "mm"', b'"m" "m" "m"')
    with pytest.raises(GeometryError, match="expected millimetres, found the units m"):
        read_any_scan(path, "T1")


def test_a_sheared_grid_is_refused(tmp_path):
    path = make(tmp_path, ".nrrd")
    content = path.read_bytes()
    start = content.index(b"space directions:")
    path.write_bytes(
        content[:start] + b"space directions: (1,0,0) (0.5,1,0) (0,0,1)" + content[content.index(b"\n", start) :]
    )
    with pytest.raises((GeometryError, InputError), match=r"shear|could not read"):
        read_any_scan(path, "T1")


@pytest.mark.parametrize("elsewhere", ["../secret.raw", "/etc/passwd", "LIST", "slice%03d.raw 1 7 1"])
def test_data_outside_the_folder_are_not_followed(tmp_path, elsewhere):
    (tmp_path / "secret.raw").write_bytes(bytes(1000))
    (tmp_path / "case").mkdir()
    path = make(tmp_path / "case", ".mhd")
    edit(path, b"scan.raw", elsewhere.encode())
    with pytest.raises(InputError, match="of the same folder"):
        read_any_scan(path, "T1")


def test_a_header_without_its_data_file_says_so(tmp_path):
    path = make(tmp_path, ".mhd")
    data_file(path).unlink()
    with pytest.raises(InputError, match=r"data file 'scan\.raw' beside it"):
        read_any_scan(path, "T1")


@pytest.mark.parametrize("ending", ENDINGS)
def test_colours_4d_constant_and_not_finite_scans_are_refused(tmp_path, ending):
    def refused(image, message):
        SimpleITK.WriteImage(image, str(tmp_path / f"x{ending}"))
        with pytest.raises(InputError, match=message):
            read_any_scan(tmp_path / f"x{ending}", "T1")

    refused(SimpleITK.GetImageFromArray(noise(shape=(5, 6, 7, 3), dtype=np.uint8), isVector=True), "one real number")
    refused(SimpleITK.GetImageFromArray(noise(shape=(2, 5, 6, 7)), isVector=False), "expected a 3-D volume")
    refused(SimpleITK.GetImageFromArray(noise(shape=(6, 7))), "expected a 3-D volume")
    refused(SimpleITK.GetImageFromArray(np.ones(SHAPE)), "found 1 in every voxel")
    bad = noise(dtype=np.float32)
    bad[2, 2, 2] = np.nan
    refused(SimpleITK.GetImageFromArray(bad), "NaN or Inf in 1 voxels")


# ---------------------------------------------------------------- the label map of such a scan


def test_a_label_map_without_a_nifti_reference_lies_on_the_scan(tmp_path):
    classes = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)
    volume = read_any_scan(make(tmp_path, ".mha"), "T1c")
    write_label_map(tmp_path / "out" / "seg.nii.gz", classes, volume.affine, SCHEMES["brats2018"])
    written = nib.load(tmp_path / "out" / "seg.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), np.array([0, 1, 2, 4])[classes])
    assert written.get_data_dtype() == np.uint8
    assert np.allclose(written.affine, volume.affine, atol=1e-5)
    assert {int(written.header[f"{form}form_code"]) for form in "qs"} == {2}
    # ITK, an independent reader, finds mask and scan in one place.
    scan, mask = (SimpleITK.ReadImage(str(tmp_path / name)) for name in ("scan.mha", "out/seg.nii.gz"))
    assert np.allclose(scan.GetOrigin(), mask.GetOrigin(), atol=1e-4)
    assert np.allclose(scan.GetDirection(), mask.GetDirection(), atol=1e-5)


def test_a_label_map_refuses_what_it_cannot_hold(tmp_path):
    scheme, good = SCHEMES["brats2018"], np.ones(SHAPE, np.uint8)
    path = tmp_path / "seg.nii.gz"
    with pytest.raises(LabelError, match="expected classes 0 to 3"):
        write_label_map(path, good * 4, np.eye(4), scheme)
    with pytest.raises(InputError, match="expected classes"):
        write_label_map(path, good[0], np.eye(4), scheme)
    with pytest.raises(GeometryError, match="sheared"):
        write_label_map(path, good, np.eye(4) + np.eye(4, k=1), scheme)
    with pytest.raises(GeometryError, match="corners up to"):  # 16 m away float32 is coarser than the tolerance
        write_label_map(path, good, np.array([[1, 0, 0, 1e7 / 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), scheme)
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_phantoms_written_as_volumes_are_read_as_before(tmp_path):
    write_volumes(tmp_path / "x.nii.gz", noise(dtype=np.float32), oblique())
    assert np.allclose(read_any_scan(tmp_path / "x.nii.gz", "T1").affine, oblique(), atol=1e-5)
