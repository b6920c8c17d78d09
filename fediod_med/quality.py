"""A quality score per case: the mean Dice that a segmentation probably has, told from the model's own probabilities.

No reference is needed. A ridge regression maps a few measures of the probabilities to the Dice of TC, WT and ET
together. It is fitted on phantoms only, clean and deliberately spoilt, by `benchmarks/quality.py`; coefficients, the
cross-validated error and what they were fitted on lie in `weights/quality.json`. The strongest measures are the soft
Dice confidences (Borges et al. 2024, arXiv 2402.10665): the Dice to expect if the probabilities were true.

A model that is wrong and sure of it deceives every score of this kind, this one included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import nnls
from scipy.stats import spearmanr

from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import REGION_CLASSES, REGIONS, region_masks
from fediod_med.metrics import bounding_box
from fediod_med.uncertainty import class_entropy, require_probabilities

FEATURES = (*(f"confidence_{region}" for region in REGIONS), "entropy_inside", "entropy_rim", "uncertain_share")
"""What the score rests on; `measure` says what each is."""
SHAPE = ("volume_ml", "components", "largest_share")
"""Measured too, but only shown beside the score: phantoms and patients differ in shape whatever the quality."""
COVERAGE = 0.8
"""Share of cases like those of the calibration whose Dice lies between `low` and `high`."""

_RIM_MM = 4.0
_UNCERTAIN_NATS = 0.35  # half of ln 2: the best class has about 0.89
_SURE = 0.99  # of background; its entropy is at most 0.07 nats
_SMOOTH_ML = 0.1  # below this a region counts as about absent
_SMALLEST_ML = 0.1


@dataclass(frozen=True)
class QualityScore:
    """The Dice that a case probably has.

    Attributes:
        value: predicted mean Dice over TC, WT and ET, 0 to 1.
        low: lower end of the interval that holds `COVERAGE` of cases like those of the calibration; 0 when no tumour
            was predicted, which is a perfect answer or none at all.
        high: upper end; 1 when no tumour was predicted.
        rests_on: the measures behind the value (`FEATURES`).
        beside: measures that are shown but do not move the value: the tumour's shape (`SHAPE`) and, where known, its
            share outside the brain, the mean disagreement of teachers in it (nats) and the number of input warnings.
        calibrated_on: what the regression was fitted on, in words.
    """

    value: float
    low: float
    high: float
    rests_on: Mapping[str, float]
    beside: Mapping[str, float]
    calibrated_on: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "meaning": "predicted mean Dice of TC, WT and ET; an estimate, not a measurement",
            "value": round(self.value, 3),
            "low": round(self.low, 3),
            "high": round(self.high, 3),
            "coverage": COVERAGE,
            "rests_on": {name: round(value, 4) for name, value in self.rests_on.items()},
            "beside": {name: round(value, 4) for name, value in self.beside.items()},
            "calibrated_on": self.calibrated_on,
        }


@dataclass(frozen=True)
class Calibration:
    """A fitted regression of mean Dice on `features`.

    Attributes:
        features: names, in the order of the numbers below.
        low: smallest value of each in the calibration; smaller ones are read as this, so nothing is extrapolated.
        high: largest value, likewise.
        mean: of each, for scaling.
        scale: standard deviation of each.
        weights: of the scaled measures.
        intercept: mean Dice of the calibration.
        residuals: the quantiles of (Dice - value) out of fold that bound the interval.
        calibrated_on: in words.
        cases: how many.
        spearman: rank correlation of value and Dice, out of fold.
        mae: mean absolute error, out of fold.
    """

    features: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    residuals: tuple[float, float]
    calibrated_on: str
    cases: int
    spearman: float
    mae: float

    def predict(self, table: np.ndarray) -> NDArray[np.float64]:
        """Dice `(N,)` from measures `(N, features)`, clipped to 0..1."""
        inside = np.clip(np.asarray(table, dtype=np.float64), self.low, self.high)
        scaled = (inside - np.asarray(self.mean)) / np.asarray(self.scale)
        return np.asarray(np.clip(scaled @ np.asarray(self.weights) + self.intercept, 0, 1), dtype=np.float64)


def measure(probabilities: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    """What the score rests on (`FEATURES`) and the tumour's shape (`SHAPE`), measured on one prediction.

    - `confidence_TC`, `_WT`, `_ET`: soft Dice confidence of the region, `2 sum(p y) / (sum(p) + sum(y))` with p its
      probability and y whether it was predicted, 0.1 ml added on both sides of the fraction.
    - `entropy_inside`, `entropy_rim`: mean entropy (nats) in the predicted tumour, and outside it within 4 mm.
    - `uncertain_share`: logarithm of 1 + volume of entropy above 0.35 nats over the tumour's volume plus 0.1 ml.
    - `volume_ml` of the tumour, `components` of it with at least 0.1 ml, `largest_share`: the largest one's part.

    Args:
        probabilities: `(4, X, Y, Z)` on any grid: the working grid's are the cheapest.
        affine: voxel to world matrix of that grid, mm.

    Raises:
        InputError: these are no class probabilities.
    """
    require_probabilities(probabilities, "quality")
    spacing = voxel_sizes(np.asarray(affine, dtype=np.float64))
    voxel_ml = float(np.prod(spacing)) / 1000
    mass_ml = [float(channel.sum(dtype=np.float64)) * voxel_ml for channel in probabilities]
    # Beyond this box nothing is predicted, near a tumour or uncertain; only the sums above need the rest.
    box = bounding_box(probabilities[0] < _SURE, margin=int(np.ceil(_RIM_MM / spacing.min())) + 1)
    near = probabilities[(slice(None), *(box or (slice(1),) * 3))].astype(np.float32)
    entropy = class_entropy(near)
    masks = region_masks(near.argmax(axis=0))
    found = {f"confidence_{region}": _confidence(near, mass_ml, masks[region], region, voxel_ml) for region in REGIONS}
    whole = masks["WT"]
    whole_ml = float(np.count_nonzero(whole)) * voxel_ml
    found |= {"entropy_inside": 0.0, "entropy_rim": 0.0}
    if whole.any():
        distance = ndimage.distance_transform_edt(~whole, sampling=spacing)
        rim = (distance > 0) & (distance <= _RIM_MM)
        found["entropy_inside"] = float(entropy[whole].mean())
        found["entropy_rim"] = float(entropy[rim].mean()) if rim.any() else 0.0
    uncertain_ml = float(np.count_nonzero(entropy > _UNCERTAIN_NATS)) * voxel_ml
    found["uncertain_share"] = float(np.log1p(uncertain_ml / (whole_ml + _SMOOTH_ML)))
    found["volume_ml"] = whole_ml
    sizes = _component_sizes(whole) * voxel_ml
    found["components"] = float(np.count_nonzero(sizes >= _SMALLEST_ML))
    found["largest_share"] = float(sizes.max() / whole_ml) if len(sizes) else 0.0
    return found


def assess(
    probabilities: np.ndarray,
    affine: np.ndarray,
    *,
    brain: np.ndarray | None = None,
    disagreement: np.ndarray | None = None,
    input_warnings: int | None = None,
    calibration: Calibration | None = None,
) -> QualityScore:
    """Score one prediction.

    Args:
        probabilities: `(4, X, Y, Z)`, softmax over background, NCR, ED, ET; on the working or the native grid.
        affine: voxel to world matrix of that grid, mm.
        brain: `(X, Y, Z)` mask of the brain on that grid.
        disagreement: `(X, Y, Z)` of `uncertainty.teacher_disagreement` on that grid.
        input_warnings: warnings found about the input.
        calibration: the one that ships with the package when omitted.

    Raises:
        InputError: no class probabilities, or a map of another shape.
        SettingsError: the shipped calibration is missing or unusable.
    """
    fitted = calibration or shipped_calibration()
    measures = measure(probabilities, affine)
    tumour = probabilities.argmax(axis=0) != 0
    beside = {name: measures[name] for name in SHAPE}
    for name, values in (("outside_brain_share", brain), ("teacher_disagreement", disagreement)):
        if values is None:
            continue
        if values.shape != tumour.shape:
            raise InputError(f"quality: expected {name} from a map of shape {tumour.shape}, found {values.shape}")
        shown = values == 0 if name == "outside_brain_share" else values
        beside[name] = float(shown[tumour].mean()) if tumour.any() else 0.0
    if input_warnings is not None:
        beside["input_warnings"] = float(input_warnings)
    value = float(fitted.predict(np.array([[measures[name] for name in fitted.features]]))[0])
    low, high = (min(max(value + residual, 0.0), 1.0) for residual in fitted.residuals)
    if not tumour.any():  # right or wrong altogether, and no case of the calibration was like that
        low, high = 0.0, 1.0
    return QualityScore(
        value=value,
        low=min(value, low),
        high=max(value, high),
        rests_on={name: measures[name] for name in fitted.features},
        beside=beside,
        calibrated_on=fitted.calibrated_on,
    )


# ---------------------------------------------------------------- calibration


def calibrate(
    rows: Sequence[Mapping[str, float]],
    mean_dice: Sequence[float],
    *,
    calibrated_on: str,
    groups: Sequence[int] | None = None,
    folds: int = 5,
    penalty: float = 3.0,
    features: Sequence[str] = FEATURES,
) -> Calibration:
    """Fit the regression and measure it by cross-validation.

    Args:
        rows: measures of each case (`measure`).
        mean_dice: what each case really scored, 0 to 1.
        calibrated_on: in words.
        groups: cases of one group (one phantom, spoilt in several ways) stay in one fold; each its own when omitted.
        folds: of the cross-validation; groups are dealt out in turn.
        penalty: of the ridge, in cases: weights shrink as if so many cases had an average outcome.
        features: names to use.

    Raises:
        InputError: too few cases, or values that are not finite.
    """
    table = np.array([[row[name] for name in features] for row in rows], dtype=np.float64)
    outcome = np.asarray(mean_dice, dtype=np.float64)
    if len(table) != len(outcome) or len(table) < 4 * folds or not np.isfinite(table).all():
        raise InputError(
            f"quality calibration: expected at least {4 * folds} cases with finite measures and one Dice each, found "
            f"{len(table)} and {len(outcome)}"
        )
    group = np.arange(len(table)) if groups is None else np.unique(groups, return_inverse=True)[1]
    out_of_fold = np.empty(len(table))
    for fold in range(folds):
        held = group % folds == fold
        out_of_fold[held] = _fit(table[~held], outcome[~held], penalty, features).predict(table[held])
    tail = (1 - COVERAGE) / 2
    residuals = np.quantile(outcome - out_of_fold, [tail, 1 - tail])
    fitted = _fit(table, outcome, penalty, features)
    return Calibration(
        **{
            **asdict(fitted),
            "residuals": (float(residuals[0]), float(residuals[1])),
            "calibrated_on": calibrated_on,
            "spearman": float(spearmanr(out_of_fold, outcome).statistic),
            "mae": float(np.abs(out_of_fold - outcome).mean()),
        }
    )


def shipped_calibration() -> Calibration:
    """The calibration in the package; `SettingsError` when it is missing or damaged."""
    return read_calibration(Path(__file__).resolve().parent / "weights" / "quality.json")


def read_calibration(path: Path) -> Calibration:
    """Read a calibration written by `calibration_json`; `SettingsError` when it cannot be used."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw.pop("notice", None)
        lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
        fitted = Calibration(**{**raw, **lists})
        fitted.predict(np.zeros((1, len(fitted.features))))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"{path}: expected a quality calibration, found a defect ({error}); reinstall fediod-med"
        ) from error
    unknown = sorted(set(fitted.features) - set(FEATURES))
    if unknown:
        raise SettingsError(f"{path}: expected measures {', '.join(FEATURES)}, found {', '.join(unknown)}")
    return fitted


