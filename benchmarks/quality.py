"""Calibrates the quality score on phantoms, and measures it on held-out phantoms and on labelled patients.

    python benchmarks/quality.py collect rows.json --cases 240            # phantoms, clean and spoilt, segmented
    python benchmarks/quality.py fit rows.json fediod_med/weights/quality.json
    python benchmarks/quality.py check fediod_med/weights/quality.json ROOT --layout brats2018   # patients; prints only

Only phantoms enter the calibration. `check` prints aggregate numbers and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from numpy.random import Generator
from scipy import ndimage
from scipy.stats import pearsonr, spearmanr

from fediod_med.checkpoints import load_segmenter
from fediod_med.data.layouts import find_subjects
from fediod_med.data.nifti.reading import read_label, read_subject
from fediod_med.data.phantoms import PUBLIC_PRIOR, Grid, hospital_profiles, load_anatomy, simulate
from fediod_med.data.transforms import normalise, to_native, to_working_grid
from fediod_med.inference import default_roi, predict_probabilities
from fediod_med.labels import get_scheme
from fediod_med.metrics import region_scores
from fediod_med.quality import calibrate, calibration_json, measure, read_calibration
from fediod_med.resources import public_prior

GRID = Grid((96, 104, 88), 2.0)


def clean(image: np.ndarray, random: Generator) -> np.ndarray:
    """The phantom as it is."""
    del random
    return image


def noisy(image: np.ndarray, random: Generator) -> np.ndarray:
    """White noise of 10 to 60 % of the mean intensity of every sequence."""
    level = random.uniform(0.1, 0.6) * image.mean(axis=(1, 2, 3), where=image != 0, keepdims=True)
    return image + level * random.standard_normal(image.shape, dtype=np.float32)


def blurred(image: np.ndarray, random: Generator) -> np.ndarray:
    """Motion-like blur of 3 to 8 mm along one axis, all sequences."""
    return ndimage.gaussian_filter1d(image, random.uniform(1.5, 4.0), axis=int(random.integers(1, 4)))


def shifted(image: np.ndarray, random: Generator) -> np.ndarray:
    """One to three sequences moved by up to 12 mm: not co-registered."""
    moved = image.copy()
    for channel in random.choice(4, size=int(random.integers(1, 4)), replace=False):
        moved[channel] = ndimage.shift(image[channel], random.uniform(-6, 6, size=3), order=1)
    return moved


def swapped(image: np.ndarray, random: Generator) -> np.ndarray:
    """Two sequences exchanged."""
    order = np.arange(4)
    a, b = random.choice(4, size=2, replace=False)
    order[[a, b]] = order[[b, a]]
    return image[order]


def flattened(image: np.ndarray, random: Generator) -> np.ndarray:
    """The contrast of one or two sequences compressed to a tenth: nearly an absent sequence."""
    flat = image.copy()
    for channel in random.choice(4, size=int(random.integers(1, 3)), replace=False):
        inside = flat[channel] != 0
        mean = flat[channel][inside].mean()
        noise = 0.05 * mean * random.standard_normal(int(inside.sum()), dtype=np.float32)
        flat[channel][inside] = mean + 0.1 * (flat[channel][inside] - mean) + noise
    return flat


SPOILS: tuple[Callable[[np.ndarray, Generator], np.ndarray], ...] = (noisy, blurred, shifted, swapped, flattened)


class Model:
    """The shipped prior, from a scan to probabilities on the working grid and classes on the native one."""

    def __init__(self) -> None:
        self.network, self.provenance = load_segmenter(public_prior())
        self.roi = default_roi(self.provenance)

    def __call__(self, array: np.ndarray, affine: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        image = MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(affine))
        working, _ = to_working_grid(image, spacing=self.provenance.spacing)
        probs = predict_probabilities(self.network, normalise(working), roi=self.roi, device=torch.device("cpu"))
        classes = to_native(probs, affine=affine, shape=array.shape[1:]).argmax(dim=0).numpy()
        return measure(probs.numpy(), probs.affine.numpy()), classes


def mean_dice(classes: np.ndarray, truth: np.ndarray, spacing: float = 1.0) -> float:
    return float(np.mean([score["dice"] for score in region_scores(classes, truth, (spacing,) * 3).values()]))


def collect(path: Path, cases: int, first_seed: int) -> None:
    """Segment each phantom clean and spoilt in two ways; one row per scan: phantom, defect, Dice, measures."""
    model, anatomy = Model(), load_anatomy(GRID)
    profiles = (PUBLIC_PRIOR, *hospital_profiles())
    rows = []
    for case in range(cases):
        seed = first_seed + case
        random = np.random.default_rng(seed)
        phantom = simulate(anatomy, seed, profiles[case % len(profiles)])
        brain = phantom.image[0] != 0
        for spoil in (clean, *(SPOILS[i] for i in random.choice(len(SPOILS), size=2, replace=False))):
            image = (spoil(phantom.image, random) * brain).astype(np.float32)
            measures, classes = model(image, phantom.affine)
            rows.append(
                {
                    "phantom": seed,
                    "profile": profiles[case % len(profiles)].name,
                    "defect": spoil.__name__,
                    "mean_dice": mean_dice(classes, phantom.classes),
                    "measures": measures,
                }
            )
        path.write_text(json.dumps(rows))
        print(f"{case + 1}/{cases}", *(f"{row['defect']} {row['mean_dice']:.2f}" for row in rows[-3:]), flush=True)


def fit(source: Path, target: Path) -> None:
    """Fit on every row, with all scans of a phantom in one fold."""
    rows = json.loads(source.read_text())
    phantoms = [row["phantom"] for row in rows]
    words = (
        f"{len(rows)} scans of {len(set(phantoms))} phantoms, clean and spoilt, segmented by the public prior "
        f"(seeds {min(phantoms)} to {max(phantoms)}); no patient"
    )
    fitted = calibrate(
        [row["measures"] for row in rows], [row["mean_dice"] for row in rows], calibrated_on=words, groups=phantoms
    )
    target.write_text(calibration_json(fitted))
    print(f"{words}: Spearman {fitted.spearman:.3f}, MAE {fitted.mae:.3f}, 80 % interval {fitted.residuals}")
    for name, weight in sorted(zip(fitted.features, fitted.weights, strict=True), key=lambda pair: -abs(pair[1])):
        print(f"  {name:18s} {weight:+.3f}")


def check(calibration: Path, root: Path, layout: str) -> None:
    """Agreement of predicted and real Dice on held-out rows (a `.json` of `collect`) or on labelled patients."""
    fitted = read_calibration(calibration)
    if root.suffix == ".json":
        rows = [(row["measures"], row["mean_dice"]) for row in json.loads(root.read_text())]
    else:
        model = Model()
        rows = []
        for subject in find_subjects(root, layout, require_label=True):
            volume = read_subject(subject)
            measures, classes = model(volume.array, volume.affine)
            rows.append((measures, mean_dice(classes, read_label(subject, get_scheme(layout)))))
    table = np.array([[measures[name] for name in fitted.features] for measures, _ in rows])
    truth, found = np.array([dice for _, dice in rows]), fitted.predict(table)
    low, high = found + fitted.residuals[0], found + fitted.residuals[1]
    print(
        f"{len(rows)} cases: Spearman {spearmanr(found, truth).statistic:.3f}, "
        f"Pearson {pearsonr(found, truth).statistic:.3f}, MAE {np.abs(found - truth).mean():.3f}, "
        f"mean predicted {found.mean():.3f}, mean real {truth.mean():.3f}, "
        f"inside the 80 % interval {((truth >= low) & (truth <= high)).mean():.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("collect")
    step.add_argument("path", type=Path)
    step.add_argument("--cases", type=int, default=240)
    step.add_argument("--first-seed", type=int, default=700_000)
    step = commands.add_parser("fit")
    step.add_argument("source", type=Path)
    step.add_argument("target", type=Path)
    step = commands.add_parser("check")
    step.add_argument("calibration", type=Path)
    step.add_argument("root", type=Path)
    step.add_argument("--layout", default="brats2018")
    options = vars(parser.parse_args())
    command = options.pop("command")
    {"collect": collect, "fit": fit, "check": check}[command](**options)


if __name__ == "__main__":
    main()
