from __future__ import annotations

import gzip
import logging
import os
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff
from scipy.spatial.transform import Rotation

from fediod_med.data.grids import corner_distance
from fediod_med.data.layouts import Subject, find_subject, find_subjects
from fediod_med.data.nifti.reading import read_label, read_subject
from fediod_med.data.nifti.writing import write_segmentation, write_volumes
from fediod_med.errors import FediodError, GeometryError, InputError, LabelError
from fediod_med.labels import SCHEMES, SEQUENCES, from_classes

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SCHEME = SCHEMES["brats2018"]
SHAPE = (5, 6, 7)
# LPS with an offset, as BraTS has it.
LPS = np.array([[-1.0, 0, 0, 90], [0, -1, 0, 126], [0, 0, 1, -72], [0, 0, 0, 1]])


def need(folder: str) -> Path:
    if not (DATA / folder).is_dir():
        pytest.skip(f"real scans absent: shared/data/{folder} beside the repository")
    return DATA / folder


def load(path):
    """Read with nibabel, independently of the code under test (untyped: nibabel's own return type is too general)."""
    return nib.load(path)


def noise(shape=SHAPE, seed=0, dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(dtype)


def save(path: Path, array: np.ndarray, affine=LPS, *, sform=1, qform=1, image=nib.Nifti1Image) -> Path:
    """Write with nibabel, independently of the code under test."""
    img = image(array, affine)
    img.header.set_sform(affine, code=sform)
    img.header.set_qform(affine, code=qform)
    img.header.set_xyzt_units("mm", "sec")
    # Given an affine, nibabel would replace a code of 0 when saving.
    nib.save(image(array, None, img.header), path)
    return path


@pytest.fixture
def subject(tmp_path) -> Subject:
    images = {name: save(tmp_path / f"c_{name}.nii.gz", noise(seed=i)) for i, name in enumerate(SEQUENCES)}
    return Subject("c", images, label=save(tmp_path / "c_seg.nii.gz", noise_labels()))


def noise_labels(shape=SHAPE, dtype: type = np.uint8, values=(0, 1, 2, 4)) -> np.ndarray:
    return np.random.default_rng(9).choice(values, shape).astype(dtype)


def classes(shape=SHAPE, seed=3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


def replace(subject: Subject, **images: Path) -> Subject:
    return Subject(subject.subject_id, {**subject.images, **images}, subject.channels, subject.label)


# ---------------------------------------------------------------- reading


def test_sequences_are_stacked_in_order_on_their_own_axes(subject):
    volume = read_subject(subject)
    assert volume.array.dtype == np.float32
    assert volume.array.shape == (4, *SHAPE)
    for i in range(4):
        assert np.array_equal(volume.array[i], noise(seed=i))
    assert np.array_equal(volume.affine, LPS)
    assert volume.affine.dtype == np.float64
    assert volume.path == subject.images["T1c"]


def test_scaling_slope_and_intercept_are_applied(subject, tmp_path):
    img = nib.Nifti1Image(noise(), LPS)
    img.header.set_slope_inter(0.5, 10)
    img.header.set_data_dtype(np.int16)
    nib.save(img, tmp_path / "scaled.nii.gz")
    stored = load(tmp_path / "scaled.nii.gz")
    assert stored.dataobj.slope == 0.5
    found = read_subject(replace(subject, T2=tmp_path / "scaled.nii.gz")).array[2]
    assert np.array_equal(found, noise() * 0.5 + 10)
    assert np.array_equal(found, stored.get_fdata(dtype=np.float32))


def test_a_4d_file_gives_each_sequence_its_channel(tmp_path):
    channels = {"T1c": 2, "T1": 1, "T2": 3, "FLAIR": 0}
    stack = noise((*SHAPE, 4))
    path = save(tmp_path / "BRATS_001.nii.gz", stack)
    label = save(tmp_path / "label.nii.gz", noise_labels(values=(0, 1, 2, 3)))
    subject = Subject("BRATS_001", dict.fromkeys(SEQUENCES, path), channels, label)
    found = read_subject(subject).array
    for name, channel in channels.items():
        assert np.array_equal(found[SEQUENCES.index(name)], stack[..., channel])
    expected = np.array([0, 2, 1, 3])[noise_labels(values=(0, 1, 2, 3))]
    assert np.array_equal(read_label(subject, SCHEMES["msd"]), expected)
    write_segmentation(tmp_path / "out.nii.gz", classes(), reference=path, scheme=SCHEMES["msd"])
    assert load(tmp_path / "out.nii.gz").shape == SHAPE
    with pytest.raises(InputError, match="expected channel 4 to be T1c, found 4 channels"):
        read_subject(Subject("x", subject.images, channels | {"T1c": 4}))


def test_a_single_trailing_axis_is_no_fourth_dimension(subject, tmp_path):
    path = save(tmp_path / "t2.nii.gz", noise((*SHAPE, 1)))
    assert np.array_equal(read_subject(replace(subject, T2=path)).array[2], noise((*SHAPE, 1))[..., 0])


def test_uncompressed_big_endian_and_nifti2_files_are_read(subject, tmp_path):
    plain = save(tmp_path / "plain.nii", noise(seed=7))
    second = save(tmp_path / "second.nii.gz", noise(seed=8), image=nib.Nifti2Image)
    img = nib.Nifti1Image(noise(seed=9).astype(">i2"), LPS, nib.Nifti1Header(endianness=">"))
    nib.save(img, tmp_path / "big.nii.gz")
    found = read_subject(replace(subject, T1=plain, T2=second, FLAIR=tmp_path / "big.nii.gz")).array
    for i, seed in ((1, 7), (2, 8), (3, 9)):
        assert np.array_equal(found[i], noise(seed=seed))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_label_maps_of_any_number_type_become_classes(subject, tmp_path, dtype):
    path = save(tmp_path / "seg.nii.gz", noise_labels(dtype=dtype))
    found = read_label(Subject("c", subject.images, label=path), SCHEME)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.array([0, 1, 2, 0, 3])[noise_labels()])


def test_a_label_map_may_be_empty_of_tumour(subject, tmp_path):
    path = save(tmp_path / "seg.nii.gz", np.zeros(SHAPE, np.uint8))
    assert not read_label(Subject("c", subject.images, label=path), SCHEME).any()


def test_label_errors_name_the_file(subject, tmp_path):
    with pytest.raises(LabelError, match=r"c_seg\.nii\.gz: .*found 4"):
        read_label(subject, SCHEMES["brats2023"])
    half = save(tmp_path / "half.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(LabelError, match=r"half\.nii\.gz: .*found 0\.5"):
        read_label(Subject("c", subject.images, label=half), SCHEME)
    with pytest.raises(InputError, match="expected a label map, found none"):
        read_label(Subject("c", subject.images), SCHEME)
    four = save(tmp_path / "four.nii.gz", noise_labels((*SHAPE, 2)))
    with pytest.raises(InputError, match="3-D label map"):
        read_label(Subject("c", subject.images, label=four), SCHEME)


# ---------------------------------------------------------------- defective files


def test_a_truncated_stream_is_found_wherever_it_was_cut(subject, tmp_path):
    whole = subject.images["T2"].read_bytes()
    for length in (1, 2, 20, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        cut = tmp_path / "cut.nii.gz"
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.nii\.gz"):
            read_subject(replace(subject, T2=cut))


def test_a_flipped_bit_in_the_stream_is_found_by_its_checksum(subject, tmp_path):
    # Stored, not deflated: without the checksum the flip would pass as an intensity.
    raw = gzip.decompress(subject.images["T2"].read_bytes())
    stream = bytearray(gzip.compress(raw, 0))
    stream[-40] ^= 1
    (tmp_path / "flip.nii.gz").write_bytes(stream)
    with pytest.raises(InputError, match=r"complete gzip stream.*CRC"):
        read_subject(replace(subject, T2=tmp_path / "flip.nii.gz"))


def test_a_stream_that_ends_well_but_early_is_truncated_too(subject, tmp_path):
    raw = gzip.decompress(subject.images["T2"].read_bytes())
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(raw[:-1]))
    (tmp_path / "short.nii").write_bytes(raw[:-1])
    for name in ("short.nii.gz", "short.nii"):
        with pytest.raises(InputError, match="truncated"):
            read_subject(replace(subject, T2=tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.nii.gz", b"", "empty file"),
        ("a.nii", b"", "empty file"),
        ("a.nii.gz", b"\x5c\x01" + bytes(400), "not gzip data"),
        ("a.nii", gzip.compress(bytes(400)), "found gzip data"),
        ("a.nii.gz", gzip.compress(b"hello"), "expected a NIfTI header"),
        ("a.nii.gz", gzip.compress(bytes(1000)), "expected a NIfTI header"),
        ("a.nii", b"x" * 1000, "expected a NIfTI header"),
        ("a.mgz", b"x" * 1000, r"ending in \.nii or \.nii\.gz"),
    ],
)
def test_what_is_no_nifti_file_says_so(subject, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_subject(replace(subject, FLAIR=tmp_path / name))


def test_absent_files_folders_and_header_pairs_are_input_errors(subject, tmp_path):
    with pytest.raises(InputError, match="found nothing; check the path"):
        read_subject(replace(subject, T1=tmp_path / "absent.nii.gz"))
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(InputError, match="could not be read"):
        read_subject(replace(subject, T1=tmp_path / "folder.nii"))
    nib.save(nib.Nifti1Pair(noise(), LPS), tmp_path / "pair.hdr")
    (tmp_path / "pair.hdr").rename(tmp_path / "pair.nii")
    with pytest.raises(InputError, match=r"header of a \.hdr/\.img pair"):
        read_subject(replace(subject, T1=tmp_path / "pair.nii"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(subject, tmp_path, bad):
    array = noise(dtype=np.float32)
    array[0, 0, :2] = bad
    path = save(tmp_path / "bad.nii.gz", array)
    with pytest.raises(InputError, match=r"bad\.nii\.gz: expected finite T1 values.* in 2 voxels"):
        read_subject(replace(subject, T1=path))


def test_values_beyond_float32_are_refused_without_a_warning(subject, tmp_path):
    path = save(tmp_path / "huge.nii.gz", noise().astype(np.float64) * 1e300)
    with pytest.raises(InputError, match="NaN or Inf"):
        read_subject(replace(subject, T1=path))


def test_absurd_scaling_is_refused_without_a_warning(subject, tmp_path):
    raw = bytearray(nib.Nifti1Image(noise(), LPS).to_bytes())
    raw[112:116] = np.float32(3e38).tobytes()  # scl_slope
    (tmp_path / "slope.nii").write_bytes(raw)
    with pytest.raises(InputError, match="NaN or Inf"):
        read_subject(replace(subject, T2=tmp_path / "slope.nii"))


@pytest.mark.parametrize("value", [0, 7])
def test_an_image_of_one_value_is_refused(subject, tmp_path, value):
    path = save(tmp_path / "flat.nii.gz", np.full(SHAPE, value, np.int16))
    with pytest.raises(InputError, match=f"expected a FLAIR image, found {value} in every voxel"):
        read_subject(replace(subject, FLAIR=path))


def test_wrong_dimensions_and_types_are_refused(subject, tmp_path):
    four = save(tmp_path / "four.nii.gz", noise((*SHAPE, 2)))
    with pytest.raises(InputError, match=r"3-D volume for T1, found 4-D shape \(5, 6, 7, 2\)"):
        read_subject(replace(subject, T1=four))
    with pytest.raises(InputError, match=r"expected a 3-D volume, found shape \(5, 6\)"):
        read_subject(replace(subject, T1=save(tmp_path / "two.nii.gz", noise((5, 6)))))
    with pytest.raises(InputError, match="complex or colour"):
        read_subject(replace(subject, T1=save(tmp_path / "z.nii.gz", noise().astype(np.complex64))))
    with pytest.raises(InputError, match="expected a 4-D file holding"):
        read_subject(Subject("c", dict.fromkeys(SEQUENCES, four.with_name("c_T1.nii.gz")), dict.fromkeys(SEQUENCES, 0)))


def test_missing_sequences_and_one_file_for_two_are_refused(subject):
    with pytest.raises(InputError, match="missing FLAIR"):
        read_subject(Subject("c", {n: p for n, p in subject.images.items() if n != "FLAIR"}))
    with pytest.raises(InputError, match="one file given for several sequences"):
        read_subject(replace(subject, T1=subject.images["T1c"]))


@given(position=st.integers(0, 347), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
@example(position=43, value=255)  # a negative first dimension
@example(position=111, value=127)  # an infinite data offset
@example(position=47, value=127)
@example(position=123, value=4)  # an unknown unit
def test_a_damaged_header_never_escapes_as_a_foreign_error(tmp_path_factory, position, value):
    folder = tmp_path_factory.mktemp("fuzz")
    img = nib.Nifti1Image(noise(), LPS)
    raw = bytearray(img.to_bytes())
    raw[position] = value
    images = {}
    for name in SEQUENCES:
        images[name] = folder / f"{name}.nii"
        images[name].write_bytes(raw)
    try:
        volume = read_subject(Subject("c", images, label=images["T1"]))
    except FediodError:
        return
    assert np.isfinite(volume.array).all()


# ---------------------------------------------------------------- geometry of what is read


def test_a_header_without_geometry_is_refused(subject, tmp_path):
    path = save(tmp_path / "none.nii.gz", noise(), sform=0, qform=0)
    with pytest.raises(GeometryError, match="sform code 0 and qform code 0"):
        read_subject(replace(subject, T2=path))
    with pytest.raises(GeometryError, match="no geometry"):
        read_label(
            Subject("c", subject.images, label=save(tmp_path / "l.nii.gz", noise_labels(), sform=0, qform=0)), SCHEME
        )


def test_a_sheared_grid_is_refused_and_a_rounded_one_is_not(subject, tmp_path):
    sheared = LPS.copy()
    sheared[0, 1] = 0.2
    with pytest.raises(GeometryError, match=r"sheared grid \(cosine 0\.19"):
        read_subject(replace(subject, T2=save(tmp_path / "s.nii.gz", noise(), sheared, qform=0)))
    rounded = LPS.copy()
    rounded[0, 1] = 1e-5
    read_subject(replace(subject, T2=save(tmp_path / "r.nii.gz", noise(), rounded, qform=0)))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_singular_or_infinite_affine_is_refused(subject, tmp_path, bad):
    img = nib.Nifti1Image(noise(), LPS)
    for row in ("srow_x", "srow_y", "srow_z"):
        img.header[row][0] = bad
    (tmp_path / "bad.nii").write_bytes(nib.Nifti1Image(noise(), None, img.header).to_bytes())
    with pytest.raises(GeometryError, match=r"bad\.nii"):
        read_subject(replace(subject, T2=tmp_path / "bad.nii"))


@pytest.mark.parametrize(("unit", "name"), [("micron", "micron"), ("meter", "metre")])
def test_other_units_than_millimetres_are_refused(subject, tmp_path, unit, name):
    img = load(subject.images["T2"])
    img.header.set_xyzt_units(unit)
    nib.save(img, tmp_path / "u.nii.gz")
    with pytest.raises(GeometryError, match=f"the unit {name}"):
        read_subject(replace(subject, T2=tmp_path / "u.nii.gz"))


def contradicting(path: Path, array: np.ndarray) -> Path:
    img = nib.Nifti1Image(array, LPS)
    img.header.set_sform(LPS, code=1)
    shifted = LPS.copy()
    shifted[2, 3] += 12.5
    img.header.set_qform(shifted, code=1)
    nib.save(img, path)
    return path


def test_contradicting_sform_and_qform_warn_once_and_follow_nibabel(subject, tmp_path, caplog):
    path = contradicting(tmp_path / "two.nii.gz", noise())
    with caplog.at_level(logging.WARNING):
        volume = read_subject(replace(subject, T1c=path))
    assert np.array_equal(volume.affine, load(path).affine)
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: sform (code 1) and qform (code 1) differ by up to 12.50 mm; the sform is used"
    ]


def test_qform_alone_is_used(subject, tmp_path):
    path = save(tmp_path / "q.nii.gz", noise(), sform=0, qform=1)
    assert np.allclose(read_subject(replace(subject, T1c=path)).affine, LPS)


def test_a_broken_qform_matters_only_without_sform(subject, tmp_path, caplog):
    for sform, name in ((1, "with.nii.gz"), (0, "without.nii.gz")):
        img = load(save(tmp_path / name, noise(), sform=sform))
        header = img.header.copy()
        header["quatern_b"] = header["quatern_c"] = 5
        raw = nib.Nifti1Image(noise(), None, header).to_bytes()
        (tmp_path / name).write_bytes(gzip.compress(raw))
    with pytest.raises(GeometryError, match="rotation in the qform"):
        read_subject(replace(subject, T2=tmp_path / "without.nii.gz"))
    read_subject(replace(subject, T2=tmp_path / "with.nii.gz"))
    assert "the sform is used" in caplog.text


def test_sequences_on_other_grids_name_both_files_and_the_distance(subject, tmp_path):
    shifted = LPS.copy()
    shifted[0, 3] += 7.3
    path = save(tmp_path / "shifted.nii.gz", noise(), shifted)
    with pytest.raises(GeometryError, match=r"shifted\.nii\.gz.*c_T1c\.nii\.gz.*7\.30 mm"):
        read_subject(replace(subject, T2=path))
    longer = save(tmp_path / "longer.nii.gz", noise((5, 6, 8)))
    with pytest.raises(GeometryError, match=r"expected shape \(5, 6, 7\).*found \(5, 6, 8\)"):
        read_subject(replace(subject, T2=longer))
    flipped = LPS.copy()
    flipped[:3, 0] *= -1
    with pytest.raises(GeometryError, match="mm apart"):
        read_subject(replace(subject, T2=save(tmp_path / "flipped.nii.gz", noise(), flipped)))
    nearly = LPS.copy()
    nearly[0, 3] += 1e-3
    read_subject(replace(subject, T2=save(tmp_path / "nearly.nii.gz", noise(), nearly)))


def test_a_label_map_on_another_grid_is_refused(subject, tmp_path):
    shifted = LPS.copy()
    shifted[1, 3] += 2
    path = save(tmp_path / "seg.nii.gz", noise_labels(), shifted)
    with pytest.raises(GeometryError, match=r"2\.00 mm"):
        read_label(Subject("c", subject.images, label=path), SCHEME)


def test_corner_distance_of_a_shift_a_scaling_and_a_turn():
    shift = np.eye(4)
    shift[:3, 3] = (3, 4, 0)
    assert corner_distance((9, 9, 9), np.eye(4), shift) == pytest.approx(5)
    assert corner_distance((11, 1, 1), np.eye(4), np.diag([1.1, 1, 1, 1])) == pytest.approx(1)
    assert corner_distance((1, 1, 1), np.eye(4), np.diag([-1.0, -1, 1, 1])) == 0
    assert corner_distance((4, 5, 1), np.eye(4), np.diag([-1.0, -1, 1, 1])) == pytest.approx(10)


# ---------------------------------------------------------------- writing

AXES = [a + b + c for a, b, c in [("L", "A", "S"), ("R", "A", "S"), ("L", "P", "S"), ("P", "I", "R"), ("S", "R", "A")]]
angles = st.tuples(*[st.floats(-180, 180) for _ in range(3)])
spacings = st.tuples(*[st.floats(0.2, 7) for _ in range(3)])
offsets = st.tuples(*[st.floats(-300, 300) for _ in range(3)])
shapes = st.tuples(*[st.integers(1, 6) for _ in range(3)])


def oriented(axes: str, shape) -> np.ndarray:
    """Affine that gives a grid of `shape` (in its own axes) the orientation `axes`."""
    return inv_ornt_aff(axcodes2ornt(tuple(axes)), apply_orientation(np.empty(shape), axcodes2ornt(tuple(axes))).shape)


@given(
    axes=st.sampled_from(AXES),
    turn=angles,
    spacing=spacings,
    offset=offsets,
    shape=shapes,
    codes=st.sampled_from([(1, 1), (2, 0), (0, 1), (4, 3), (1, 2), (0, 0)]),
    dtype=st.sampled_from([np.int16, np.float32, np.uint8]),
    image=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    ending=st.sampled_from([".nii", ".nii.gz"]),
    scheme=st.sampled_from(sorted(SCHEMES)),
)
@settings(max_examples=150, deadline=None)
def test_any_geometry_survives_writing_bit_by_bit(
    tmp_path_factory, axes, turn, spacing, offset, shape, codes, dtype, image, ending, scheme
):
    folder = tmp_path_factory.mktemp("geometry")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ oriented(axes, shape)[:3, :3]
    affine[:3, :3] *= spacing
    affine[:3, 3] = offset
    reference = save(
        folder / f"image{ending}", noise(shape, dtype=dtype), affine, sform=codes[0], qform=codes[1], image=image
    )
    meant = classes(shape)
    write_segmentation(folder / f"seg{ending}", meant, reference=reference, scheme=SCHEMES[scheme])

    source, written = load(reference), load(folder / f"seg{ending}")
    assert type(written) is type(source)
    assert np.array_equal(written.affine, source.affine)
    assert written.shape == shape
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), from_classes(meant, SCHEMES[scheme]))
    assert written.header.get_zooms() == source.header.get_zooms()
    assert written.header.get_xyzt_units() == source.header.get_xyzt_units()
    assert nib.aff2axcodes(written.affine) == nib.aff2axcodes(source.affine)
    for field in (
        *("sform_code", "srow_x", "srow_y", "srow_z", "qform_code", "quatern_b", "quatern_c", "quatern_d"),
        *("qoffset_x", "qoffset_y", "qoffset_z", "pixdim"),
    ):
        a, b = written.header[field], source.header[field]
        assert np.array_equal(a[:4], b[:4]) if field == "pixdim" else np.array_equal(a, b), field
    if any(codes):
        subject = Subject("c", {"T1c": reference}, label=folder / f"seg{ending}")
        assert np.array_equal(read_label(subject, SCHEMES[scheme]), meant)


def with_quaternion(path: Path, vector: np.ndarray, seed: int) -> Path:
    """A NIfTI-2 file whose only geometry is a qform with this vector part."""
    save(path, noise(seed=seed), LPS, sform=0, qform=1, image=nib.Nifti2Image)
    raw = bytearray(path.read_bytes())
    at = nib.Nifti2Header().template_dtype.fields["quatern_b"][1]
    raw[at : at + 24] = vector.tobytes()
    path.write_bytes(raw)
    return path


def test_a_half_turn_may_be_off_by_rounding(tmp_path):
    turned = np.array([0.6, 0.8, 0.0]) * (1 + 1e-15)
    images = {name: with_quaternion(tmp_path / f"{name}.nii", turned, i) for i, name in enumerate(SEQUENCES)}
    with pytest.raises(ValueError, match="w2"):
        load(images["T1c"]).header.get_qform()
    found = read_subject(Subject("c", images)).affine[:3, :3]
    half_turn = 2 * np.outer([0.6, 0.8, 0], [0.6, 0.8, 0]) - np.eye(3)
    assert np.allclose(np.abs(found / np.linalg.norm(found, axis=0)), np.abs(half_turn), atol=1e-12)
    out = tmp_path / "seg.nii"
    write_segmentation(out, classes(), reference=images["T1c"], scheme=SCHEMES["brats2018"])
    assert np.array_equal(read_label(Subject("c", images, label=out), SCHEMES["brats2018"]), classes())
    with_quaternion(images["T1c"], turned * 1.01, 0)
    with pytest.raises(GeometryError, match="rotation"):
        read_subject(Subject("c", images))


@given(turn=angles, spacing=spacings, offset=offsets, shape=shapes, mirrored=st.booleans(), stacked=st.booleans())
@settings(max_examples=80, deadline=None)
def test_volumes_written_from_any_affine_are_read_back(
    tmp_path_factory, turn, spacing, offset, shape, mirrored, stacked
):
    path = tmp_path_factory.mktemp("volumes") / "v.nii.gz"
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() * spacing
    affine[:3, 0] *= -1 if mirrored else 1
    affine[:3, 3] = offset
    array = np.random.default_rng(0).normal(size=(4, *shape) if stacked else shape).astype(np.float32)
    write_volumes(path, array, affine)
    image = load(path)
    found = np.asarray(image.dataobj)
    assert found.dtype == np.float32
    assert np.array_equal(np.moveaxis(found, -1, 0) if stacked else found, array)
    assert corner_distance(shape, image.affine, affine) < 1e-3
    qform, code = image.get_qform(coded=True)
    assert code == 0 or corner_distance(shape, qform, affine) < 0.05
    if stacked and array[0].size > 1:
        subject = Subject("s", dict.fromkeys(SEQUENCES, path), {name: i for i, name in enumerate(SEQUENCES)})
        volume = read_subject(subject)
        assert np.array_equal(volume.array, array)
        assert np.array_equal(volume.affine, image.affine)


def test_a_marker_keeps_its_place_in_the_world(tmp_path):
    """A voxel marked left-posterior-superior of the centre is found there again by an independent reader."""
    sitk = pytest.importorskip("SimpleITK")
    affine = oriented("PIR", SHAPE)
    affine[:3, 3] = (4, 5, 6)
    reference = save(tmp_path / "image.nii.gz", noise(), affine)
    marked = np.zeros(SHAPE, np.uint8)
    marked[1, 2, 3] = 3
    write_segmentation(tmp_path / "seg.nii.gz", marked, reference=reference, scheme=SCHEME)
    image = sitk.ReadImage(str(tmp_path / "seg.nii.gz"))
    z, y, x = (int(i[0]) for i in np.nonzero(sitk.GetArrayFromImage(image)))
    lps = np.array(image.TransformIndexToPhysicalPoint((x, y, z)))
    assert np.allclose(lps * (-1, -1, 1), (affine @ (1, 2, 3, 1))[:3])
    original = sitk.ReadImage(str(reference))
    assert image.GetDirection() == original.GetDirection()
    assert image.GetOrigin() == original.GetOrigin()
    assert image.GetSpacing() == original.GetSpacing()


def test_nothing_of_the_patient_is_copied(tmp_path):
    img = nib.Nifti1Image(noise(), LPS)
    header = img.header
    header["descrip"] = b"DOE^JANE 1950-01-01"
    header["aux_file"] = b"DOE^JANE"
    header["intent_name"] = b"DOE^JANE"
    header["db_name"] = b"DOE^JANE"
    header.set_slope_inter(2.5, 3)
    header["cal_max"] = 99
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    nib.save(img, tmp_path / "image.nii.gz")
    assert b"DOE" in gzip.decompress((tmp_path / "image.nii.gz").read_bytes())
    write_segmentation(tmp_path / "seg.nii.gz", classes(), reference=tmp_path / "image.nii.gz", scheme=SCHEME)
    raw = (tmp_path / "seg.nii.gz").read_bytes()
    assert b"DOE" not in raw + gzip.decompress(raw)
    written = load(tmp_path / "seg.nii.gz")
    assert b"Not for clinical use" in bytes(written.header["descrip"])
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    assert not written.header.extensions
    assert np.array_equal(np.asarray(written.dataobj), from_classes(classes(), SCHEME))


def test_contradicting_forms_of_the_reference_are_both_kept(tmp_path):
    reference = contradicting(tmp_path / "image.nii.gz", noise())
    write_segmentation(tmp_path / "seg.nii.gz", classes(), reference=reference, scheme=SCHEME)
    source, written = load(reference), load(tmp_path / "seg.nii.gz")
    assert np.array_equal(written.get_sform(), source.get_sform())
    assert np.array_equal(written.get_qform(), source.get_qform())


def test_writing_is_repeatable_byte_by_byte(subject, tmp_path):
    contents = []
    for name in ("a.nii.gz", "b.nii.gz"):
        write_segmentation(tmp_path / name, classes(), reference=subject.images["T1"], scheme=SCHEME)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert contents[0][4:8] == bytes(4)  # no time stamp in the gzip header


def test_written_files_have_ordinary_rights_and_parents_are_made(subject, tmp_path):
    out = tmp_path / "new" / "folder" / "seg.nii.gz"
    write_segmentation(out, classes(), reference=subject.images["T1"], scheme=SCHEME)
    (tmp_path / "ordinary").touch()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert [p.name for p in out.parent.iterdir()] == ["seg.nii.gz"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(subject, tmp_path, monkeypatch):
    out = tmp_path / "out" / "seg.nii.gz"
    write_segmentation(out, classes(seed=1), reference=subject.images["T1"], scheme=SCHEME)
    before = out.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"seg\.nii\.gz: could not be written .*No space left"):
        write_segmentation(out, classes(seed=2), reference=subject.images["T1"], scheme=SCHEME)
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["seg.nii.gz"]


@pytest.mark.parametrize(("offset", "error"), [(352, InputError), (280, GeometryError), (80, GeometryError)])
def test_a_file_that_reads_back_differently_is_never_given_its_name(subject, tmp_path, monkeypatch, offset, error):
    """A disk that corrupts a voxel, the sform or the voxel size between write and read is noticed."""
    out = tmp_path / "out" / "seg.nii"
    sync = os.fsync

    def corrupt(descriptor):
        sync(descriptor)
        (temporary,) = out.parent.iterdir()
        with temporary.open("r+b") as stream:
            stream.seek(offset)
            byte = stream.read(1)[0]
            stream.seek(offset)
            stream.write(bytes([byte ^ 1]))

    monkeypatch.setattr(os, "fsync", corrupt)
    with pytest.raises(error, match="the file was not kept"):
        write_segmentation(out, classes(), reference=subject.images["T1"], scheme=SCHEME)
    assert list(out.parent.iterdir()) == []


def test_the_reference_is_never_overwritten(subject, tmp_path):
    reference = subject.images["T1"]
    before = reference.read_bytes()
    (tmp_path / "link.nii.gz").symlink_to(reference)
    for path in (reference, tmp_path / "link.nii.gz"):
        with pytest.raises(InputError, match="other than the reference"):
            write_segmentation(path, classes(), reference=reference, scheme=SCHEME)
    assert reference.read_bytes() == before


@pytest.mark.parametrize(
    ("array", "name", "error", "message"),
    [
        (classes((5, 6, 8)), "o.nii.gz", GeometryError, r"expected shape \(5, 6, 7\)"),
        (classes()[None], "o.nii.gz", GeometryError, r"expected shape \(5, 6, 7\)"),
        (classes() + np.uint8(1), "o.nii.gz", LabelError, "expected classes 0 to 3"),
        (classes().astype(np.int16) - 1, "o.nii.gz", LabelError, "expected classes 0 to 3"),
        (classes().astype(np.float32), "o.nii.gz", LabelError, "as integers, found float32"),
        (classes(), "o.png", InputError, r"ending in \.nii"),
    ],
)
def test_what_is_no_class_map_of_the_reference_is_not_written(subject, tmp_path, array, name, error, message):
    with pytest.raises(error, match=message):
        write_segmentation(tmp_path / "out" / name, array, reference=subject.images["T1"], scheme=SCHEME)
    assert not (tmp_path / "out" / name).exists()


def test_an_unwritable_place_is_an_input_error(subject, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not be written"):
        write_segmentation(tmp_path / "file" / "o.nii", classes(), reference=subject.images["T1"], scheme=SCHEME)
    (tmp_path / "o.nii").mkdir()
    with pytest.raises(InputError, match="could not be written"):
        write_segmentation(tmp_path / "o.nii", classes(), reference=subject.images["T1"], scheme=SCHEME)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_volumes_that_cannot_be_read_again_are_not_written(tmp_path):
    good = np.ones((3, 3, 3), np.float32)
    path = tmp_path / "v.nii.gz"
    with pytest.raises(InputError, match="NaN or Inf"):
        write_volumes(path, np.full((3, 3, 3), np.nan), np.eye(4))
    with pytest.raises(InputError, match=r"found shape \(3, 3\)"):
        write_volumes(path, good[0], np.eye(4))
    sheared = np.eye(4)
    sheared[0, 1] = 0.5
    for affine in (sheared, np.zeros((4, 4)), np.eye(3)):
        with pytest.raises(GeometryError):
            write_volumes(path, good, affine)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- real files


def assert_round_trip(subject: Subject, folder: Path, scheme: str) -> None:
    """Write the expert's own labels again: values and geometry must be those of image and label map."""
    volume = read_subject(subject)
    found = read_label(subject, SCHEMES[scheme])
    out = folder / "out_seg.nii.gz"
    write_segmentation(out, found, reference=volume.path, scheme=SCHEMES[scheme])
    written, label, image = load(out), load(subject.label), load(volume.path)
    assert np.array_equal(np.asarray(written.dataobj), np.asarray(label.dataobj))
    assert np.array_equal(written.affine, image.affine)
    assert written.header["sform_code"] == image.header["sform_code"]
    assert written.header["qform_code"] == image.header["qform_code"]
    assert np.array_equal(volume.array[1], image_of(subject, "T1"))


def image_of(subject: Subject, name: str) -> np.ndarray:
    return load(subject.images[name]).get_fdata(dtype=np.float32)


def test_real_brats18_case_round_trip(tmp_path):
    subjects = find_subjects(need("brats18"), "brats2018", require_label=True, pattern="Brats18_2013_3")
    assert read_subject(subjects[0]).array.shape == (4, 240, 240, 155)
    assert_round_trip(subjects[0], tmp_path, "brats2018")


def test_real_brats23_case_with_float_labels_round_trip(tmp_path):
    (subject,) = find_subjects(need("brats23"), "brats2023", require_label=True)
    assert load(subject.label).get_data_dtype() == np.float32
    assert_round_trip(subject, tmp_path, "brats2023")
    with pytest.raises(LabelError, match="found 3"):
        read_label(subject, SCHEMES["brats2018"])


def test_real_2mm_cases_are_all_readable(caplog):
    for subject in find_subjects(need("brats18_2mm"), "brats2018", require_label=True):
        volume = read_subject(subject)
        assert volume.array.shape == (4, 120, 120, 78)
        assert set(np.unique(read_label(subject, SCHEME))) == {0, 1, 2, 3}
    assert not caplog.records


def test_real_wide_scanner_scaling_is_kept():
    subject = find_subject(need("brats18_2mm") / "LGG" / "Brats18_TCIA10_637_1")
    found = read_subject(subject).array
    assert found.max() > 30000
    for i, name in enumerate(SEQUENCES):
        assert np.array_equal(found[i], image_of(subject, name))


def test_real_las_scan_by_explicit_paths(tmp_path):
    folder = need("ms_lesion")
    ending = "_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz"
    prefix = {"T1c": "T1POST", "T1": "T1", "T2": "T2", "FLAIR": "FLAIR"}
    volume = read_subject(Subject("ms", {name: folder / f"{prefix[name]}{ending}" for name in SEQUENCES}))
    assert nib.aff2axcodes(volume.affine) == ("L", "A", "S")
    write_segmentation(tmp_path / "seg.nii.gz", classes(volume.array.shape[1:]), reference=volume.path, scheme=SCHEME)
    written, image = load(tmp_path / "seg.nii.gz"), load(volume.path)
    assert np.array_equal(written.affine, image.affine)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 1)