def calibration_json(fitted: Calibration) -> str:
    """A calibration as a JSON document; numbers carry six digits."""
    rounded = {
        name: [round(v, 6) if isinstance(v, float) else v for v in value]
        if isinstance(value, tuple)
        else round(value, 6)
        if isinstance(value, float)
        else value
        for name, value in asdict(fitted).items()
    }
    return json.dumps(rounded, indent=1) + "\n"


def _fit(table: np.ndarray, outcome: np.ndarray, penalty: float, features: Sequence[str]) -> Calibration:
    """Ridge regression on scaled measures (Hoerl & Kennard 1970); the intercept is not penalised.

    Confidence may only raise the value and entropy only lower it: measures that tell nearly the same must not cancel
    each other with opposite signs.
    """
    mean, scale = table.mean(axis=0), table.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    scaled = (table - mean) / scale
    signs = np.array([1.0 if name.startswith("confidence") else -1.0 for name in features])
    # The penalty as further rows turns the ridge into plain least squares with non-negative weights.
    rows = np.vstack([scaled * signs, math.sqrt(penalty) * np.eye(len(signs))])
    weights = signs * nnls(rows, np.concatenate([outcome - outcome.mean(), np.zeros(len(signs))]))[0]
    return Calibration(
        features=tuple(features),
        low=tuple(table.min(axis=0).tolist()),
        high=tuple(table.max(axis=0).tolist()),
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(weights.tolist()),
        intercept=float(outcome.mean()),
        residuals=(0.0, 0.0),
        calibrated_on="",
        cases=len(table),
        spearman=float("nan"),
        mae=float("nan"),
    )


def _confidence(near: np.ndarray, mass_ml: Sequence[float], mask: np.ndarray, region: str, voxel_ml: float) -> float:
    """Soft Dice confidence of one region; `near` holds all of its mask, `mass_ml` the summed probability by class."""
    members = REGION_CLASSES[region]
    overlap = sum(float(np.sum(near[label], where=mask, dtype=np.float64)) for label in members) * voxel_ml
    total = sum(mass_ml[label] for label in members) + float(np.count_nonzero(mask)) * voxel_ml
    return (2 * overlap + _SMOOTH_ML) / (total + _SMOOTH_ML)


def _component_sizes(mask: np.ndarray) -> NDArray[np.float64]:
    """Voxels of each 26-connected component."""
    labelled, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    return np.bincount(labelled.ravel(), minlength=count + 1)[1:].astype(np.float64)
