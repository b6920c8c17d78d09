"""Recognition of the four sequences from DICOM headers: what is certain is matched, what is not is listed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="the dicom extra is not installed")

from dicom_writer import PROTOCOLS, affine_of, write_series, write_study  # type: ignore[import-not-found]

from fediod_med.dicom.sequences import Evidence, evidence_of
from fediod_med.dicom.series import find_series
from fediod_med.dicom.study import Study, describe, read_study
from fediod_med.errors import InputError, SettingsError

GRID = affine_of((1.0, 1.0, 2.0))
NAMES = tuple(PROTOCOLS)


def evidence(folder: Path, **header) -> Evidence:
    write_series(folder, np.arange(24).reshape(4, 3, 2), GRID, header=header)
    (series,), _ = find_series(folder, case="c")
    return evidence_of(series)


def matched(study: Study) -> dict[str, int]:
    return {match.sequence: match.series.number for match in study.matches}


def codes(study: Study) -> list[str]:
    return [found.code for found in study.findings]


# Names as scanners and hospitals write them, with typical timing (TE, TR, TI in ms) where it is stated.
NAMED = [
    ("AX T1 POST GD", None, "T1c"),
    ("t1_mprage_sag_p2_iso_KM", (2.9, 2000, 900), "T1c"),
    ("Ax T1 +C", (9, 600, None), "T1c"),
    ("T1W_3D_TFE_CE", (3.7, 8.1, None), "T1c"),
    ("3D T1 GAD", None, "T1c"),
    ("t1ce", None, "T1c"),
    ("T1-weighted post-contrast", None, "T1c"),
    ("T1_contrast enhanced", None, "T1c"),
    ("AX T1 PRE", None, "T1"),
    ("SAG T1 W/O", (9, 600, None), "T1"),
    ("t1_se_tra nativ", (12, 550, None), "T1"),
    ("AX T1 NON-CONTRAST", None, "T1"),
    ("T1 unenhanced", None, "T1"),
    ("BRAVO no gad", (3.2, 8.2, 450), "T1"),
    ("Ax T1 FLAIR PRE", (24, 2300, 860), "T1"),
    ("t2_tse_tra_320", (96, 5600, None), "T2"),
    ("AX T2 FSE", (102, 4000, None), "T2"),
    ("T2W_TSE", None, "T2"),
    ("t2_space_sag", (400, 3200, None), "T2"),
    ("AX FLAIR", (120, 9000, 2500), "FLAIR"),
    ("t2_tirm_tra_dark-fluid", (92, 9000, 2500), "FLAIR"),
    ("AX T2 FLAIR +C", (120, 9000, 2500), "FLAIR"),
    ("Sag CUBE T2 FLAIR", (115, 6500, 1800), "FLAIR"),
    ("3D FLAIR", (335, 4800, None), "FLAIR"),  # no inversion time stated
    ("t2_space_dark-fluid_sag", (390, 5000, 1800), "FLAIR"),
]


@pytest.mark.parametrize(("name", "timing", "sequence"), NAMED, ids=[name for name, _, _ in NAMED])
def test_names_are_read(name, timing, sequence, tmp_path) -> None:
    stated = dict(zip(("EchoTime", "RepetitionTime", "InversionTime"), timing or (), strict=False))
    found = evidence(tmp_path, SeriesDescription=name, **{key: value for key, value in stated.items() if value})
    assert found.sequence == sequence and not found.conflict
    assert name in found.reason


NOT_FOR_US = [
    *("LOCALIZER", "3-plane scout", "ep2d_diff_3scan_trace_p2_ADC", "AX DWI", "SWI_Images", "mIP_Images(SW)"),
    *("ep2d_perf", "PERF_rCBV", "TOF_3D_multi-slab", "AX T2* GRE", "t2_star hemo", "T1 subtraction", "field_map"),
    *("Ax PD", "cor STIR", "svs_se_30", "T2 FIESTA", "c-spine T2 sag", "DTI FA"),
]


@pytest.mark.parametrize("name", NOT_FOR_US)
def test_other_series_are_no_candidates(name, tmp_path) -> None:
    found = evidence(tmp_path, SeriesDescription=name)
    assert found.sequence is None and found.weighting in (None, "other")


@pytest.mark.parametrize(
    ("header", "weighting"),
    [
        ({"EchoTime": 2.9, "RepetitionTime": 2300, "InversionTime": 900}, "T1"),
        ({"EchoTime": 12, "RepetitionTime": 550}, "T1"),
        ({"EchoTime": 96, "RepetitionTime": 5600}, "T2"),
        ({"EchoTime": 120, "RepetitionTime": 9000, "InversionTime": 2500}, "FLAIR"),
        ({"EchoTime": 20, "RepetitionTime": 700, "ScanningSequence": "GR"}, "other"),  # T2*
        ({"EchoTime": 80, "RepetitionTime": 6000, "ScanningSequence": ["EP", "SE"]}, "other"),  # diffusion
        ({"EchoTime": 50, "RepetitionTime": 4000, "InversionTime": 160}, "other"),  # STIR
        ({"EchoTime": 20, "RepetitionTime": 3000}, "other"),  # proton density
        ({}, None),
    ],
)
@pytest.mark.parametrize("multiframe", [False, True])
def test_timing_is_read_where_the_name_says_nothing(header, weighting, multiframe, tmp_path) -> None:
    if multiframe and "ScanningSequence" in header:
        pytest.skip("an attribute of classic images")
    options = {"multiframe": multiframe, "header": {"SeriesDescription": "brain protocol 7", **header}}
    write_series(tmp_path, np.arange(24).reshape(4, 3, 2), GRID, **options)
    (series,), _ = find_series(tmp_path, case="c")
    assert evidence_of(series).weighting == weighting


@pytest.mark.parametrize(("agent", "sequence"), [("Gadovist 7 ml", "T1c"), ("NONE", None), ("", None)])
def test_a_stated_agent_makes_a_t1_enhanced(agent, sequence, tmp_path) -> None:
    found = evidence(tmp_path, SeriesDescription="t1_se_tra", ContrastBolusAgent=agent)
    assert (found.weighting, found.sequence) == ("T1", sequence)


def test_a_name_that_says_native_outweighs_an_agent_entered_for_the_whole_examination(tmp_path) -> None:
    assert evidence(tmp_path, SeriesDescription="T1 PRE", ContrastBolusAgent="Gadovist").sequence == "T1"


@pytest.mark.parametrize(
    "header",
    [
        {"SeriesDescription": "AX T2", "EchoTime": 12, "RepetitionTime": 550},
        {"SeriesDescription": "AX FLAIR", "EchoTime": 2.9, "RepetitionTime": 2300, "InversionTime": 900},
        {"SeriesDescription": "AX T1", "EchoTime": 96, "RepetitionTime": 5600},
    ],
)
def test_names_against_timing_are_a_conflict(header, tmp_path) -> None:
    found = evidence(tmp_path, **header)
    assert found.conflict and found.sequence is None


def test_a_modality_other_than_mr_is_no_candidate(tmp_path) -> None:
    assert evidence(tmp_path, SeriesDescription="T1", Modality="CT").weighting == "other"


# ---------------------------------------------------------------- studies


@pytest.fixture
def images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.integers(1, 4000, (4, 5, 3)) for name in NAMES}


def extra(folder: Path, number: int, name: str = "more", **header) -> None:
    array = np.random.default_rng(number).integers(0, 99, (4, 5, 3))
    write_series(folder / name, array, GRID, header=header, number=number)


def test_the_four_are_found_among_others(images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    extra(tmp_path, 9, SeriesDescription="ep2d_diff_ADC")
    study = read_study(tmp_path)
    assert matched(study) == {"T1c": 1, "T1": 2, "T2": 3, "FLAIR": 4} and study.findings == ()
    printed = describe(study)
    assert printed[0].startswith("T1c: series 1 (T1 MPRAGE SAG POST), named") and "TE 2.9 TR 2300 TI 900" in printed[0]
    assert printed[-1].startswith("not used: series 9 (ep2d_diff_ADC)")


def test_a_missing_sequence_lists_the_series(images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    shutil.rmtree(tmp_path / "SE04")
    study = read_study(tmp_path)
    (found,) = study.findings
    assert found.code == "E133" and found.where == "FLAIR" and not study.usable
    assert all(f"series {number}" in found.message for number in (1, 2, 3))


def test_a_t1_without_a_word_is_native_beside_an_enhanced_one(images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    shutil.rmtree(tmp_path / "SE02")
    extra(tmp_path, 2, SeriesDescription="t1_se_tra")
    study = read_study(tmp_path)
    assert matched(study)["T1"] == 2 and study.findings == ()
    assert "while another T1 states it" in study.matches[1].reason


def test_two_t1_without_a_word_are_never_guessed(images, tmp_path) -> None:
    write_study(tmp_path, {"T2": images["T2"], "FLAIR": images["FLAIR"]}, GRID)
    extra(tmp_path, 7, "a", SeriesDescription="t1_se_tra")
    extra(tmp_path, 8, "b", SeriesDescription="t1_se_tra")
    study = read_study(tmp_path)
    assert [(found.code, found.where) for found in study.findings] == [("E133", "T1c"), ("E133", "T1")]
    assert all("series 7" in found.message and "series 8" in found.message for found in study.findings)
    chosen = read_study(tmp_path, chosen={"T1c": "8", "T1": tmp_path / "a"})
    assert matched(chosen) == {"T1c": 8, "T1": 7, "T2": 1, "FLAIR": 2} and chosen.findings == ()


def test_several_candidates_the_only_3d_one_is_taken_and_said(images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    extra(tmp_path, 6, SeriesDescription="AX T1 POST", MRAcquisitionType="2D")
    study = read_study(tmp_path)
    assert matched(study)["T1c"] == 1 and codes(study) == ["W136"]
    assert "series 6 (AX T1 POST)" in study.findings[0].message


def test_several_candidates_alike_are_an_error(images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    extra(tmp_path, 6, SeriesDescription="AX T2 late")
    study = read_study(tmp_path)
    assert codes(study) == ["E133"] and "T2" not in study.series
    assert "series 3 (t2_tse_tra_320)" in study.findings[0].message
    assert matched(read_study(tmp_path, chosen={"T2": "6"}))["T2"] == 6


@pytest.mark.parametrize("worse", [{"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, {"PixelSpacing": None}])
def test_originals_and_whole_series_come_first(worse, images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    extra(tmp_path, 6, SeriesDescription="AX T2 again", **{k: v for k, v in worse.items() if v})
    if worse.get("PixelSpacing", "") is None:
        for path in (tmp_path / "more").iterdir():
            from dicom_writer import edit

            edit(path, PixelSpacing=None)
    study = read_study(tmp_path)
    assert matched(study)["T2"] == 3 and study.findings == ()


@pytest.mark.parametrize("folders", [("t1ce", "t1", "t2", "flair"), ("T1c", "T1n", "T2w", "T2f")])
def test_folder_names_tell_where_headers_were_emptied(folders, images, tmp_path) -> None:
    for i, (folder, name) in enumerate(zip(folders, NAMES, strict=True), start=1):
        write_series(tmp_path / folder, images[name], GRID, number=i)
    study = read_study(tmp_path)
    assert matched(study) == {"T1c": 1, "T1": 2, "T2": 3, "FLAIR": 4} and study.findings == ()
    assert f"in folder {folders[0]!r}" in study.matches[0].reason


def test_a_series_in_the_wrong_folder_is_not_taken(images, tmp_path) -> None:
    for i, (folder, name) in enumerate(zip(("t1ce", "t1", "flair", "t2"), NAMES, strict=True), start=1):
        write_series(tmp_path / folder, images[name], GRID, number=i, header=PROTOCOLS[name])
    study = read_study(tmp_path)
    assert [(found.code, found.where) for found in study.findings] == [("E133", "T2"), ("E133", "FLAIR")]
    assert "series 3 (t2_tse_tra_320)" in study.findings[0].message


@pytest.mark.parametrize("by", ["number", "uid", "folder", "absolute folder"])
def test_the_user_decides(by, images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    uids = {one.number: one.uid for one in find_series(tmp_path, case="c")[0]}
    name = {"number": "3", "uid": uids[3], "folder": "SE03", "absolute folder": tmp_path / "SE03"}[by]
    study = read_study(tmp_path, chosen={"FLAIR": name, "T2": "4"}, case="case-1")
    assert matched(study) == {"T1c": 1, "T1": 2, "T2": 4, "FLAIR": 3}
    # Against the headers: said, and done.
    assert codes(study) == ["W142", "W142"] and {found.case for found in study.findings} == {"case-1"}
    assert study.usable and "headers say T2" in " ".join(found.message for found in study.findings)


def test_a_chosen_folder_may_lie_elsewhere(images, tmp_path) -> None:
    write_study(tmp_path / "study", images, GRID)
    shutil.move(tmp_path / "study" / "SE03", tmp_path / "elsewhere")
    study = read_study(tmp_path / "study", chosen={"T2": tmp_path / "elsewhere"})
    assert matched(study)["T2"] == 3 and study.findings == ()


def test_choices_that_cannot_be_met(images, tmp_path) -> None:
    write_study(tmp_path, images, GRID)
    with pytest.raises(InputError, match="found 0") as caught:
        read_study(tmp_path, chosen={"T2": "77"})
    assert caught.value.code == "E133"
    with pytest.raises(SettingsError, match="one series per sequence"):
        read_study(tmp_path, chosen={"T2": "3", "FLAIR": "3"})
    with pytest.raises(SettingsError, match="PD"):
        read_study(tmp_path, chosen={"PD": "3"})


def test_the_real_series_is_a_t1_of_unknown_contrast(shared_data) -> None:
    study = read_study(shared_data / "dicom_t1")
    (series,) = study.others
    found = evidence_of(series)
    assert (found.weighting, found.contrast) == ("T1", None) and "TE 2.52 TR 2000 TI 900" in found.reason
    assert {found.where for found in study.findings if found.code == "E133"} == {"T1c", "T1", "T2", "FLAIR"}
    # Its headers hold a name, although a placeholder, and do not say that identity was removed.
    assert "P201" in codes(study)
