"""Scores label maps against references: one row per patient and region, then means, intervals and paired differences.

Means run over patients, the absent-region policy is that of `fediod_med.metrics`, and intervals come from resampling
patients with replacement (percentile bootstrap, Efron 1979, Ann Stat 7(1)): with few patients they are wide and a
little too narrow still, so read them as a lower bound on the uncertainty.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from fediod_med.data.layouts import Subject, find_subjects
from fediod_med.data.nifti.reading import read_label
from fediod_med.durable import write_atomically
from fediod_med.errors import GeometryError, InputError, SettingsError
from fediod_med.labels import REGIONS, SEQUENCES, LabelScheme
from fediod_med.lesionwise import LESIONWISE_POLICY, LesionwiseScore, lesionwise_scores
from fediod_med.metrics import ABSENT_REGION_POLICY, region_scores
from fediod_med.resources import NOT_FOR_CLINICAL_USE

logger = logging.getLogger(__name__)

RESAMPLES = 2000
LEVEL = 0.95
_LESION_COLUMNS = ("lesion_dice", "lesion_hd95_mm", "n_tp", "n_fp", "n_fn")
_MASK_NAME = re.compile(r"(?:(?P<id>.+?)[_-])??(?P<suffix>d?seg)\.nii(?:\.gz)?", re.IGNORECASE)
_NIFTI_NAME = re.compile(r"(?P<id>[^.].*)\.nii(?:\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class SubjectScore:
    """One region of one patient.

    Attributes:
        subject_id: the case.
        site: its hospital; empty when unknown.
        region: TC, WT or ET.
        dice: 0 to 1.
        hd95: 95 % Hausdorff distance in mm.
        reference_empty: the expert found nothing of this region.
        lesionwise: scores lesion by lesion, where they were asked for.
    """

    subject_id: str
    site: str
    region: str
    dice: float
    hd95: float
    reference_empty: bool
    lesionwise: LesionwiseScore | None = None


@dataclass(frozen=True)
class FolderEvaluation:
    """Scores of a folder of predictions, and everything that could not be scored.

    Attributes:
        scores: three rows per scored patient.
        missing_predictions: ids with a reference but no prediction.
        missing_references: ids with a prediction but no reference.
        failures: what went wrong, by id (geometry, label values, unreadable file).
    """

    scores: tuple[SubjectScore, ...]
    missing_predictions: tuple[str, ...] = ()
    missing_references: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every reference has been scored and every prediction used."""
        return not (self.missing_predictions or self.missing_references or self.failures)

    def findings(self) -> list[str]:
        """One sentence per case that was not scored."""
        return [
            *(f"{case}: reference without prediction, not scored" for case in self.missing_predictions),
            *(f"{case}: prediction without reference, not scored" for case in self.missing_references),
            *(f"{case}: {problem}" for case, problem in self.failures.items()),
        ]


def score_classes(
    subject_id: str,
    pred: np.ndarray,
    ref: np.ndarray,
    *,
    spacing: Sequence[float],
    site: str = "",
    lesionwise: bool = False,
) -> list[SubjectScore]:
    """Score one class map `(X, Y, Z)` against another on the same grid; `spacing` in mm; one row per region."""
    lesions = lesionwise_scores(pred, ref, spacing) if lesionwise else {}
    return [
        SubjectScore(
            subject_id, site, region, score["dice"], score["hd95"], score["reference_empty"], lesions.get(region)
        )
        for region, score in region_scores(pred, ref, spacing).items()
    ]


def score_files(
    pred_path: Path,
    ref_path: Path,
    scheme: LabelScheme,
    *,
    pred_scheme: LabelScheme | None = None,
    subject_id: str | None = None,
    site: str = "",
    lesionwise: bool = True,
) -> list[SubjectScore]:
    """Score one NIfTI label map against another.

    Args:
        pred_path: the prediction.
        ref_path: the reference.
        scheme: label values of the reference.
        pred_scheme: label values of the prediction; those of the reference when omitted.
        subject_id: name in the rows; taken from the prediction's file name when omitted.
        site: hospital in the rows.
        lesionwise: also score lesion by lesion.

    Raises:
        GeometryError: shape or affine differ.
        LabelError: a value outside the scheme.
        InputError: a file cannot be read.
    """
    case = subject_id or prediction_id(pred_path)
    grid = dict.fromkeys(SEQUENCES, ref_path)  # the reference is the grid that the prediction must lie on
    ref = read_label(Subject(case, grid, label=ref_path), scheme)
    pred = read_label(Subject(case, grid, label=pred_path), pred_scheme or scheme)
    return score_classes(case, pred, ref, spacing=_spacing(ref_path), site=site, lesionwise=lesionwise)


