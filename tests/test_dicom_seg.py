"""DICOM Segmentations: every voxel where the NIfTI mask has it, in any orientation, by readers that are not ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("pydicom", reason="the dicom extra is not installed")
pytest.importorskip("highdicom", reason="the dicom extra is not installed")

from dicom_writer import VIEWS, affine_of, edit, rotation, write_series  # type: ignore[import-not-found]

from fediod_med.dicom import segmentation
from fediod_med.dicom.segmentation import write_dicom_seg
from fediod_med.dicom.series import DicomSeries, find_series
from fediod_med.dicom.volume import affine_of as affine_of_series
from fediod_med.dicom.volume import geometry, read_series
from fediod_med.errors import GeometryError, InputError, LabelError, SettingsError

KINDS = ("BINARY", "LABELMAP")
SHAPE = (9, 8, 6)
OBLIQUE = affine_of((0.9, 1.1, 2.0), (-20.0, 10.0, 4.0), rotation(12.0, -7.0, 20.0))


@pytest.fixture
def classes() -> np.ndarray:
    """Asymmetric along every axis, with a slice between others that holds nothing."""
    classes = np.zeros(SHAPE, dtype=np.uint8)
    classes[1:5, 2:6, 1:3] = 2
    classes[2:4, 3:5, 2] = 3
    classes[2, 3, 1] = 1
    classes[7, 1, 4] = 3
    return classes


def write(folder: Path, array: np.ndarray, affine: np.ndarray, **options: Any) -> DicomSeries:
    write_series(folder, array, affine, **options)
    (series,), _ = find_series(folder, case="c")
    return series


def read_with_highdicom(path: Path, series: DicomSeries) -> np.ndarray:
    """The class map of a file on the (column, row, slice) grid of a series, read by highdicom."""
    import highdicom

    volume = highdicom.seg.segread(path).get_volume(combine_segments=True, relabel=False)
    return np.asarray(volume.match_geometry(geometry(series), tol=1e-3).array.T)


def on_series(series: DicomSeries, array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels of an array on the grid of a series, by coordinates alone."""
    planes = series.planes
    shape = (planes[0].columns, planes[0].rows, len(planes))
    index = np.vstack([np.indices(shape).reshape(3, -1), np.ones(int(np.prod(shape)))])
    mapped = np.rint((np.linalg.inv(affine) @ affine_of_series(series) @ index)[:3]).astype(int)
    return array[tuple(mapped)].reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiframe", [False, True], ids=["classic", "multi-frame"])
