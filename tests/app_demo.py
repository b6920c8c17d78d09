"""A small run and segmented cases of made-up volumes, as the review app finds them on disk; no patient anywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from fediod_med.labels import SEQUENCES

SUFFIX = {"T1c": "t1c", "T1": "t1n", "T2": "t2w", "FLAIR": "t2f"}
SHAPE = (20, 24, 16)
AFFINE = np.diag([-4.0, -4.0, 5.0, 1.0])
CASES = ("case-a", "case-b", "case-c")


def write_app_demo(root: Path, *, cases: tuple[str, ...] = CASES) -> Path:
    """`root/run`, a run of two hospitals, and `root/model` and `root/other`, two models' answers to `root/unseen`."""
    _run(root / "run")
    for number, case in enumerate(cases):
        classes = _tumour(number)
        images = _scan(root / "unseen" / case, case, classes, seed=number)
        _save(root / "unseen" / case / f"{case}-seg.nii.gz", classes)
        for name, shift in (("model", 1), ("other", 2)):
            _segmented(root / name, case, np.roll(classes, shift, axis=0), images, quality=0.9 - 0.1 * number)
    return root


def _tumour(number: int) -> np.ndarray:
    classes = np.zeros(SHAPE, np.uint8)
    classes[4:12, 8:16, 4:12] = 2
    classes[6:10, 10:14, 6:10] = 1
    classes[6:8, 10 : 12 + number % 3, 6:10] = 3
    return classes


def _scan(folder: Path, case: str, classes: np.ndarray, *, seed: int) -> dict[str, Path]:
    random = np.random.default_rng(seed)
    brain = np.zeros(SHAPE, np.float32)
    brain[2:-2, 2:-2, 2:-2] = 1
    found = {}
    for number, sequence in enumerate(SEQUENCES):
        grey = brain * (100 + 40 * classes * (1 + number) / 4 + 5 * random.standard_normal(SHAPE).astype(np.float32))
        found[sequence] = _save(folder / f"{case}-{SUFFIX[sequence]}.nii.gz", grey.astype(np.float32))
    return found


def _segmented(out: Path, case: str, classes: np.ndarray, images: dict[str, Path], *, quality: float) -> None:
    mask = _save(out / f"{case}_seg.nii.gz", classes)
    volumes = {"NCR": 1.0, "ED": 2.0, "ET": 3.0, "TC": 4.0, "WT": 6.0}
    told = {"label_scheme": "brats2023", "volumes_ml": volumes, "model": {"privacy_banner": "NOT PRIVATE: north"}}
    (out / f"{case}_stats.json").write_text(json.dumps(told))
    record = {
        "case": case,
        "status": "done",
        "inputs": {str(path): _sha(path) for path in images.values()},
        "outputs": {mask.name: _sha(mask)},
        "kinds": {"segmentation": mask.name},
        "volumes_ml": volumes,
        "quality": {"value": quality, "low": 0.4, "high": 0.95, "rests_on": {"entropy": 0.1}},
        "findings": [{"code": "W170", "severity": "warning", "where": "T1c", "message": "4 mm", "fix": "none"}],
        "notes": [],
    }
    _json(out / "records" / f"{case}.json", record)
    _json(out / "run.json", {"command": "segment", "privacy": "NOT PRIVATE: north"})


def _run(run: Path) -> None:
    private: dict[str, Any] = {"mode": "dp-sgd", "epsilon": 7.9, "delta": 1e-5, "budget": 8.0, "patients": 24}
    privacy = {"north": {**private, "statement": "so"}, "south": {"mode": "none", "statement": "nothing is promised"}}
    rows = {
        key: {
            **dict.fromkeys(("TC", "WT", "ET"), value),
            "mean": value,
            "patients": 4,
            "hd95_mm": {"mean": 9.5},
            "ci95": {"mean": [value - 0.1, value + 0.1]},
            "sites": {site: {"mean": value - 0.05 * n, "patients": 2} for n, site in enumerate(privacy)},
            "worst_site": "south",
            "worst_site_mean": value - 0.05,
        }
        for key, value in (("site:north", 0.5), ("ensemble", 0.6), ("student", 0.7))
    }
    _json(run / "summary.json", {"privacy": privacy, "rows": rows, "data": "phantoms", "mode": "conditional"})
    _json(run / "run.json", {"command": "distill", "privacy": privacy})
    _json(
        run / "history.json",
        {
            "rounds": [
                {"round": r, "student": 0.1 * r, "realism": 0.2, "realism:north": 0.1, "realism:south": 0.3}
                for r in (1, 2, 3)
            ]
        },
    )
    (run / "run_id").write_text("demo1\n")
    (run / "scores").mkdir()
    head = "subject_id,site,region,dice,hd95_mm,reference_empty,notice\n"
    for key, dice in (("student", 0.8), ("site-north", 0.7)):
        lines = [f"{c},north,{r},{dice},3.5,false,n\n" for c in CASES for r in ("TC", "WT", "ET")]
        (run / "scores" / f"{key}.csv").write_text(head + "".join(lines))
    for number in range(2):
        _synthetic(run / "synthetic", f"synthetic-{number:02d}", number, tuple(privacy))
    kept = run / "synthetic" / "round-000002"
    _synthetic(kept, "synthetic-00", 2, tuple(privacy))
    classes = _tumour(2)
    _save(kept / "synthetic-00_phantom.nii.gz", np.stack([(40.0 + 20 * classes).astype(np.float32)] * 4, axis=3))
    for shift, name in enumerate(("ensemble", "student")):
        _save(kept / f"synthetic-00_{name}.nii.gz", np.roll(classes, shift, axis=2))
    quality = {
        "notice": "Phantoms only.",
        "reference": "24 public phantoms",
        "measures": {"kid": {"value": 0.012, "low": 0.01}, "precision": 0.75},
        "per_site": {"north": "a private hospital releases nothing of this", "south": {"kid": 0.02}},
        "nearest": {"round-000002/synthetic-00": {"distance": 3.5}},
    }
    _json(run / "synthetic" / "quality.json", quality)


def _synthetic(folder: Path, name: str, number: int, sites: tuple[str, ...]) -> None:
    classes = _tumour(number)
    image = np.stack([(50 + 30 * classes + 10 * k).astype(np.float32) for k in range(4)], axis=3)
    _save(folder / f"{name}.nii.gz", image)
    _save(folder / f"{name}_labels.nii.gz", classes)
    for shift, site in enumerate(sites):
        _save(folder / f"{name}_teacher-{site}.nii.gz", np.roll(classes, shift, axis=1))


def _save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return path


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