def evaluate_folder(
    pred_dir: Path,
    ref: Path,
    scheme: LabelScheme,
    *,
    layout: str | None = None,
    pred_scheme: LabelScheme | None = None,
    sites: Mapping[str, str] | None = None,
    lesionwise: bool = True,
    on_case: Callable[[str], None] | None = None,
) -> FolderEvaluation:
    """Score every prediction of a folder; a case that fails is recorded and does not stop the others.

    Args:
        pred_dir: holds `<id>_seg.nii.gz` (or `<id>.nii.gz`).
        ref: folder with the references: same-name files, `<id>-seg.nii.gz`, or case folders at any depth.
        scheme: label values of the references.
        layout: one of `data.layouts.LAYOUTS`; needed for `msd`, whose label maps are named like the images.
        pred_scheme: label values of the predictions; those of the references when omitted.
        sites: hospital by subject id.
        lesionwise: also score lesion by lesion.
        on_case: called with each id before it is scored.

    Raises:
        InputError: no prediction, no reference, or not one id in common.
    """
    predictions, references = _predictions(pred_dir), _references(ref, layout)
    shared = sorted(predictions.keys() & references.keys())
    if not shared:
        raise InputError(
            f"{pred_dir}: expected predictions of the cases in {ref}, found no id in common; "
            f"predictions {_some(predictions)}; references {_some(references)}; give --layout when the names differ"
        )
    scores: list[SubjectScore] = []
    failures: dict[str, str] = {}
    for case in shared:
        if on_case is not None:
            on_case(case)
        try:
            scores += score_files(
                predictions[case],
                references[case],
                scheme,
                pred_scheme=pred_scheme,
                subject_id=case,
                site=(sites or {}).get(case, ""),
                lesionwise=lesionwise,
            )
        except InputError as error:
            failures[case] = str(error)
            logger.warning("%s: not scored: %s", case, error)
    # A reference reached under two names (file and folder) counts once.
    used = {references[case] for case in shared}
    lacking = {path: case for case, path in reversed(references.items()) if path not in used}
    return FolderEvaluation(
        scores=tuple(scores),
        missing_predictions=tuple(sorted(lacking.values())),
        missing_references=tuple(sorted(predictions.keys() - references.keys())),
        failures=failures,
    )


def evaluate_predictor(
    predict: Callable[[Subject], np.ndarray],
    cases: Sequence[tuple[str, Subject, LabelScheme]],
    *,
    on_case: Callable[[str], None] | None = None,
) -> list[SubjectScore]:
    """Score a model on labelled patients, on their native grids.

    Args:
        predict: scan to native class map `(X, Y, Z)`.
        cases: hospital, patient and the hospital's label scheme.
        on_case: called with each subject id before it is scored.

    Raises:
        InputError: a patient has no label map, or (`GeometryError`) the prediction has another shape.
    """
    scores: list[SubjectScore] = []
    for site, subject, scheme in cases:
        if on_case is not None:
            on_case(subject.subject_id)
        if subject.label is None:
            raise InputError(f"{subject.subject_id}: expected a label map to score against, found none")
        ref = read_label(subject, scheme)
        pred = predict(subject)
        if pred.shape != ref.shape:
            raise GeometryError(
                f"{subject.subject_id}: expected a prediction of shape {ref.shape} as in {subject.label}, "
                f"found {pred.shape}"
            )
        spacing = _spacing(subject.images[SEQUENCES[0]])
        scores += score_classes(subject.subject_id, pred, ref, spacing=spacing, site=site)
    return scores


