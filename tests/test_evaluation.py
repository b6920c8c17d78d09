"""Scores of files and folders, their summary, and what happens to cases that cannot be scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fediod_med.data.layouts import Subject
from fediod_med.data.nifti.writing import write_segmentation, write_volumes
from fediod_med.errors import GeometryError, InputError, LabelError, SettingsError
from fediod_med.evaluation import (
    FolderEvaluation,
    SubjectScore,
    bootstrap_interval,
    evaluate_folder,
    evaluate_predictor,
    paired_difference,
    prediction_id,
    read_scores,
    score_files,
    score_matrix,
    summarise,
    write_scores,
)
from fediod_med.labels import REGIONS, SEQUENCES, get_scheme
from fediod_med.lesionwise import LesionwiseScore
from fediod_med.metrics import ABSENT_HD95_MM

SCHEME = get_scheme("brats2018")
AFFINE = np.diag([2.0, 1.0, 3.0, 1.0])


def tumour(shift: int = 0) -> np.ndarray:
    classes = np.zeros((12, 10, 8), dtype=np.uint8)
    classes[2:8, 2 + shift : 8 + shift, 2:6] = 2
    classes[3:6, 3 + shift : 6 + shift, 3:5] = 1
    classes[3:5, 3 + shift : 5 + shift, 3:5] = 3
    return classes


def write_map(path: Path, classes: np.ndarray, affine: np.ndarray = AFFINE, scheme=SCHEME) -> Path:
    reference = path.parent / "grids" / f"{path.name}.grid.nii"
    write_volumes(reference, np.arange(classes.size, dtype=np.float32).reshape(classes.shape), affine)
    write_segmentation(path, classes, reference=reference, scheme=scheme)
    return path


def row(case: str, site: str, values: tuple[float, float, float], empty: tuple[bool, ...] = (False,) * 3):
    return [
        SubjectScore(case, site, region, dice, 10 * (1 - dice), none)
        for region, dice, none in zip(REGIONS, values, empty, strict=True)
    ]


SCORES = [
    *row("p1", "north", (0.5, 0.7, 0.3)),
    *row("p2", "north", (0.7, 0.9, 0.0), (False, False, True)),
    *row("p3", "south", (0.2, 0.4, 1.0), (False, False, True)),
]


def test_files_score_as_their_arrays_do(tmp_path: Path) -> None:
    ref = write_map(tmp_path / "ref" / "a_seg.nii.gz", tumour())
    pred = write_map(tmp_path / "pred" / "a_seg.nii.gz", tumour(shift=1))
    scores = {s.region: s for s in score_files(pred, ref, SCHEME, site="north")}
    assert scores["WT"].dice == pytest.approx(5 / 6)  # 6 voxels wide, shifted by one
    assert scores["WT"].hd95 == pytest.approx(1.0)  # along the 1 mm axis
    assert scores["ET"].dice == pytest.approx(1 / 2)
    assert {(s.subject_id, s.site) for s in scores.values()} == {("a", "north")}


def test_each_file_is_read_in_its_own_scheme(tmp_path: Path) -> None:
    ref = write_map(tmp_path / "ref.nii.gz", tumour())
    pred = write_map(tmp_path / "pred.nii.gz", tumour(), scheme=get_scheme("msd"))
    assert all(s.dice == 1 for s in score_files(pred, ref, SCHEME, pred_scheme=get_scheme("msd")))
    with pytest.raises(LabelError, match=r"pred\.nii\.gz.*found 3"):
        score_files(pred, ref, SCHEME)


def test_another_grid_is_refused_with_its_distance(tmp_path: Path) -> None:
    ref = write_map(tmp_path / "ref.nii.gz", tumour())
    moved = AFFINE.copy()
    moved[0, 3] = 4
    pred = write_map(tmp_path / "pred.nii.gz", tumour(), affine=moved)
    with pytest.raises(GeometryError, match=r"4\.00 mm"):
        score_files(pred, ref, SCHEME)
    small = write_map(tmp_path / "small.nii.gz", tumour()[:-1])
    with pytest.raises(GeometryError, match="shape"):
        score_files(small, ref, SCHEME)


@pytest.mark.parametrize("name", ["{0}/{0}_seg.nii.gz", "{0}-seg.nii.gz", "{0}.nii.gz", "HGG/{0}/seg.nii"])
def test_references_are_found_by_name_or_by_case_folder(tmp_path: Path, name: str) -> None:
    for case in ("case_1", "case_2"):
        write_map(tmp_path / "ref" / name.format(case), tumour())
        write_map(tmp_path / "pred" / f"{case}_seg.nii.gz", tumour())
        for folder in (tmp_path / "ref").rglob("grids"):
            for grid in folder.iterdir():
                grid.unlink()
    result = evaluate_folder(tmp_path / "pred", tmp_path / "ref", SCHEME, sites={"case_1": "north"})
    assert result.complete
    assert [s.dice for s in result.scores] == [1.0] * 6
    assert {s.subject_id: s.site for s in result.scores} == {"case_1": "north", "case_2": ""}


def test_references_of_a_layout_are_found(tmp_path: Path) -> None:
    for folder, fill in (("imagesTr", False), ("labelsTr", True)):
        path = tmp_path / "ref" / folder / "BRATS_001.nii.gz"
        if fill:
            write_map(path, tumour())
        else:
            write_volumes(path, np.random.default_rng(0).random((4, 12, 10, 8), dtype=np.float32), AFFINE)
    write_map(tmp_path / "pred" / "BRATS_001_seg.nii.gz", tumour())
    result = evaluate_folder(tmp_path / "pred", tmp_path / "ref", SCHEME, layout="msd")
    assert result.complete
    assert len(result.scores) == 3


def test_cases_that_cannot_be_scored_are_named_and_the_others_scored(tmp_path: Path) -> None:
    for case in ("good", "lost", "broken"):
        write_map(tmp_path / "ref" / case / f"{case}_seg.nii.gz", tumour())
    for case in ("good", "stray", "broken"):
        write_map(tmp_path / "pred" / f"{case}_seg.nii.gz", tumour())
    (tmp_path / "pred" / "broken_seg.nii.gz").write_bytes(b"\x1f\x8bno")
    asked: list[str] = []
    result = evaluate_folder(tmp_path / "pred", tmp_path / "ref", SCHEME, on_case=asked.append)
    assert {s.subject_id for s in result.scores} == {"good"}
    assert result.missing_predictions == ("lost",)
    assert result.missing_references == ("stray",)
    assert list(result.failures) == ["broken"]
    assert not result.complete
    assert len(result.findings()) == 3
    assert asked == ["broken", "good"]


def test_folders_without_a_common_case_are_refused(tmp_path: Path) -> None:
    write_map(tmp_path / "ref" / "a_seg.nii.gz", tumour())
    write_map(tmp_path / "pred" / "b_seg.nii.gz", tumour())
    with pytest.raises(InputError, match="no id in common"):
        evaluate_folder(tmp_path / "pred", tmp_path / "ref", SCHEME)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        evaluate_folder(tmp_path / "empty", tmp_path / "ref", SCHEME)


def test_two_files_for_one_case_are_refused(tmp_path: Path) -> None:
    write_map(tmp_path / "ref" / "a_seg.nii.gz", tumour())
    write_map(tmp_path / "pred" / "a_seg.nii.gz", tumour())
    write_map(tmp_path / "pred" / "a_seg.nii", tumour())
    with pytest.raises(InputError, match="two predictions for a"):
        evaluate_folder(tmp_path / "pred", tmp_path / "ref", SCHEME)


def test_prediction_ids_drop_the_suffix() -> None:
    assert prediction_id(Path("BraTS-GLI-00000-000_seg.nii.gz")) == "BraTS-GLI-00000-000"
    assert prediction_id(Path("BRATS_001.nii.gz")) == "BRATS_001"


def labelled_subject(folder: Path, case: str) -> Subject:
    images = {}
    for index, name in enumerate(SEQUENCES):
        images[name] = folder / f"{case}_{name}.nii.gz"
        noise = np.random.default_rng(index).random((12, 10, 8), dtype=np.float32)
        write_volumes(images[name], noise, AFFINE)
    label = folder / f"{case}_seg.nii.gz"
    write_segmentation(label, tumour(), reference=images["T1c"], scheme=SCHEME)
    return Subject(case, images, label=label)


def test_a_predictor_is_scored_in_native_voxels(tmp_path: Path) -> None:
    subject = labelled_subject(tmp_path, "a")
    perfect = evaluate_predictor(lambda s: tumour(), [("north", subject, SCHEME)])
    nothing = evaluate_predictor(lambda s: np.zeros_like(tumour()), [("north", subject, SCHEME)])
    assert [s.dice for s in perfect] == [1.0] * 3
    assert [(s.dice, s.hd95, s.site) for s in nothing] == [(0.0, ABSENT_HD95_MM, "north")] * 3
    with pytest.raises(GeometryError, match="shape"):
        evaluate_predictor(lambda s: tumour()[1:], [("north", subject, SCHEME)])
    with pytest.raises(InputError, match="label map"):
        evaluate_predictor(lambda s: tumour(), [("north", Subject("b", subject.images), SCHEME)])


def test_summary_means_are_means_over_patients() -> None:
    summary = summarise(SCORES)
    assert summary["TC"] == pytest.approx((0.5 + 0.7 + 0.2) / 3)
    assert summary["mean"] == pytest.approx(np.mean([s.dice for s in SCORES]))
    assert summary["hd95_mm"]["WT"] == pytest.approx((3 + 1 + 6) / 3)
    assert summary["patients"] == 3
    assert summary["empty_references"] == {"TC": 0, "WT": 0, "ET": 2}
    assert summary["dice_nonempty"]["ET"] == pytest.approx(0.3)
    assert summary["sites"]["north"]["WT"] == pytest.approx(0.8)
    assert summary["sites"]["north"]["patients"] == 2
    assert summary["worst_site"] == "north"
    assert summary["worst_site_mean"] == pytest.approx(np.mean([0.5, 0.7, 0.3, 0.7, 0.9, 0.0]))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_region_that_no_reference_has_gives_none_not_nan() -> None:
    summary = summarise(row("p", "", (0.5, 0.7, 1.0), (False, False, True)))
    assert summary["dice_nonempty"]["ET"] is None
    assert summary["dice_nonempty"]["mean"] == pytest.approx(0.6)


def test_intervals_hold_the_mean_and_repeat_with_the_seed() -> None:
    summary, again = summarise(SCORES), summarise(SCORES)
    low, high = summary["ci95"]["TC"]
    assert 0.2 <= low <= summary["TC"] <= high <= 0.7
    assert summary == again
    values = np.random.default_rng(0).random((20, 1))
    assert (bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)).any()


def test_order_of_rows_does_not_matter() -> None:
    assert summarise(SCORES[::-1]) == summarise(SCORES)


def test_bootstrap_agrees_with_the_normal_interval_on_many_patients() -> None:
    values = np.random.default_rng(3).normal(0.6, 0.2, size=(400, 1))
    low, high = bootstrap_interval(values, seed=0)[0]
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)


def test_one_patient_has_an_interval_of_width_zero() -> None:
    summary = summarise(row("p", "", (0.5, 0.7, 0.3)))
    assert summary["ci95"]["TC"] == [0.5, 0.5]


def test_incomplete_or_repeated_rows_are_refused() -> None:
    for scores in ([], SCORES[:-1], [*SCORES, SCORES[0]], [*SCORES, SubjectScore("p1", "north", "NCR", 1, 0, False)]):
        with pytest.raises(InputError, match="scores"):
            score_matrix(scores, "dice")


def test_paired_difference_sees_a_constant_gain_that_single_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    base = [s for i in range(12) for s in row(f"p{i}", "", tuple(rng.uniform(0.2, 0.8, 3)))]
    better = [SubjectScore(s.subject_id, s.site, s.region, s.dice + 0.02, s.hd95, False) for s in base][::-1]
    result = paired_difference(better, base)["mean"]
    assert result["difference"] == pytest.approx(0.02)
    assert result["ci95"] == pytest.approx([0.02, 0.02])
    assert result["wins"] == [12, 0, 0]
    assert result["p_value"] == pytest.approx(2 / 2**12)  # only all plus and all minus are as extreme
    low, high = summarise(better)["ci95"]["mean"]
    assert low < summarise(base)["mean"] < high


def test_paired_difference_of_equal_rows_is_nothing() -> None:
    result = paired_difference(SCORES, SCORES)
    assert all(entry["difference"] == 0 and entry["p_value"] == 1 for entry in result.values())
    assert result["TC"]["wins"] == [0, 3, 0]


def test_sign_flips_are_drawn_when_there_are_many_patients() -> None:
    base = [s for i in range(20) for s in row(f"p{i:02}", "", (0.5, 0.5, 0.5))]
    mixed = [
        SubjectScore(s.subject_id, "", s.region, s.dice + (0.1 if int(s.subject_id[1:]) % 2 else -0.1), s.hd95, False)
        for s in base
    ]
    assert paired_difference(mixed, base)["TC"]["p_value"] > 0.5


def test_pairs_of_other_patients_are_refused() -> None:
    with pytest.raises(InputError, match="same patients"):
        paired_difference(SCORES, SCORES[:6])


def test_csv_round_trip_is_exact_and_json_carries_policy_and_privacy(tmp_path: Path) -> None:
    table, summary = write_scores(
        tmp_path / "out" / "metrics.csv", SCORES, privacy={"north": {"mode": "none"}}, findings=["x: lost"]
    )
    assert read_scores(table) == SCORES
    content = json.loads(summary.read_text())
    assert content["notice"] == "Research software. Not for clinical use."
    assert "Dice 1 and HD95 0 mm" in content["absent_region_policy"]
    assert content["privacy"] == {"north": {"mode": "none"}}
    assert content["findings"] == ["x: lost"]
    assert content["summary"] == summarise(SCORES)
    with table.open() as stream:
        assert all("Not for clinical use" in line["notice"] for line in csv.DictReader(stream))


def test_a_json_name_for_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\.csv"):
        write_scores(tmp_path / "metrics.json", SCORES)
    with pytest.raises(InputError, match="fediod evaluate"):
        read_scores(tmp_path / "absent.csv")


def test_an_evaluation_without_findings_is_complete() -> None:
    assert FolderEvaluation(tuple(SCORES)).findings() == []


# ---------------------------------------------------------------- lesion by lesion


def with_second_lesion(classes: np.ndarray) -> np.ndarray:
    far = np.zeros((40, *classes.shape[1:]), dtype=np.uint8)
    far[:12] = classes
    far[30:36, 2:8, 2:6] = 2
    return far


def test_a_missed_lesion_costs_more_lesion_by_lesion(tmp_path: Path) -> None:
    ref = with_second_lesion(tumour())
    pred = ref.copy()
    pred[30:] = 0
    paths = [write_map(tmp_path / name / "a_seg.nii.gz", classes) for name, classes in (("ref", ref), ("pred", pred))]
    scores = {s.region: s for s in score_files(paths[1], paths[0], SCHEME)}
    whole, core = scores["WT"].lesionwise, scores["TC"].lesionwise
    assert whole is not None and core is not None
    assert scores["WT"].dice == pytest.approx(2 / 3)  # half of the voxels, all of them right
    assert (whole.dice, whole.hd95, whole.n_tp, whole.n_fp, whole.n_fn) == (0.5, 187, 1, 0, 1)
    assert (core.dice, core.n_tp, core.n_fp, core.n_fn) == (1, 1, 0, 0)
    assert all(s.lesionwise is None for s in score_files(paths[1], paths[0], SCHEME, lesionwise=False))


def test_lesion_scores_are_written_read_and_summed(tmp_path: Path) -> None:
    for case, missing in (("a", True), ("b", False)):
        ref = with_second_lesion(tumour())
        write_map(tmp_path / "ref" / f"{case}_seg.nii.gz", ref)
        pred = ref.copy()
        pred[30:] *= not missing
        write_map(tmp_path / "pred" / f"{case}_seg.nii.gz", pred)
    found = evaluate_folder(tmp_path / "pred", tmp_path / "ref", SCHEME)
    table, summary = write_scores(tmp_path / "metrics.csv", found.scores)
    assert read_scores(table) == list(found.scores)
    with table.open(newline="") as stream:
        header = next(csv.reader(stream))
    assert header[-6:] == ["lesion_dice", "lesion_hd95_mm", "n_tp", "n_fp", "n_fn", "notice"]
    content = json.loads(summary.read_text())
    told = content["summary"]["lesionwise"]
    assert told["dice"]["WT"] == pytest.approx(0.75)
    assert told["dice"]["mean"] == pytest.approx((1 + 0.75 + 1) / 3)
    assert told["hd95_mm"]["WT"] == pytest.approx(187 / 2)
    assert told["n_fn"] == {"TC": 0, "WT": 1, "ET": 0}
    assert told["n_tp"] == {"TC": 2, "WT": 3, "ET": 0}  # 48 mm3 of ET are below the limit
    assert "374" in content["lesionwise_policy"]


def test_rows_without_lesion_scores_stay_as_they_were(tmp_path: Path) -> None:
    table, summary = write_scores(tmp_path / "metrics.csv", SCORES)
    assert "lesion" not in table.read_text() + summary.read_text()
    assert read_scores(table) == SCORES
    mixed = [SubjectScore("p0", "", s.region, 1, 0, False, LesionwiseScore(0.5, 187, 1, 0, 1)) for s in SCORES[:3]]
    table, _ = write_scores(tmp_path / "mixed.csv", [*mixed, *SCORES])
    assert read_scores(table) == [*mixed, *SCORES]
    assert "lesionwise" not in summarise([*mixed, *SCORES])
