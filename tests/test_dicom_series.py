"""DICOM series: where every voxel lies, and what is wrong with a stack of slices."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the dicom extra is not installed")
pytest.importorskip("highdicom", reason="the dicom extra is not installed")

from dicom_writer import (  # type: ignore[import-not-found]
    PROTOCOLS,
    VIEWS,
    affine_of,
    edit,
    rotation,
    write_series,
    write_study,
)

from fediod_med.dicom.headers import holds_dicom, is_dicom, without_identity
from fediod_med.dicom.planes import view_of
from fediod_med.dicom.series import DicomSeries, find_series
from fediod_med.dicom.study import describe, read_study
from fediod_med.dicom.volume import affine_of as affine_of_series
from fediod_med.dicom.volume import geometry, read_series, read_volume
from fediod_med.errors import GeometryError, InputError
from fediod_med.findings import Finding

SHAPE = (7, 6, 5)
STRAIGHT = affine_of((0.9, 1.1, 2.0), (-20.0, 10.0, 4.0))
OBLIQUE = affine_of((0.9, 1.1, 2.0), (-20.0, 10.0, 4.0), rotation(12.0, -7.0, 20.0))


@pytest.fixture
def array(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 4000, SHAPE).astype(np.float64)


def only(folder: Path) -> DicomSeries:
    (series,), _ = find_series(folder, case="c")
    return series


def codes(findings: tuple[Finding, ...]) -> list[str]:
    return [found.code for found in findings]


def assert_same_image(array: np.ndarray, affine: np.ndarray, found: np.ndarray, found_affine: np.ndarray) -> None:
    """Every voxel of one image has the value of the voxel of the other at the same place in the patient."""
    assert sorted(array.shape) == sorted(found.shape)
    index = np.indices(found.shape).reshape(3, -1)
    mapped = np.linalg.inv(affine) @ found_affine @ np.vstack([index, np.ones(index.shape[1])])
    nearest = np.rint(mapped[:3]).astype(int)
    assert np.abs(mapped[:3] - nearest).max() < 1e-3
    assert np.array_equal(array[tuple(nearest)], found.reshape(-1))


@pytest.mark.parametrize("multiframe", [False, True], ids=["classic", "multi-frame"])
@pytest.mark.parametrize("flip", [(), (1,), (0, 2)], ids=["as is", "rows negated", "columns and slices negated"])
@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_voxel_keeps_its_place(view, affine, flip, multiframe, array, tmp_path) -> None:
    write_series(tmp_path, array, affine, view=view, flip=flip, multiframe=multiframe)
    series = only(tmp_path)
    assert series.findings == ()
    scan = read_series(series)
    assert scan.array.dtype == np.float32
    assert_same_image(array, affine, scan.array, scan.affine)
    assert view_of(series.planes[0]).startswith(view)


@pytest.mark.parametrize("view", VIEWS)
def test_highdicom_and_itk_read_the_same(view, array, tmp_path) -> None:
    import highdicom
    import pydicom

    paths = write_series(tmp_path, array, OBLIQUE, view=view)
    series = only(tmp_path)
    scan = read_series(series)
    volume = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in paths])
    assert geometry(series).geometry_equal(volume.get_geometry(), tol=1e-6)
    assert np.array_equal(volume.array.T, scan.array)
    assert_itk_agrees(tmp_path, scan.array, scan.affine)


def assert_itk_agrees(folder: Path, array: np.ndarray, affine: np.ndarray) -> None:
    with warnings.catch_warnings():
        # itk's wrappers warn while C code loads them: as an error that ends the interpreter.
        warnings.simplefilter("ignore")
        itk = pytest.importorskip("itk", reason="itk, the independent reader of the geometry, is not installed")
        names = itk.GDCMSeriesFileNames.New()
        names.SetDirectory(str(folder))
        image = itk.imread(names.GetFileNames(names.GetSeriesUIDs()[0]), itk.F)
        matrix = np.eye(4)
        matrix[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.asarray(image.GetSpacing())
        matrix[:3, 3] = image.GetOrigin()
        found = itk.array_from_image(image).T
    assert_same_image(array, affine, found, np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix)


def test_the_real_series_lies_where_itk_says(shared_data) -> None:
    series = only(shared_data / "dicom_t1")
    scan = read_series(series)
    assert scan.array.shape == (256, 256, 64)
    assert np.linalg.norm(scan.affine[:3, :3], axis=0) == pytest.approx([0.859375, 0.859375, 0.9], abs=1e-6)
    # The folder holds the second part of a longer series: its numbers start at 65.
    assert codes(series.findings) == ["W138"] and series.findings[0].value == 64
    assert view_of(series.planes[0]) == "sagittal, 3 degrees oblique"
    assert_itk_agrees(series.folder, scan.array, scan.affine)


@pytest.mark.parametrize("multiframe", [False, True])
def test_rescaling_is_applied(multiframe, array, tmp_path) -> None:
    write_series(tmp_path, array, STRAIGHT, slope=2.5, multiframe=multiframe)
    scan = read_series(only(tmp_path))
    assert np.array_equal(np.sort(scan.array, axis=None), np.sort(array * 2.5 - 5, axis=None).astype(np.float32))


def test_inverted_grey_values_are_turned_back(array, tmp_path) -> None:
    for path in write_series(tmp_path, array, STRAIGHT):
        edit(path, PhotometricInterpretation="MONOCHROME1")
    scan = read_series(only(tmp_path))
    assert_same_image(65535 - array, STRAIGHT, scan.array, scan.affine)


# ---------------------------------------------------------------- what is wrong with a stack


@pytest.mark.parametrize(("missing", "slices"), [([2], 1), ([2, 3], 2), ([1, 3], 2)])
def test_missing_slices_are_named_by_their_positions(missing, slices, tmp_path, rng) -> None:
    paths = write_series(tmp_path, rng.integers(0, 99, (4, 4, 9)), STRAIGHT)
    for k in missing:
        paths[k].unlink()
    series = only(tmp_path)
    (found,) = [found for found in series.findings if found.code == "E130"]
    assert not series.usable and found.value == slices and found.severity == "error"
    # Slices lie at 4, 6, 8 ... mm; the positions beside the first gap are named.
    assert f"{4 + 2 * (missing[0] - 1):.2f} and" in found.message and "every 2.00 mm" in found.message
    with pytest.raises(GeometryError, match="slices missing"):
        geometry(series)


def test_uneven_spacing_is_an_error(array, tmp_path) -> None:
    paths = write_series(tmp_path, array, STRAIGHT)
    edit(paths[2], ImagePositionPatient=[20.0, -10.0, 8.3])
    assert codes(only(tmp_path).findings) == ["E130"]
    assert "uneven" in only(tmp_path).findings[0].message


def test_rounded_positions_are_no_gap(array, tmp_path) -> None:
    spaced = affine_of((1.0, 1.0, 0.9375), (0.0, 0.0, 0.0))
    for k, path in enumerate(write_series(tmp_path, array, spaced)):
        edit(path, ImagePositionPatient=[0.0, 0.0, round(0.9375 * k, 2)])
    assert only(tmp_path).findings == ()


def test_a_lost_end_shows_in_the_numbering(array, tmp_path) -> None:
    paths = write_series(tmp_path, array, STRAIGHT)
    paths[0].unlink()
    paths[1].unlink()
    (found,) = only(tmp_path).findings
    assert (found.code, found.value) == ("W138", 2)


def test_one_slice_is_no_stack(array, tmp_path) -> None:
    write_series(tmp_path, array[..., :1], STRAIGHT)
    assert "E130" in codes(only(tmp_path).findings)


def test_copies_are_dropped_and_said(array, tmp_path) -> None:
    paths = write_series(tmp_path, array, STRAIGHT)
    shutil.copy(paths[1], tmp_path / "copy.dcm")
    shutil.copy(paths[1], tmp_path / "again.dcm")
    edit(tmp_path / "again.dcm", SOPInstanceUID="1.2.3.4")  # sent twice by the scanner: other UID, same pixels
    series = only(tmp_path)
    assert codes(series.findings) == ["W137"] and series.findings[0].value == 2
    scan = read_series(series)
    assert_same_image(array, STRAIGHT, scan.array, scan.affine)


def test_one_uid_on_two_different_slices_is_refused_and_not_taken_for_a_copy(array, tmp_path) -> None:
    paths = write_series(tmp_path, array, STRAIGHT)
    blank = tmp_path / "000_first.dcm"  # read first, so that it would be the one that is kept
    shutil.copy(paths[1], blank)
    edit(blank, PixelData=bytes(array.shape[0] * array.shape[1] * 2))
    series = only(tmp_path)
    assert "E131" in codes(series.findings)
    assert not series.usable


def test_a_short_name_is_masked_too() -> None:
    import pydicom

    header = pydicom.Dataset()
    header.PatientName = "Li^Bo"
    assert without_identity("AX T2 Li flair, light", header) == "AX T2 *** flair, light"


def test_two_echoes_in_one_series_are_told_apart(array, tmp_path) -> None:
    header = {"SeriesInstanceUID": "1.2.3", "SeriesNumber": 1}
    write_series(tmp_path / "a", array, STRAIGHT, header={**header, "EchoTime": 20})
    write_series(tmp_path / "b", array + 1, STRAIGHT, header={**header, "EchoTime": 90})
    series = only(tmp_path)
    assert codes(series.findings) == ["E131"] and series.findings[0].value == SHAPE[2]
    assert "EchoTime 20.0, 90.0" in series.findings[0].message


@pytest.mark.parametrize(
    ("options", "affine", "shape"),
    [
        ({"view": "coronal"}, STRAIGHT, SHAPE),
        ({}, STRAIGHT, (7, 8, 5)),
        ({}, affine_of((0.9, 1.2, 2.0)), SHAPE),
    ],
    ids=["orientation", "size", "pixel spacing"],
)
def test_mixed_series_are_refused(options, affine, shape, array, tmp_path, rng) -> None:
    header = {"SeriesInstanceUID": "1.2.3", "SeriesNumber": 1}
    write_series(tmp_path / "a", array, STRAIGHT, header=header)
    write_series(tmp_path / "b", rng.integers(0, 9, shape), affine, header=header, **options)
    series = only(tmp_path)
    assert codes(series.findings) == ["E131"] and series.findings[0].value == 2
    assert not series.usable


@pytest.mark.parametrize("multiframe", [False, True])
def test_no_geometry(multiframe, array, tmp_path) -> None:
    paths = write_series(tmp_path, array, STRAIGHT, multiframe=multiframe)
    if multiframe:
        edit(paths[0], SharedFunctionalGroupsSequence=[])
    else:
        edit(paths[1], ImageOrientationPatient=None)
    (found,) = only(tmp_path).findings
    assert (found.code, found.value) == ("E132", SHAPE[2] if multiframe else 1)


def test_a_sheared_stack_is_refused(array, tmp_path) -> None:
    for k, path in enumerate(write_series(tmp_path, array, STRAIGHT)):
        edit(path, ImagePositionPatient=[20.0, -10.0 + 0.2 * k, 4.0 + 2 * k])
    (found,) = only(tmp_path).findings
    assert found.code == "E122" and found.value == pytest.approx(0.2 / np.hypot(0.2, 2.0), abs=1e-3)


def test_several_multiframe_objects_in_one_series(array, tmp_path) -> None:
    for name in "ab":
        header = {"SeriesInstanceUID": "1.2.3"}
        write_series(tmp_path / name, array, STRAIGHT, multiframe=True, header=header)
    assert codes(only(tmp_path).findings) == ["E131"]


# ---------------------------------------------------------------- files


def test_what_is_not_an_image_is_passed_over(array, tmp_path) -> None:
    paths = write_series(tmp_path, array, STRAIGHT)
    (tmp_path / "notes.txt").write_text("no DICOM")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(paths[0], tmp_path / ".hidden" / "x.dcm")
    for name, values in {
        "sr": {"Modality": "SR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"},
        "shot": {"SamplesPerPixel": 3, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT"},
    }.items():
        shutil.copy(paths[0], tmp_path / f"{name}.dcm")
        edit(tmp_path / f"{name}.dcm", SeriesInstanceUID=f"1.2.{len(name)}", **values)
    series, findings = find_series(tmp_path, case="c")
    assert [len(one.planes) for one in series] == [SHAPE[2]]
    assert codes(findings) == ["N139"] and findings[0].value == 2
    assert "Basic Text SR" in findings[0].message and "(colour)" in findings[0].message


@pytest.mark.parametrize("content", [b"", b"no DICOM at all", b"\0" * 128 + b"DICM" + b"\x02\x00\x00\x00UL"])
def test_a_damaged_file_is_an_error_not_a_crash(content, array, tmp_path) -> None:
    write_series(tmp_path, array, STRAIGHT)[2].write_bytes(content)
    _, findings = find_series(tmp_path, case="c")
    assert codes(findings) == ["E101"]


def test_files_without_preamble_are_read(array, tmp_path) -> None:
    for path in write_series(tmp_path, array, STRAIGHT):
        path.write_bytes(path.read_bytes()[132:])
    assert holds_dicom(tmp_path)
    scan = read_series(only(tmp_path))
    assert_same_image(array, STRAIGHT, scan.array, scan.affine)


def test_a_folder_without_dicom(tmp_path) -> None:
    (tmp_path / "t1.nii").write_bytes(b"\x5c\x01\0\0")
    assert not holds_dicom(tmp_path) and not is_dicom(tmp_path / "absent")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError) as caught:
            find_series(path, case="c")
        assert caught.value.code == "E105"


# ---------------------------------------------------------------- studies as volumes


@pytest.fixture
def images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.integers(1, 4000, SHAPE) for name in PROTOCOLS}


@pytest.mark.parametrize("multiframe", [False, True])
def test_a_study_becomes_a_volume(multiframe, images, tmp_path) -> None:
    study = read_study(write_study(tmp_path, images, OBLIQUE, multiframe=multiframe), case="c")
    assert study.findings == () and study.usable and study.others == ()
    decoded = read_volume(study)
    assert decoded.findings == () and decoded.volume is not None
    for i, name in enumerate(PROTOCOLS):
        assert_same_image(images[name], OBLIQUE, decoded.volume.array[i], decoded.volume.affine)
    assert np.allclose(affine_of_series(study.series["T2"]), decoded.volume.affine)


def test_other_grids_are_left_to_coregistration(images, tmp_path) -> None:
    write_study(tmp_path, images, STRAIGHT)
    shutil.rmtree(tmp_path / "SE03")
    shutil.rmtree(tmp_path / "SE04")
    write_series(tmp_path / "3", images["T2"][:, :, :4], STRAIGHT, header=PROTOCOLS["T2"], number=3)
    moved = STRAIGHT.copy()
    moved[:3, 3] += [0.0, 3.0, 4.0]
    write_series(tmp_path / "4", images["FLAIR"], moved, header=PROTOCOLS["FLAIR"], number=4)
    decoded = read_volume(read_study(tmp_path))
    assert codes(decoded.findings) == ["E150", "E150"] and decoded.volume is None
    assert decoded.findings[1].value == pytest.approx(5.0)
    assert decoded.scans["T2"].array.shape == (7, 6, 4) and set(decoded.scans) == set(PROTOCOLS)


def test_a_file_cut_short_is_found_when_decoded(images, tmp_path) -> None:
    study = read_study(write_study(tmp_path, images, STRAIGHT))
    path = study.series["FLAIR"].paths[1]
    path.write_bytes(path.read_bytes()[:-40])
    decoded = read_volume(study)
    assert codes(decoded.findings) == ["E101"] and decoded.volume is None
    assert set(decoded.scans) == {"T1c", "T1", "T2"}


def test_an_unknown_compression_is_named(images, tmp_path) -> None:
    study = read_study(write_study(tmp_path, images, STRAIGHT))
    import pydicom

    path = study.series["T2"].paths[0]
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(
        "1.2.840.10008.1.2.4.100"
    )  # MPEG2: never an MR slice, nothing decodes it
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    decoded = read_volume(study)
    assert codes(decoded.findings) == ["E134"] and "MPEG2" in decoded.findings[0].message


def test_a_constant_series_is_refused(images, tmp_path) -> None:
    images["T1"] = np.full(SHAPE, 7)
    assert codes(read_volume(read_study(write_study(tmp_path, images, STRAIGHT))).findings) == ["E161"]


def test_identity_is_found_and_never_repeated(images, tmp_path) -> None:
    write_study(tmp_path, images, STRAIGHT)
    secrets = {"PatientName": "Musterfrau^Erika", "PatientID": "4711-XYZ", "PatientBirthDate": "19640812"}
    for path in tmp_path.rglob("*.dcm"):
        described = "T1 Musterfrau ERIKA post" if path.parent.name == "SE01" else None
        edit(path, PatientIdentityRemoved="NO", **secrets)
        if described:
            edit(path, SeriesDescription=described)
    (tmp_path / "SE04" / "IM0000.dcm").unlink()
    study = read_study(tmp_path)
    assert set(codes(study.findings)) >= {"P201"} and len(study.series) == 4
    (found,) = [found for found in study.findings if found.code == "P201"]
    assert found.value == 3 and "PatientBirthDate" in found.message
    printed = " ".join([*map(str, study.findings), *describe(study), study.subject_id, study.case]).lower()
    assert not any(secret in printed for secret in ("musterfrau", "erika", "4711", "19640812"))
    assert "t1 *** *** post" in printed


def test_the_pseudonym_is_that_of_the_study(images, tmp_path) -> None:
    one = read_study(write_study(tmp_path / "a", images, STRAIGHT))
    other = read_study(write_study(tmp_path / "b", images, OBLIQUE))
    assert one.subject_id == other.subject_id and one.subject_id.startswith("study-")
    for path in (tmp_path / "b").rglob("*.dcm"):
        edit(path, StudyInstanceUID="1.2.3.4")
    assert read_study(tmp_path / "b").subject_id != one.subject_id


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"StudyInstanceUID": "1.2.9"}, "E135"),
        ({"PatientID": "CODE2"}, "E135"),
        ({"FrameOfReferenceUID": "1.2.9"}, "W156"),
    ],
)
def test_series_that_do_not_belong_together(values, code, images, tmp_path) -> None:
    write_study(tmp_path, images, STRAIGHT)
    for path in (tmp_path / "SE04").iterdir():
        edit(path, **values)
    (found,) = read_study(tmp_path).findings
    assert (found.code, found.value) == (code, 2)


@pytest.mark.parametrize(
    ("values", "word"), [({"PatientID": "CODE2"}, "patient"), ({"StudyInstanceUID": "1.2.9"}, "study")]
)
def test_a_stranger_among_unused_series_is_named(values, word, images, tmp_path) -> None:
    write_study(tmp_path, images, STRAIGHT)
    shutil.copytree(tmp_path / "SE04", tmp_path / "SE09")
    for path in (tmp_path / "SE09").iterdir():
        edit(path, SeriesInstanceUID="1.2.3.9", SeriesDescription="localizer", SeriesNumber=9, **values)
    study = read_study(tmp_path)
    (found,) = [one for one in study.findings if one.code == "W135"]
    assert f"one {word}" in found.message and "CODE2" not in found.message
    assert study.usable