def summarise(scores: Sequence[SubjectScore], *, seed: int = 0) -> dict[str, Any]:
    """One row of a comparison: plain numbers under stable keys, ready for JSON.

    Args:
        scores: three rows per patient, as returned above.
        seed: of the bootstrap.

    Returns:
        `TC`, `WT`, `ET` and `mean` (mean Dice over patients; `mean` over the three regions), then `patients`,
        `hd95_mm`, `dice_nonempty` (patients whose reference has the region; None when there is none),
        `empty_references`, `ci95` and `hd95_ci95` (bootstrap intervals), `sites` (the same Dice means per hospital),
        `worst_site`, `worst_site_mean` and `bootstrap` (resamples, seed, level); `lesionwise` (means of `dice` and
        `hd95_mm`, `dice_ci95`, sums `n_tp`, `n_fp`, `n_fn`) when every row has lesion-wise scores.

    Raises:
        InputError: no scores, or a patient without exactly one row per region.
    """
    keys, dice = score_matrix(scores, "dice")
    _, hd95 = score_matrix(scores, "hd95")
    empty = score_matrix(scores, "reference_empty")[1].astype(bool)
    columns = (*REGIONS, "mean")
    dice_ci, hd95_ci = bootstrap_interval(_with_mean(dice), seed=seed), bootstrap_interval(_with_mean(hd95), seed=seed)
    nonempty = [float(dice[~empty[:, j], j].mean()) if (~empty[:, j]).any() else None for j in range(len(REGIONS))]
    counted = [value for value in nonempty if value is not None]
    sites: dict[str, dict[str, Any]] = {}
    for site in sorted({site for site, _ in keys}):
        rows = [i for i, (owner, _) in enumerate(keys) if owner == site]
        sites[site] = {**_named(_with_mean(dice[rows]).mean(axis=0)), "patients": len(rows)}
    worst = min(sites, key=lambda site: float(sites[site]["mean"]))
    return {
        **_named(_with_mean(dice).mean(axis=0)),
        "patients": len(keys),
        "hd95_mm": _named(_with_mean(hd95).mean(axis=0)),
        "dice_nonempty": dict(zip(columns, [*nonempty, float(np.mean(counted)) if counted else None], strict=True)),
        "empty_references": {region: int(empty[:, j].sum()) for j, region in enumerate(REGIONS)},
        "ci95": {name: list(map(float, pair)) for name, pair in zip(columns, dice_ci, strict=True)},
        "hd95_ci95": {name: list(map(float, pair)) for name, pair in zip(columns, hd95_ci, strict=True)},
        "sites": sites,
        "worst_site": worst,
        "worst_site_mean": sites[worst]["mean"],
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "level": LEVEL, "unit": "patient"},
        **_lesionwise_summary(scores, seed=seed),
    }


