"""The centre's part of a run over an engine: the same `distill`, in segments, and the run folder that it leaves."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fediod_med.checkpoints import Provenance, current_commit, load_state, save_state, save_weights
from fediod_med.data.sampler import PublicSampler
from fediod_med.devices import pick_device
from fediod_med.distillation.loop import distill
from fediod_med.distillation.state import DistillationState
from fediod_med.distillation.volumes import final_volumes
from fediod_med.errors import SettingsError
from fediod_med.export import write_central_bundle
from fediod_med.federation.flare.remote import RemoteFederation
from fediod_med.federation.flare.settings import RunSettings
from fediod_med.networks import STUDENT, Generator, build_segmenter
from fediod_med.privacy.statement import run_statement
from fediod_med.protocol import Federation
from fediod_med.records import run_record, write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.snapshots import write_final_volumes, write_snapshot
from fediod_med.teacher import warm_start

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
ACCOUNT_TIMEOUT_S = 120.0
SYNTHETIC_VOLUMES = 2


class SegmentEnd(Exception):  # noqa: N818 (an event of normal operation: the run goes on in another segment)
    """The segment is over before the run is."""


def claim(folder: Path, settings: RunSettings) -> None:
    """Take a run folder for these settings, or continue the run that it holds.

    Raises:
        SettingsError: the folder holds a run with other settings.
    """
    path = folder / SETTINGS_FILE
    written = json.loads(json.dumps(settings.plain()))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in written if written[key] != before.get(key))
        if changed:
            raise SettingsError(
                f"run {settings.run_id}: expected {changed[0]} {before.get(changed[0])!r} as the run was begun with, "
                f"found {written[changed[0]]!r}; give the run a new id, or its old settings"
            )
    else:
        write_json(path, written)


def run_rounds(
    federation: Federation,
    settings: RunSettings,
    *,
    folder: Path,
    device: str,
    on_round: Callable[[Mapping[str, float]], None],
) -> DistillationState:
    """Distil, or go on distilling, from the checkpoint in the run folder.

    Args:
        federation: the hospitals, over an engine or embedded: both lead to the same weights.
        settings: of the run.
        folder: of the run at the centre.
        device: see `devices.pick_device`.
        on_round: receives each round's record; may raise `SegmentEnd`.

    Raises:
        SegmentEnd: as raised by `on_round`; the run can be continued.
        ProtocolError: a round had fewer good replies than the quorum; the run can be continued.
    """
    compute_on = pick_device(device)
    generator = None
    torch.manual_seed(settings.seed)
    if settings.mode != "phantoms":
        generator = Generator(settings.mode, size=settings.roi)
    torch.manual_seed(settings.seed)
    student = warm_start(build_segmenter(**STUDENT), init="auto", spec=STUDENT)
    return distill(
        federation,
        student=student,
        generator=generator,
        sampler=None if settings.mode == "unconditional" else _sampler(settings, folder),
        objective=settings.full_objective(),
        schedule=settings.full_schedule(),
        size=settings.roi,
        seed=settings.seed,
        run_id=settings.run_id,
        device=compute_on,
        checkpoint=folder / "checkpoints" / "student.pt",
        resume=True,
        quorum=settings.quorum,
        timeout_s=settings.timeout_s,
        on_round=on_round,
        on_snapshot=partial(write_snapshot, folder / "synthetic", spacing=settings.spacing),
    )


def finish(
    state: DistillationState, federation: RemoteFederation, settings: RunSettings, *, folder: Path, device: str
) -> Mapping[str, Mapping[str, Any]]:
    """Write student, bundle, history, synthetic volumes and records; returns each hospital's privacy record."""
    privacy = federation.accounts(timeout_s=min(ACCOUNT_TIMEOUT_S, settings.timeout_s))
    schedule = settings.full_schedule()
    provenance = Provenance(
        kind="student",
        network=STUDENT,
        spacing=settings.spacing,
        label_scheme="brats2018",
        sites=settings.sites,
        privacy=privacy,
        trained_on=f"synthetic volumes, answered by teachers trained on {settings.data_name}",
        seed=settings.seed,
        settings={"roi": settings.roi, "rounds": schedule.rounds, "student_steps": schedule.student_steps},
        commit=current_commit(),
    )
    weights = state.student_average.module.state_dict()
    save_weights(folder / "student.safetensors", weights, provenance)
    write_central_bundle(folder / "bundle", weights, provenance)
    write_json(folder / "history.json", {"notice": NOT_FOR_CLINICAL_USE, "rounds": state.history})
    volumes = final_volumes(
        state,
        sampler=None if settings.mode == "unconditional" else _sampler(settings, folder),
        count=SYNTHETIC_VOLUMES,
        size=settings.roi,
        seed=settings.seed,
        device=pick_device(device),
    )
    write_final_volumes(folder / "synthetic", volumes, spacing=settings.spacing)
    summary = {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy": privacy,
        "privacy_statement": run_statement(
            privacy,
            checked="by their own statements; each hospital can verify its ledger with `fediod privacy verify`.",
        ),
        "data": settings.data_name,
        "seed": settings.seed,
        "mode": settings.mode,
        "rounds": schedule.rounds,
        "objective": dataclasses.asdict(settings.full_objective()),
        "rows": {},
        "bytes": {"down": federation.bytes_down, "up": federation.bytes_up},
    }
    write_json(folder / "summary.json", summary)
    write_json(
        folder / "run.json",
        run_record(
            command="federation",
            device=device,
            commit=current_commit(),
            options=settings.plain(),
            privacy=privacy,
            seeds={"run": settings.seed},
        ),
    )
    return privacy


def _sampler(settings: RunSettings, folder: Path) -> PublicSampler:
    """The public phantoms, made once a run: later segments read them back."""
    path = folder / "checkpoints" / "phantoms.pt"
    seed = 1000 + settings.seed
    if path.is_file():
        pool = load_state(path)
        return PublicSampler.of_pool(pool["images"], pool["tissues"], roi=settings.roi, seed=seed)
    sampler = PublicSampler(spacing=settings.spacing, roi=settings.roi, count=settings.pool, seed=seed)
    images, tissues = sampler.pool()
    save_state(path, {"images": images, "tissues": tissues})
    return sampler
