"""All training scans in one place: the row of every comparison that the hospitals may not have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from fediod_med.data.sampler import PublicSampler
from fediod_med.networks import STUDENT
from fediod_med.sites import Site
from fediod_med.teacher import labelled, train_teacher


def train_pooled(
    sites: Sequence[Site],
    *,
    output_dir: Path,
    seed: int,
    device: str,
    sampler: PublicSampler,
    on_epoch: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Train the student's network on the training part of all hospitals, as many steps as all teachers together.

    Args:
        sites: hospitals; settings other than the network are those of the first.
        output_dir: receives `model.safetensors`.
        seed: of the training.
        device: see `devices.pick_device`.
        sampler: phantoms for rehearsal.
        on_epoch: receives (epoch, epochs, loss).

    Returns:
        The weights file.

    Raises:
        SettingsError: a hospital promises privacy; pooled training keeps no promise.
    """
    site = dataclasses.replace(
        sites[0],
        site_name="pooled",
        seed=seed,
        epochs=sum(site.epochs for site in sites),
        backbone=str(STUDENT["backbone"]),
        width=int(STUDENT["width"]),
        depth=int(STUDENT["depth"]),
    )
    return train_teacher(
        site,
        output_dir=output_dir,
        device=device,
        data=[item for s in sites for item in labelled(s.subjects()[0], s.label_scheme)],
        public=sampler if site.rehearsal else None,
        kind="pooled",
        trained_on="patients of all hospitals pooled",
        on_epoch=on_epoch,
    )
