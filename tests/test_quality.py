"""The quality score: its measures against known values, its fit against made-up relations, its words and its use."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fediod_med.errors import InputError, SettingsError
from fediod_med.metrics import dice
from fediod_med.quality import (
    COVERAGE,
    FEATURES,
    SHAPE,
    Calibration,
    assess,
    calibrate,
    calibration_json,
    measure,
    read_calibration,
    shipped_calibration,
)

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def labels(shape=(30, 28, 26)) -> np.ndarray:
    classes = np.zeros(shape, dtype=np.uint8)
    classes[6:18, 6:18, 6:18] = 2
    classes[8:14, 8:14, 8:14] = 3
    classes[10:12, 10:12, 10:12] = 1
    return classes


def probabilities(classes: np.ndarray, blur: float = 0.0) -> np.ndarray:
    """One-hot maps, blurred: the softer, the less sure."""
    onehot = (np.arange(4)[:, None, None, None] == classes).astype(np.float32)
    if blur:
        onehot = np.stack([ndimage.gaussian_filter(channel, blur, mode="nearest") for channel in onehot])
    return onehot / onehot.sum(axis=0)


# ---------------------------------------------------------------- measures


def test_a_sure_prediction_has_the_measures_of_its_mask() -> None:
    classes = labels()
    found = measure(probabilities(classes), AFFINE)
    assert tuple(found) == (*FEATURES, *SHAPE)
    for region in ("TC", "WT", "ET"):
        assert found[f"confidence_{region}"] == pytest.approx(1)
    assert found["entropy_inside"] == pytest.approx(0, abs=1e-4)
    assert found["uncertain_share"] == 0
    assert found["volume_ml"] == pytest.approx(12**3 * 8 / 1000)
    assert (found["components"], found["largest_share"]) == (1, 1)


def test_components_count_from_a_tenth_of_a_millilitre() -> None:
    classes = labels()
    classes[22:25, 22:25, 22] = 2  # 9 voxels of 8 mm3
    classes[22:25, 2:7, 2] = 3  # 15 voxels
    found = measure(probabilities(classes), AFFINE)
    assert found["components"] == 2
    assert found["largest_share"] == pytest.approx(12**3 / (12**3 + 24))


def test_no_tumour_for_sure_is_a_confident_answer() -> None:
    found = measure(probabilities(np.zeros((8, 8, 8), dtype=np.uint8)), AFFINE)
    assert found["confidence_WT"] == pytest.approx(1)
    assert all(math.isfinite(value) for value in found.values())
    # Nowhere above one half, yet with enough mass to doubt the answer.
    doubt = np.zeros((4, 8, 8, 8), dtype=np.float32)
    doubt[0], doubt[2] = 0.6, 0.4
    assert measure(doubt, AFFINE)["confidence_WT"] < 0.1


def test_confidence_is_the_dice_to_expect_if_the_probabilities_are_true(rng: np.random.Generator) -> None:
    soft = probabilities(labels(), blur=1.5)
    predicted = soft.argmax(axis=0)
    draws = []
    for _ in range(40):  # references drawn voxel by voxel from the probabilities
        truth = (rng.random(predicted.shape) > soft[0].astype(float)).astype(np.uint8)
        draws.append(dice(predicted != 0, truth))
    assert measure(soft, AFFINE)["confidence_WT"] == pytest.approx(np.mean(draws), abs=0.01)


def test_measures_do_not_depend_on_the_voxel_size() -> None:
    soft = probabilities(labels(), blur=1.0)
    fine = soft.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=3)
    coarse_found, fine_found = measure(soft, AFFINE), measure(fine, np.diag([1.0, 1, 1, 1]))
    for name in {*FEATURES, *SHAPE} - {"entropy_rim"}:  # the rim is counted in whole voxels
        assert fine_found[name] == pytest.approx(coarse_found[name], abs=1e-3), name


def test_entropy_is_told_apart_inside_and_around() -> None:
    classes = labels()
    flat = probabilities(classes)
    whole = classes != 0
    around = ndimage.binary_dilation(whole, iterations=2) & ~whole
    flat[:, around] = np.array([0.55, 0.15, 0.15, 0.15], dtype=np.float32)[:, None]
    found = measure(flat, AFFINE)
    assert found["entropy_inside"] == pytest.approx(0, abs=1e-4)
    assert found["entropy_rim"] > 1.0
    # all voxels of the shell are unsure: its volume over the tumour's
    assert found["uncertain_share"] == pytest.approx(math.log1p(around.sum() * 0.008 / (whole.sum() * 0.008 + 0.1)))


# ---------------------------------------------------------------- fit


def made_up(rng: np.random.Generator, n: int = 300, noise: float = 0.03) -> tuple[list[dict[str, float]], np.ndarray]:
    table = rng.random((n, len(FEATURES)))
    outcome = 0.4 + 0.5 * table[:, 0] - 0.2 * table[:, 5] + noise * rng.standard_normal(n)
    return [dict(zip(FEATURES, row.tolist(), strict=True)) for row in table], outcome


def test_a_linear_relation_is_found(rng: np.random.Generator) -> None:
    rows, outcome = made_up(rng)
    fitted = calibrate(rows, outcome, calibrated_on="made-up cases", penalty=0.1)
    slopes = dict(zip(fitted.features, np.array(fitted.weights) / np.array(fitted.scale), strict=True))
    assert slopes["confidence_TC"] == pytest.approx(0.5, abs=0.03)
    assert slopes["uncertain_share"] == pytest.approx(-0.2, abs=0.03)
    assert fitted.spearman > 0.95
    assert fitted.mae == pytest.approx(0.03 * math.sqrt(2 / math.pi), rel=0.2)
    new_rows, new = made_up(rng, 1000)
    value = fitted.predict(np.array([[row[name] for name in FEATURES] for row in new_rows]))
    inside = (new >= value + fitted.residuals[0]) & (new <= value + fitted.residuals[1])
    assert inside.mean() == pytest.approx(COVERAGE, abs=0.07)


def test_confidence_never_lowers_and_entropy_never_raises_the_score(rng: np.random.Generator) -> None:
    rows, outcome = made_up(rng)
    weights = dict(zip(FEATURES, calibrate(rows, 1 - outcome, calibrated_on="upside down").weights, strict=True))
    shipped = dict(zip(FEATURES, shipped_calibration().weights, strict=True))
    for found in (weights, shipped):
        assert all(w >= 0 if name.startswith("confidence") else w <= 0 for name, w in found.items())
    assert weights["confidence_TC"] == 0


def test_measures_that_say_nothing_are_found_out(rng: np.random.Generator) -> None:
    rows, _ = made_up(rng)
    fitted = calibrate(rows, rng.random(len(rows)), calibrated_on="noise")
    assert abs(fitted.spearman) < 0.2


def test_copies_of_a_case_do_not_flatter_the_error(rng: np.random.Generator) -> None:
    """Few cases, many copies, nothing to learn: only groups show that copies were learnt by heart."""
    rows, _ = made_up(rng, 14)
    rows = rows * 12
    outcome = np.tile(rng.random(14), 12)
    shuffled = rng.permutation(len(rows))
    apart = calibrate([rows[i] for i in shuffled], outcome[shuffled], calibrated_on="x", penalty=0.01)
    together = calibrate(rows, outcome, calibrated_on="x", penalty=0.01, groups=list(range(14)) * 12)
    assert apart.spearman > 0.4
    assert together.spearman < 0.1
    assert together.mae > 1.3 * apart.mae


def test_too_few_or_broken_cases_are_refused(rng: np.random.Generator) -> None:
    rows, outcome = made_up(rng, 19)
    with pytest.raises(InputError, match="at least 20"):
        calibrate(rows, outcome, calibrated_on="x")
    rows, outcome = made_up(rng, 40)
    rows[3]["entropy_rim"] = math.nan
    with pytest.raises(InputError, match="finite"):
        calibrate(rows, outcome, calibrated_on="x")


def test_a_calibration_survives_its_file(tmp_path: Path, rng: np.random.Generator) -> None:
    fitted = calibrate(*made_up(rng), calibrated_on="made-up cases")
    path = tmp_path / "quality.json"
    path.write_text(calibration_json(fitted))
    again = read_calibration(path)
    table = rng.random((50, len(FEATURES)))
    assert np.allclose(again.predict(table), fitted.predict(table), atol=1e-4)
    assert (again.features, again.calibrated_on, again.cases) == (FEATURES, "made-up cases", 300)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"features": ["x"]}'])
def test_a_damaged_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "quality.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"quality\.json"):
        read_calibration(path)


def test_unknown_measures_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    raw = json.loads(calibration_json(calibrate(*made_up(rng), calibrated_on="x")))
    raw["features"][0] = "astrology"
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(SettingsError, match="astrology"):
        read_calibration(path)


# ---------------------------------------------------------------- score


@pytest.fixture
def fitted(rng: np.random.Generator) -> Calibration:
    return calibrate(*made_up(rng), calibrated_on="made-up cases")


def test_a_score_tells_what_it_rests_on(fitted: Calibration) -> None:
    soft = probabilities(labels(), blur=1.0)
    brain = np.ones(soft.shape[1:], dtype=bool)
    brain[:8] = False
    disagreement = np.full(brain.shape, 0.25, dtype=np.float32)
    score = assess(soft, AFFINE, brain=brain, disagreement=disagreement, input_warnings=2, calibration=fitted)
    assert 0 <= score.low <= score.value <= score.high <= 1
    assert score.rests_on == {name: measure(soft, AFFINE)[name] for name in FEATURES}
    tumour = soft.argmax(axis=0) != 0
    assert score.beside["outside_brain_share"] == pytest.approx(tumour[:8].sum() / tumour.sum())
    assert score.beside["teacher_disagreement"] == pytest.approx(0.25)
    assert score.beside["input_warnings"] == 2
    told = json.loads(json.dumps(score.as_dict()))
    assert told["calibrated_on"] == "made-up cases" and told["coverage"] == COVERAGE
    assert tuple(assess(soft, AFFINE, calibration=fitted).beside) == SHAPE


def test_no_tumour_leaves_the_score_open(fitted: Calibration) -> None:
    score = assess(probabilities(np.zeros((8, 8, 8), dtype=np.uint8)), AFFINE, calibration=fitted)
    assert (score.low, score.high) == (0, 1)


def test_nothing_is_extrapolated(fitted: Calibration) -> None:
    ends = fitted.predict(np.array([fitted.low, fitted.high]))
    beyond = fitted.predict(np.array([np.array(fitted.low) - 100, np.array(fitted.high) + 100]))
    assert np.array_equal(ends, beyond)
    sure = replace(fitted, intercept=5.0)
    assert sure.predict(np.array([fitted.mean]))[0] == 1


def test_maps_of_another_shape_are_refused(fitted: Calibration) -> None:
    soft = probabilities(labels())
    with pytest.raises(InputError, match="outside_brain_share"):
        assess(soft, AFFINE, brain=np.ones((3, 3, 3), dtype=bool), calibration=fitted)
    with pytest.raises(InputError, match="probabilities"):
        assess(soft[:3], AFFINE, calibration=fitted)


def test_the_shipped_calibration_comes_from_phantoms_alone() -> None:
    shipped = shipped_calibration()
    assert "phantoms" in shipped.calibrated_on and "no patient" in shipped.calibrated_on
    assert shipped.cases >= 300
    assert shipped.spearman > 0.6
    assert shipped.residuals[0] < 0 < shipped.residuals[1]


def test_the_shipped_score_falls_as_a_prediction_blurs() -> None:
    values = [assess(probabilities(labels(), blur), AFFINE).value for blur in (0.5, 1.5, 3.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 0.1