def paired_difference(
    scores: Sequence[SubjectScore], baseline: Sequence[SubjectScore], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Difference in Dice between two models on the same patients.

    Args:
        scores: rows of one model.
        baseline: rows of the other, same patients in any order.
        seed: of the bootstrap and, above 13 patients, of the random sign flips.

    Returns:
        For TC, WT, ET and mean: `difference` (scores minus baseline), `ci95` (paired bootstrap over patients),
        `p_value` (two-sided sign-flip permutation test on the patients' differences) and `wins` (patients above,
        equal, below).

    Raises:
        InputError: the patients differ.
    """
    (keys, ours), (other_keys, theirs) = score_matrix(scores, "dice"), score_matrix(baseline, "dice")
    if keys != other_keys:
        odd = sorted(set(keys) ^ set(other_keys))
        raise InputError(f"paired difference: expected the same patients twice, found only once {_some(map(str, odd))}")
    delta = _with_mean(ours) - _with_mean(theirs)
    intervals = bootstrap_interval(delta, seed=seed)
    result: dict[str, dict[str, Any]] = {}
    for j, name in enumerate((*REGIONS, "mean")):
        column = delta[:, j]
        result[name] = {
            "difference": float(column.mean()),
            "ci95": [float(bound) for bound in intervals[j]],
            "p_value": _sign_flip_p(column, seed=seed),
            "wins": [int((column > 0).sum()), int((column == 0).sum()), int((column < 0).sum())],
            "patients": len(column),
        }
    return result


def bootstrap_interval(
    values: np.ndarray, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> np.ndarray:
    """Percentile bootstrap interval of column means, whole rows (patients) drawn with replacement.

    Args:
        values: `(patients, columns)`.
        seed: of the draws; equal seeds and patient counts draw the same patients, so rows stay paired.
        resamples: number of draws.
        level: coverage aimed at.

    Returns:
        `(columns, 2)`, lower and upper bound.
    """
    draws = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    tail = 100 * (1 - level) / 2
    bounds: np.ndarray = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail], axis=0).T
    return bounds


def score_matrix(scores: Sequence[SubjectScore], field: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Scores as a matrix.

    Args:
        scores: three rows per patient, any order.
        field: `dice`, `hd95` or `reference_empty`; `lesionwise.dice` and so on when every row has those scores.

    Returns:
        Sorted `(site, subject_id)` keys and an array `(patients, 3)` float64, columns TC, WT, ET.

    Raises:
        InputError: no rows, or a patient without exactly one row per region.
    """
    if not scores:
        raise InputError("scores: expected at least one patient, found none")
    counts = Counter((s.site, s.subject_id, s.region) for s in scores)
    keys = sorted({(s.site, s.subject_id) for s in scores})
    bad = [f"{case} ({region})" for site, case in keys for region in REGIONS if counts[site, case, region] != 1]
    if bad or len(counts) != len(keys) * len(REGIONS):
        raise InputError(
            f"scores: expected one row per patient and region ({', '.join(REGIONS)}), not so for {_some(bad)}"
        )
    value = {(s.site, s.subject_id, s.region): float(attrgetter(field)(s)) for s in scores}
    return keys, np.array([[value[(*key, region)] for region in REGIONS] for key in keys])


def write_scores(
    path: Path,
    scores: Sequence[SubjectScore],
    *,
    privacy: Mapping[str, Any] | str | None = None,
    findings: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write the rows as CSV and their summary, with policy, notice and privacy, as JSON beside it.

    Args:
        path: of the CSV; the JSON takes its name with `.json`.
        scores: three rows per patient.
        privacy: per-site terms or banner of the model that was scored, passed through.
        findings: cases that were not scored, one sentence each.
        seed: of the bootstrap.

    Returns:
        Paths of the CSV and the JSON.

    Raises:
        SettingsError: `path` ends in `.json`, where the summary would go.
    """
    if path.suffix == ".json":
        raise SettingsError(
            f"{path}: expected a CSV name, found .json, which is where the summary goes; use {path.stem}.csv"
        )
    write_atomically(path, lambda temporary: _write_csv(temporary, scores))
    content = {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy": privacy,
        "absent_region_policy": ABSENT_REGION_POLICY,
        **({"lesionwise_policy": LESIONWISE_POLICY} if any(s.lesionwise for s in scores) else {}),
        "summary": summarise(scores, seed=seed) if scores else None,
        "findings": list(findings),
    }
    summary = path.with_suffix(".json")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(summary, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path, summary


def read_scores(path: Path) -> list[SubjectScore]:
    """Read what `write_scores` wrote; `InputError` when a column is missing or a number is none."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return [
                SubjectScore(
                    row["subject_id"],
                    row["site"],
                    row["region"],
                    float(row["dice"]),
                    float(row["hd95_mm"]),
                    row["reference_empty"] == "true",
                    _read_lesionwise(row),
                )
                for row in csv.DictReader(stream)
            ]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: expected scores written by `fediod evaluate`, found a defect ({error!r})") from error


def prediction_id(path: Path) -> str:
    """Case id of a prediction file: its name without `_seg` and `.nii.gz`."""
    match = _MASK_NAME.fullmatch(path.name) or _NIFTI_NAME.fullmatch(path.name)
    return (match["id"] if match else None) or path.parent.name


def _write_csv(path: Path, scores: Sequence[SubjectScore]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        extra = _LESION_COLUMNS if any(s.lesionwise for s in scores) else ()
        writer.writerow(["subject_id", "site", "region", "dice", "hd95_mm", "reference_empty", *extra, "notice"])
        for s in scores:
            empty = str(s.reference_empty).lower()
            # repr keeps every digit, so that reading gives the same numbers
            lesions = [repr(value) for value in astuple(s.lesionwise)] if s.lesionwise else [""] * len(extra)
            row = [s.subject_id, s.site, s.region, repr(s.dice), repr(s.hd95), empty, *lesions, NOT_FOR_CLINICAL_USE]
            writer.writerow(row)


def _read_lesionwise(row: Mapping[str, str]) -> LesionwiseScore | None:
    """Lesion-wise scores of a row, or none where its file has no such columns or they are empty."""
    values = [row.get(column) or "" for column in _LESION_COLUMNS]
    if not any(values):
        return None
    return LesionwiseScore(float(values[0]), float(values[1]), *(int(value) for value in values[2:]))


def _lesionwise_summary(scores: Sequence[SubjectScore], *, seed: int) -> dict[str, Any]:
    """The entry `lesionwise` of `summarise`; nothing unless every row has lesion-wise scores."""
    if not all(s.lesionwise for s in scores):
        return {}
    dice, hd95 = (_with_mean(score_matrix(scores, f"lesionwise.{name}")[1]) for name in ("dice", "hd95"))
    intervals = bootstrap_interval(dice, seed=seed)
    counts = {
        name: dict(
            zip(REGIONS, score_matrix(scores, f"lesionwise.{name}")[1].sum(axis=0).astype(int).tolist(), strict=True)
        )
        for name in ("n_tp", "n_fp", "n_fn")
    }
    return {
        "lesionwise": {
            "dice": _named(dice.mean(axis=0)),
            "hd95_mm": _named(hd95.mean(axis=0)),
            "dice_ci95": {
                name: list(map(float, pair)) for name, pair in zip((*REGIONS, "mean"), intervals, strict=True)
            },
            **counts,
        }
    }


def _spacing(path: Path) -> list[float]:
    """Voxel sizes in mm from the header of a NIfTI file."""
    image: Any = nib.load(path)
    return [float(size) for size in voxel_sizes(image.affine)]


def _predictions(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of predictions, found none; check the path")
    files = sorted(f for f in folder.iterdir() if f.is_file() and _NIFTI_NAME.fullmatch(f.name))
    found: dict[str, Path] = {}
    for path in files:
        case = prediction_id(path)
        if case in found:
            raise InputError(f"{folder}: two predictions for {case}: {found[case].name} and {path.name}; remove one")
        found[case] = path
    if not found:
        raise InputError(f"{folder}: expected predictions named <id>_seg.nii.gz, found none")
    return found


def _references(root: Path, layout: str | None) -> dict[str, Path]:
    """Reference file by id; by file name first, then by folder name where that is unique."""
    if layout is not None:
        subjects = find_subjects(root, layout, require_label=True)
        return {s.subject_id: s.label for s in subjects if s.label is not None}
    if not root.is_dir():
        raise InputError(f"{root}: expected a folder of references, found none; check the path")
    masks = [(path, match["id"]) for path in sorted(root.rglob("*")) if (match := _MASK_NAME.fullmatch(path.name))]
    if not masks:  # a plain folder of label maps
        masks = [(path, match["id"]) for path in sorted(root.iterdir()) if (match := _NIFTI_NAME.fullmatch(path.name))]
    found: dict[str, Path] = {}
    for path, case in masks:
        name = case or path.parent.name
        if name in found:
            raise InputError(
                f"{root}: two references for {name}: {found[name]} and {path}; remove one or give --layout"
            )
        found[name] = path
    if not found:
        raise InputError(f"{root}: expected references named <id>_seg.nii.gz or case folders, found none")
    parents = Counter(path.parent for path, _ in masks)
    for path, _ in masks:
        if parents[path.parent] == 1 and path.parent != root:
            found.setdefault(path.parent.name, path)
    return found


def _with_mean(matrix: np.ndarray) -> np.ndarray:
    return np.hstack([matrix, matrix.mean(axis=1, keepdims=True)])


def _named(values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip((*REGIONS, "mean"), values, strict=True)}


def _sign_flip_p(differences: np.ndarray, *, seed: int) -> float:
    """Two-sided p-value of a zero mean under random signs; all signs when there are at most 2^13, else 9999 draws."""
    n = len(differences)
    if n <= 13:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        drawn = np.random.default_rng(seed).choice([-1.0, 1.0], size=(9999, n))
        signs = np.vstack([np.ones(n), drawn])  # the observed signs count as one draw (Phipson & Smyth 2010)
    means = np.abs((signs * differences).mean(axis=1))
    return float((means >= abs(differences.mean()) - 1e-12).mean())


def _some(names: Any, limit: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) + more) or "none"
