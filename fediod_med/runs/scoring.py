"""Every row of a run's comparison on the same held-out scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fediod_med.baselines import PreparedScan, ensemble_predictor, network_predictor, weights_path
from fediod_med.checkpoints import load_segmenter
from fediod_med.data.layouts import Subject
from fediod_med.evaluation import SubjectScore, evaluate_predictor
from fediod_med.labels import LabelScheme, get_scheme
from fediod_med.pooled import train_pooled
from fediod_med.progress import Progress
from fediod_med.runs.finished import FinishedRun
from fediod_med.runs.stages import on_epoch
from fediod_med.sites import Site

Case = tuple[str, Subject, LabelScheme]
"""Hospital, patient and the hospital's label scheme."""
Predictor = Callable[[Subject], np.ndarray]
"""Scan to native class map `(X, Y, Z)`."""


def cases_of(held_out: Sequence[tuple[Site, Subject]]) -> list[Case]:
    """Held-out scans as `evaluation` takes them."""
    return [(site.site_name, subject, get_scheme(site.label_scheme)) for site, subject in held_out]


def row_predictors(
    done: FinishedRun, scans: Mapping[str, PreparedScan], *, prior: nn.Module, device: torch.device
) -> dict[str, Predictor]:
    """By key, what each row makes of a scan: hospitals alone, their ensemble, the public prior, the students.

    In mode `gradient` a teacher is not private: nothing that it says itself may leave, scores included.

    Args:
        done: the distillation.
        scans: by subject id, see `baselines.prepare`.
        prior: the public prior.
        device: where networks run; they are moved there.
    """
    roi = done.plan.roi
    shown = [h for h in done.hospitals if h.site.privacy_mode != "gradient"]
    found = {f"site:{h.site.site_name}": network_predictor(h.teacher, scans, roi=roi, device=device) for h in shown}
    if len(shown) == len(done.hospitals):
        counts = done.student.counts
        assert counts is not None  # asked for in the first round
        found["ensemble"] = ensemble_predictor(
            [h.teacher for h in done.hospitals], counts, scans, roi=roi, device=device
        )
    found["prior"] = network_predictor(prior, scans, roi=roi, device=device)
    if done.phantom_student is not None:
        phantom_student = done.phantom_student.student_average.module
        found["kd_phantoms"] = network_predictor(phantom_student, scans, roi=roi, device=device)
    found["student"] = network_predictor(done.network, scans, roi=roi, device=device)
    return found


def pooled_network(done: FinishedRun, *, out: Path, device: str, progress: Progress) -> nn.Module:
    """All training scans in one place, as many steps as all teachers together: what the hospitals may not do.

    Found in `baselines/pooled` of the run folder, or trained there. Returned on the CPU.
    """
    folder = out / "baselines" / "pooled"
    path = weights_path(folder.parent, "pooled")
    if path is None:
        path = train_pooled(
            done.sites,
            output_dir=folder,
            seed=done.sites[0].seed + done.plan.seed,
            device=device,
            sampler=done.sampler,
            on_epoch=on_epoch(progress, "pooled", private=False),
        )
    return load_segmenter(path)[0]


def score_rows(
    predictors: Mapping[str, Predictor], cases: Sequence[Case], progress: Progress
) -> dict[str, list[SubjectScore]]:
    """Score each row on the same cases, by key."""
    scores: dict[str, list[SubjectScore]] = {}
    for number, (key, predict) in enumerate(predictors.items()):
        progress("evaluate", number, len(predictors), key)
        scores[key] = evaluate_predictor(predict, cases)
    progress("evaluate", len(predictors), len(predictors), "")
    return scores
