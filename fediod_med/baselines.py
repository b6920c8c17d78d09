"""Reference rows of the comparison: what a scan's label map would be without the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from fediod_med.data.layouts import Subject
from fediod_med.data.transforms import preprocessing
from fediod_med.ensemble import merge
from fediod_med.inference import native_classes, predict_probabilities


@dataclass(frozen=True)
class PreparedScan:
    """One scan on the working grid, and the grid it came from.

    Attributes:
        image: `(4, x, y, z)` z-scored.
        affine: of the scan, `(4, 4)`.
        shape: of the scan, voxels.
    """

    image: MetaTensor
    affine: np.ndarray
    shape: tuple[int, ...]


def prepare(subjects: Sequence[Subject], *, spacing: float) -> dict[str, PreparedScan]:
    """Read and preprocess each scan once, for all rows; by subject id."""
    steps = preprocessing(spacing=spacing, with_label=False)
    prepared: dict[str, PreparedScan] = {}
    for subject in subjects:
        loaded = steps({"subject": subject})
        prepared[subject.subject_id] = PreparedScan(
            loaded["image"], loaded["native_affine"].numpy(), tuple(loaded["native_shape"].tolist())
        )
    return prepared


def network_predictor(
    network: nn.Module, scans: Mapping[str, PreparedScan], *, roi: int, device: torch.device
) -> Callable[[Subject], np.ndarray]:
    """Predict with one network: subject to native class map `(X, Y, Z)`."""
    network = network.to(device).eval()

    def predict(subject: Subject) -> np.ndarray:
        scan = scans[subject.subject_id]
        probs = predict_probabilities(network, scan.image, roi=roi, device=device)
        return native_classes(probs, affine=scan.affine, shape=scan.shape)

    return predict


def ensemble_predictor(
    teachers: Sequence[nn.Module],
    counts: Tensor,
    scans: Mapping[str, PreparedScan],
    *,
    roi: int,
    device: torch.device,
) -> Callable[[Subject], np.ndarray]:
    """Predict with the teachers merged by class ratio (`ensemble.merge` without discriminators).

    Not deployable: it needs every hospital's teacher in one place. `counts` is `(K, 4)`.
    """
    networks = [teacher.to(device).eval() for teacher in teachers]

    def predict(subject: Subject) -> np.ndarray:
        scan = scans[subject.subject_id]
        probs = [predict_probabilities(n, scan.image, roi=roi, device=device).as_tensor()[None] for n in networks]
        merged = merge(torch.stack(probs), counts)[0]
        return native_classes(MetaTensor(merged, affine=scan.image.affine), affine=scan.affine, shape=scan.shape)

    return predict


def presence_bits(labels: Sequence[Sequence[Tensor]]) -> Tensor:
    """`(patients, 4)` of 0 and 1: the classes each patient's label maps `(1, D, H, W)` show; background always."""
    seen = [[any(bool((label == c).any()) for label in maps) for c in range(4)] for maps in labels]
    bits = torch.tensor(seen).float().reshape(len(labels), 4)
    bits[:, 0] = 1
    return bits


def weights_path(folder: Path, site: str) -> Path | None:
    """A site's trained teacher below a folder: `<site>/model.safetensors` or `<site>/models/model.safetensors`."""
    for path in (folder / site / "model.safetensors", folder / site / "models" / "model.safetensors"):
        if path.is_file():
            return path
    return None
