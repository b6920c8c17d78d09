"""What a run keeps of a round: the volumes it asked about, what everyone made of them, and the phantoms behind them.

Nothing is asked for a snapshot: it holds what was answered anyway. Everything lies as the heads do, so that files say
the truth about left and right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor

from fediod_med.data.nifti.writing import write_label_map, write_volumes
from fediod_med.data.sampler import PublicBatch, upright
from fediod_med.labels import get_scheme

_PLAIN = "brats2023"  # the scheme whose values are the classes themselves


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One round, on the CPU, axes right, anterior, superior (an unconditional generator names no sides).

    Attributes:
        round: counted from 1.
        x: `(B, 4, D, H, W)` the volumes asked about, z-score units.
        answers: class probabilities `(B, C, D, H, W)` by hospital, as they were answered.
        ensemble: `(B, C, D, H, W)` merged answers.
        student: `(B, C, D, H, W)` the student's probabilities before it learnt from this round.
        public: phantoms and label maps that the volumes were made from; none for an unconditional generator.
    """

    round: int
    x: Tensor
    answers: Mapping[str, Tensor]
    ensemble: Tensor
    student: Tensor
    public: PublicBatch | None


def take_snapshot(
    number: int, x: Tensor, answers: Mapping[str, Tensor], ensemble: Tensor, student: Tensor, public: PublicBatch | None
) -> Snapshot:
    """A snapshot of tensors as a round holds them: mirrored as `public` was drawn, on any device; shapes as above."""

    def kept(tensor: Tensor) -> Tensor:
        plain = tensor.detach().float().cpu()
        return plain.clone() if public is None else upright(plain, public.mirrored)

    return Snapshot(
        number,
        kept(x),
        {site: kept(probs) for site, probs in answers.items()},
        kept(ensemble),
        kept(student),
        None if public is None else public.upright(),
    )


def write_snapshot(folder: Path, snapshot: Snapshot, *, spacing: float) -> Path:
    """Write a snapshot below `folder`, one file set per volume of the batch; returns the round's own folder.

    `round-000030/synthetic-00.nii.gz` holds the four sequences; beside it lie `_phantom` (four sequences) and the class
    maps (uint8, values 0 to 3) `_labels`, `_teacher-<site>`, `_ensemble` and `_student`. A second call replaces the
    first.

    Args:
        folder: `synthetic` of a run folder.
        snapshot: of one round.
        spacing: working grid, mm.
    """
    home = folder / f"round-{snapshot.round:06d}"
    predictions = {
        **{f"teacher-{site}": probs for site, probs in snapshot.answers.items()},
        "ensemble": snapshot.ensemble,
        "student": snapshot.student,
    }
    for index, x in enumerate(snapshot.x):
        maps = {name: probs[index].argmax(dim=0) for name, probs in predictions.items()}
        phantom = None
        if snapshot.public is not None:
            phantom = snapshot.public.base[index]
            maps["labels"] = snapshot.public.classes[index]
        write_synthetic(home / f"synthetic-{index:02d}", x, maps=maps, phantom=phantom, spacing=spacing)
    return home


def write_final_volumes(
    folder: Path, volumes: Iterable[tuple[Tensor, PublicBatch | None]], *, spacing: float
) -> dict[str, tuple[Tensor, PublicBatch | None]]:
    """Write a run's last volumes as `synthetic-00` and so on, with `_labels` where a phantom is behind them.

    Args:
        folder: `synthetic` of a run folder.
        volumes: as `distillation.final_volumes` gives them: `(4, D, H, W)` and a batch of one, or none.
        spacing: working grid, mm.

    Returns:
        What was written, by name.
    """
    named = {f"synthetic-{index:02d}": found for index, found in enumerate(volumes)}
    for name, (x, public) in named.items():
        maps = {} if public is None else {"labels": public.classes[0]}
        write_synthetic(folder / name, x, maps=maps, spacing=spacing)
    return named


@dataclass(frozen=True, eq=False)
class StoredRound:
    """The first volume of a written snapshot that was made from a phantom.

    Attributes:
        round: counted from 1.
        x: `(4, D, H, W)`.
        phantom: `(4, D, H, W)`.
        labels: `(D, H, W)` uint8, class map of the phantom.
        ensemble: `(D, H, W)` uint8, the merged answers' class map.
        affine: `(4, 4)`, RAS.
    """

    round: int
    x: np.ndarray
    phantom: np.ndarray
    labels: np.ndarray
    ensemble: np.ndarray
    affine: np.ndarray


def read_rounds(folder: Path) -> tuple[StoredRound, ...]:
    """What `write_snapshot` left below `folder`, by round: of each the first volume, where it has a phantom."""
    found = []
    for path in sorted(folder.glob("round-*/synthetic-00_phantom.nii.gz")):

        def read(suffix: str, home: Path = path.parent) -> np.ndarray:
            return np.asarray(nibabel.load(home / f"synthetic-00{suffix}.nii.gz").dataobj)

        affine = np.asarray(nibabel.load(path).affine)
        x, phantom = (np.moveaxis(read(suffix), -1, 0) for suffix in ("", "_phantom"))
        number = int(path.parent.name.removeprefix("round-"))
        found.append(StoredRound(number, x, phantom, read("_labels"), read("_ensemble"), affine))
    return tuple(found)


def write_synthetic(
    stem: Path, x: Tensor, *, maps: Mapping[str, Tensor], phantom: Tensor | None = None, spacing: float
) -> Path:
    """Write one synthetic volume and what belongs to it: `<stem>.nii.gz`, `<stem>_phantom` and `<stem>_<map>`.

    Args:
        stem: path without ending.
        x: `(4, D, H, W)`, axes right, anterior, superior.
        maps: class maps `(D, H, W)`, integers 0 to 3, by name.
        phantom: `(4, D, H, W)` that `x` was made from.
        spacing: mm; the grid's corner is the origin.

    Returns:
        The path of the volume.
    """
    affine = np.diag([spacing, spacing, spacing, 1.0])

    def path(suffix: str = "") -> Path:
        return stem.with_name(f"{stem.name}{suffix}.nii.gz")

    write_volumes(path(), x.numpy(), affine)
    if phantom is not None:
        write_volumes(path("_phantom"), phantom.numpy(), affine)
    for name, classes in maps.items():
        write_label_map(path(f"_{name}"), classes.to(torch.uint8).numpy(), affine, get_scheme(_PLAIN))
    return path()