@pytest.mark.parametrize("flip", [(), (1,), (0, 2)], ids=["as is", "rows negated", "columns and slices negated"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_nifti_mask_comes_back_voxel_for_voxel(view, flip, multiframe, kind, classes, tmp_path, rng) -> None:
    """The mask has the axes of the NIfTI files, the series those of the scanner."""
    array = rng.integers(0, 999, SHAPE)
    series = write(tmp_path / "in", array, OBLIQUE, view=view, flip=flip, multiframe=multiframe)
    path = tmp_path / "out" / "seg.dcm"
    write_dicom_seg(path, classes, OBLIQUE, series, kind=kind, version="1")
    assert np.array_equal(read_with_highdicom(path, series), on_series(series, classes, OBLIQUE))
    assert [entry.name for entry in path.parent.iterdir()] == ["seg.dcm"]


@given(
    shape=st.tuples(*[st.integers(2, 7)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    turn=st.tuples(*[st.floats(-180.0, 180.0)] * 3),
    origin=st.tuples(*[st.floats(-300.0, 300.0)] * 3),
    view=st.sampled_from(sorted(VIEWS)),
    flip=st.sets(st.integers(0, 2)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_grid(shape, spacing, turn, origin, view, flip, seed, tmp_path_factory) -> None:
    _, rows, columns = VIEWS[view]
    assume(shape[rows] * shape[columns] >= 8)  # below: see the test that follows
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("any")
    affine = affine_of(spacing, origin, rotation(*turn))
    array, classes = rng.integers(0, 999, shape), rng.integers(0, 4, shape).astype(np.uint8)
    series = write(folder / "in", array, affine, view=view, flip=tuple(flip), seed=seed)
    assert series.findings == ()
    scan = read_series(series)
    assert np.array_equal(scan.array, on_series(series, array, affine))
    write_dicom_seg(folder / "seg.dcm", classes, affine, series, version="1")
    assert np.array_equal(read_with_highdicom(folder / "seg.dcm", series), on_series(series, classes, affine))


@pytest.mark.parametrize("seed", [0, 274])
def test_frames_of_less_than_a_byte_are_refused_rather_than_written_wrongly(seed, tmp_path) -> None:
    """The writer's library packs their bits wrongly: one seed gives data that cannot be decoded, one wrong voxels."""
    rng = np.random.default_rng(seed)
    affine = affine_of((1.0, 1.0, 1.0))
    array, classes = rng.integers(0, 999, (2, 2, 2)), rng.integers(0, 4, (2, 2, 2)).astype(np.uint8)
    series = write(tmp_path / "in", array, affine, seed=seed)
    with pytest.raises(InputError, match="not kept"):
        write_dicom_seg(tmp_path / "out" / "seg.dcm", classes, affine, series, version="1")
    assert list((tmp_path / "out").iterdir()) == []
    write_dicom_seg(tmp_path / "map.dcm", classes, affine, series, kind="LABELMAP", version="1")
    assert np.array_equal(read_with_highdicom(tmp_path / "map.dcm", series), on_series(series, classes, affine))


@pytest.mark.parametrize("shape", [(3, 3, 4), (13, 11, 5), (181, 217, 3)])
def test_frames_that_do_not_end_with_a_byte(shape, tmp_path, rng) -> None:
    """181 x 217 is the MNI grid: 39277 pixels, 5 over a multiple of 8."""
    assert shape[0] * shape[1] % 8
    array, classes = rng.integers(0, 999, shape), rng.integers(0, 4, shape).astype(np.uint8)
    series = write(tmp_path / "in", array, OBLIQUE)
    write_dicom_seg(tmp_path / "seg.dcm", classes, OBLIQUE, series, version="1")
    assert np.array_equal(read_with_highdicom(tmp_path / "seg.dcm", series), on_series(series, classes, OBLIQUE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("present", [(), (3,), (1,), (2, 3)], ids=["nothing", "ET only", "NCR only", "no NCR"])
def test_absent_classes_keep_their_segment(present, kind, classes, tmp_path, rng) -> None:
    import pydicom

    classes = np.where(np.isin(classes, present), classes, 0).astype(np.uint8)
    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    path = tmp_path / "seg.dcm"
    write_dicom_seg(path, classes, OBLIQUE, series, kind=kind, version="1")
    segments = pydicom.dcmread(path).SegmentSequence
    assert [item.SegmentNumber for item in segments] == ([0, 1, 2, 3] if kind == "LABELMAP" else [1, 2, 3])
    assert np.array_equal(read_with_highdicom(path, series), on_series(series, classes, OBLIQUE))


@pytest.mark.parametrize("kind", KINDS)
def test_segments_are_coded_and_marked_as_research(kind, classes, tmp_path, rng) -> None:
    import pydicom

    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE, number=7)
    path = tmp_path / "seg.dcm"
    write_dicom_seg(path, classes, OBLIQUE, series, kind=kind, algorithm_name="model-x", version="0.1+abc")
    written, source = pydicom.dcmread(path), series.headers[0]
    segments = [item for item in written.SegmentSequence if item.SegmentNumber]
    # SNOMED CT: Necrosis, Edema, Neoplasm.
    types = [item.SegmentedPropertyTypeCodeSequence[0] for item in segments]
    assert [(code.CodingSchemeDesignator, code.CodeValue) for code in types] == [
        *(("SCT", "6574001"), ("SCT", "79654002"), ("SCT", "108369006"))
    ]
    assert all("research only" in item.SegmentLabel and item.SegmentAlgorithmType == "AUTOMATIC" for item in segments)
    assert len({tuple(item.RecommendedDisplayCIELabValue) for item in segments}) == 3
    algorithm = segments[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("model-x", "0.1+abc")
    for description in (written.SeriesDescription, written.ContentDescription):
        assert "Not for clinical use." in description and len(description) <= 64
    same = ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName")
    assert all(written[keyword].value == source[keyword].value for keyword in same)
    assert written.SeriesInstanceUID != source.SeriesInstanceUID and written.Modality == "SEG"
    referenced = written.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == series.uid
    instances = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert instances == {header.SOPInstanceUID for header in series.headers}


def test_headers_emptied_by_de_identification_do(classes, tmp_path, rng) -> None:
    paths = write_series(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    for path in paths:
        edit(path, PatientName=None, PatientID=None, StudyID=None, AccessionNumber=None, StudyDate=None)
    (series,), _ = find_series(tmp_path / "in", case="c")
    write_dicom_seg(tmp_path / "seg.dcm", classes, OBLIQUE, series, version="1")
    assert np.array_equal(read_with_highdicom(tmp_path / "seg.dcm", series), on_series(series, classes, OBLIQUE))


# ---------------------------------------------------------------- refusals


def moved(by: tuple[float, float, float]) -> np.ndarray:
    affine = OBLIQUE.copy()
    affine[:3, 3] += OBLIQUE[:3, :3] @ np.asarray(by)
    return affine


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        (SHAPE, moved((0.1, 0, 0))),
        (SHAPE, moved((1, 0, 0))),  # whole voxels: cropping and padding would hide it
        (SHAPE, moved((0, 0, -1))),
        ((9, 8, 5), OBLIQUE),
        (SHAPE, affine_of((0.9, 1.1, 2.0), (-20.0, 10.0, 4.0))),
        (SHAPE, affine_of((0.9, 1.1, 2.05), (-20.0, 10.0, 4.0), rotation(12.0, -7.0, 20.0))),
    ],
    ids=["shifted", "shifted by a voxel", "shifted by a slice", "a slice less", "not turned", "other spacing"],
)
def test_another_grid_is_refused(shape, affine, tmp_path, rng) -> None:
    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    with pytest.raises(GeometryError, match="expected classes on the grid"):
        write_dicom_seg(tmp_path / "seg.dcm", np.ones(shape, np.uint8), affine, series, version="1")
    assert not (tmp_path / "seg.dcm").exists()


def test_the_single_precision_of_a_nifti_header_is_the_same_grid(classes, tmp_path, rng) -> None:
    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    write_dicom_seg(tmp_path / "seg.dcm", classes, OBLIQUE.astype(np.float32), series, version="1")
    assert np.array_equal(read_with_highdicom(tmp_path / "seg.dcm", series), on_series(series, classes, OBLIQUE))


@pytest.mark.parametrize(
    "wrong", [np.full(SHAPE, 4, np.uint8), np.full(SHAPE, -1), np.zeros(SHAPE), np.zeros((9, 8), int)]
)
def test_what_is_no_class_map_is_refused(wrong, tmp_path, rng) -> None:
    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    with pytest.raises(LabelError):
        write_dicom_seg(tmp_path / "seg.dcm", wrong, OBLIQUE, series, version="1")


def test_an_unknown_kind_is_refused(classes, tmp_path, rng) -> None:
    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    with pytest.raises(SettingsError, match="BINARY, LABELMAP"):
        write_dicom_seg(tmp_path / "seg.dcm", classes, OBLIQUE, series, kind="FRACTIONAL", version="1")


def test_a_series_without_frame_of_reference_is_refused(classes, tmp_path, rng) -> None:
    for path in write_series(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE):
        edit(path, FrameOfReferenceUID=None)
    (series,), _ = find_series(tmp_path / "in", case="c")
    with pytest.raises(InputError, match="Frame of Reference"):
        write_dicom_seg(tmp_path / "seg.dcm", classes, OBLIQUE, series, version="1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda mask: mask.with_array(np.flip(mask.array, 1).copy()), InputError),
        (lambda mask: mask.with_array(np.where(mask.array == 3, 2, mask.array).astype(np.uint8)), InputError),
        (lambda mask: mask.flip_spatial(2), GeometryError),
    ],
    ids=["flipped voxels", "a wrong class", "flipped grid"],
)
def test_what_reads_back_differently_is_not_kept(spoil, error, kind, classes, tmp_path, rng, monkeypatch) -> None:
    """A writer that errs, as flawed libraries and hand-written flips do."""
    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    path = tmp_path / "out" / "seg.dcm"
    path.parent.mkdir()
    path.write_bytes(b"earlier")
    build = segmentation._build
    monkeypatch.setattr(segmentation, "_build", lambda p, mask, *rest: build(p, spoil(mask), *rest))
    with pytest.raises(error, match="not kept"):
        write_dicom_seg(path, classes, OBLIQUE, series, kind=kind, version="1")
    assert path.read_bytes() == b"earlier" and [entry.name for entry in path.parent.iterdir()] == ["seg.dcm"]


# ---------------------------------------------------------------- real scans and validators


def test_the_real_series(shared_data, tmp_path) -> None:
    (series,), _ = find_series(shared_data / "dicom_t1", case="c")
    scan = read_series(series)
    classes = np.zeros(scan.array.shape, dtype=np.uint8)
    classes[100:140, 90:140, 20:40] = 2
    classes[110:130, 100:120, 25:35] = 3
    classes[115:120, 105:110, 28:30] = 1
    for kind in KINDS:
        path = tmp_path / f"{kind}.dcm"
        write_dicom_seg(path, classes, scan.affine, series, kind=kind, version="1")
        assert np.array_equal(read_with_highdicom(path, series), classes)


@pytest.mark.parametrize("turn", [None, (14.0, -8.0, 21.0)], ids=["straight", "oblique"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_real_case_with_its_reference_mask(view, turn, shared_data, tmp_path) -> None:
    folder = next((shared_data / "brats18_2mm" / "HGG").iterdir())
    assert_case(folder, view, turn, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_a_real_case_in_full_resolution(view, shared_data, tmp_path) -> None:
    folder = next((shared_data / "brats18" / "HGG").iterdir())
    assert_case(folder, view, (14.0, -8.0, 21.0), tmp_path)


def assert_case(folder: Path, view: str, turn: tuple[float, float, float] | None, out: Path) -> None:
    image = nibabel.load(next(folder.glob("*_t1ce.nii*")))
    label = nibabel.load(next(folder.glob("*_seg.nii*")))
    array = np.asarray(image.dataobj).astype(np.uint16)
    classes = np.asarray(label.dataobj).astype(np.uint8)
    classes[classes == 4] = 3
    affine = image.affine
    if turn is not None:
        affine = affine.copy()
        affine[:3] = rotation(*turn) @ affine[:3]
    series = write(out / "in", array, affine, view=view)
    assert np.array_equal(read_series(series).array, on_series(series, array, affine))
    for kind in KINDS:
        path = out / f"{kind}.dcm"
        write_dicom_seg(path, classes, affine, series, kind=kind, version="1")
        assert np.array_equal(read_with_highdicom(path, series), on_series(series, classes, affine))


@pytest.fixture(params=KINDS)
def written(request, classes, tmp_path, rng) -> Path:
    series = write(tmp_path / "in", rng.integers(0, 999, SHAPE), OBLIQUE)
    path = tmp_path / "seg.dcm"
    write_dicom_seg(path, classes, OBLIQUE, series, kind=request.param, version="1")
    return path


def needs(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian package {package})")
    return found


def test_dcmtk_knows_it_for_dicom(written) -> None:
    done = subprocess.run([needs("dcmftest", "dcmtk"), written], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("yes:")


def test_dciodvfy_finds_no_error(written) -> None:
    import pydicom

    program = needs("dciodvfy", "dicom3tools")
    done = subprocess.run([program, "-new", written], capture_output=True, text=True, check=False)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
    if pydicom.dcmread(written).SegmentationType == "LABELMAP" and any("Object Not found" in line for line in errors):
        # It says so, and takes the background segment, number 0, for an error of the older BINARY object.
        assert [line for line in errors if "Object Not found" not in line and "SegmentNumber of 0" not in line] == []
        pytest.skip("this dciodvfy is older than Label Map Segmentation Storage (2024) and cannot validate the object")
    assert errors == []
