"""The synthetic volumes that a run keeps when it has ended, and how good they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fediod_med.data.sampler import PublicBatch
from fediod_med.distillation.volumes import asked_volumes, final_volumes
from fediod_med.hospitals import Hospital
from fediod_med.records import write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.runs.finished import FinishedRun
from fediod_med.runs.records import privacy_statement
from fediod_med.snapshots import write_final_volumes
from fediod_med.synthetic_report import MOST_VOLUMES, Judged, quality_report

SYNTHETIC_VOLUMES = 4

Finals = Mapping[str, tuple[Tensor, PublicBatch | None]]
"""Volumes `(4, D, H, W)` by file name, each with the phantom it was made from: a batch of one, or none."""


def write_synthetic_volumes(done: FinishedRun, folder: Path, *, device: torch.device) -> Finals:
    """Make the volumes of the final generator and write them to `folder`."""
    plan = done.plan
    made = final_volumes(
        done.student, sampler=done.conditions, count=SYNTHETIC_VOLUMES, size=plan.roi, seed=plan.seed, device=device
    )
    return write_final_volumes(folder, made, spacing=plan.spacing)


def write_quality(done: FinishedRun, finals: Finals, folder: Path, *, prior: nn.Module, device: torch.device) -> Path:
    """Write `quality.json`: figures about the volumes that hospitals were asked about, under the run's statement.

    Args:
        done: the distillation.
        finals: from `write_synthetic_volumes`.
        folder: receives the file.
        prior: the public prior, whose features are compared.
        device: where features are computed.
    """
    plan = done.plan
    asked = asked_volumes(done.student, schedule=plan.schedule, sampler=done.conditions, count=MOST_VOLUMES)
    quality = quality_report(
        Judged(*asked, finals),
        sampler=done.sampler,
        network=prior,
        **scans_to_judge_by(done.hospitals),
        size=plan.roi,
        device=device,
        seed=plan.seed,
    )
    stated = {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy_statement": privacy_statement(done),
        "data": done.data_name,
    }
    return write_json(folder / "quality.json", {**stated, **quality})


def scans_to_judge_by(hospitals: Sequence[Hospital]) -> dict[str, Any]:
    """`scans` and `withheld` of `quality_report`: a hospital that promised privacy lends its scans to no figure."""
    return {
        "scans": {
            h.site.site_name: [scan for visits in h.patients for scan in visits]
            for h in hospitals
            if not h.site.private
        },
        "withheld": {
            h.site.site_name: f"privacy mode {h.site.privacy_mode}: a figure about this hospital's scans that its "
            "budget has not paid for does not leave it"
            for h in hospitals
            if h.site.private
        },
    }
