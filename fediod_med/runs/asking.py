"""What a run asks of hospitals, in the order that they rely on.

First their ledgers are opened and shown what the centre has seen of them; then each hears what its patients will pay;
only then is a teacher trained and a question asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.loop import distill
from fediod_med.distillation.state import DistillationState
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.hospitals import Hospital, announcement, open_federation, open_hospital
from fediod_med.parallel import Workers
from fediod_med.privacy.gate import Gate
from fediod_med.progress import Progress
from fediod_med.runs.plan import STUDENT_RUN, RunPlan
from fediod_med.runs.records import read_heads, write_heads
from fediod_med.runs.stages import on_epoch, on_step
from fediod_med.sites import Site
from fediod_med.snapshots import write_snapshot


def witness(gates: Sequence[Gate], out: Path) -> None:
    """Show each ledger the newest record of it that an earlier start of the run has seen.

    Raises:
        PrivacyError: a ledger was set back or replaced since.
    """
    seen = read_heads(out)
    for gate in gates:
        gate.witness(seen.get(gate.site))


def announce_costs(
    plan: RunPlan, sites: Sequence[Site], gates: Sequence[Gate], announce: Callable[[str], None]
) -> None:
    """Say what the run will cost the patients of each hospital.

    Raises:
        SettingsError: a hospital has planned fewer releases than the run needs.
    """
    for site, gate in zip(sites, gates, strict=True):
        announce(announcement(site, gate, plan.schedule, compare=plan.compare))


def open_hospitals(
    sites: Sequence[Site],
    gates: Sequence[Gate],
    *,
    out: Path,
    seed: int,
    device: str,
    teachers: Path | None,
    sampler: PublicSampler,
    progress: Progress,
) -> tuple[Hospital, ...]:
    """The hospitals with their teachers, one after the other; see `hospitals.open_hospital`."""
    return tuple(
        open_hospital(
            site,
            gate,
            out=out,
            seed=seed,
            device=device,
            teachers=teachers,
            sampler=sampler,
            on_epoch=on_epoch(progress, f"teacher {site.site_name}", private=site.private),
            on_step=on_step(progress, f"teacher {site.site_name}"),
        )
        for site, gate in zip(sites, gates, strict=True)
    )


def distil_student(
    name: str,
    plan: RunPlan,
    hospitals: Sequence[Hospital],
    sampler: PublicSampler,
    *,
    out: Path,
    device: torch.device,
    resume: bool,
    progress: Progress,
    workers: Workers,
) -> tuple[DistillationState, EmbeddedFederation]:
    """Distil one student of the plan, and keep after each round what the hospitals' ledgers then held.

    Args:
        name: of the student, one of `plan.students`.
        plan: of the run.
        hospitals: opened.
        sampler: the public phantoms.
        out: run folder; receives `checkpoints/<name>.pt`, `heads.json` and snapshots in `synthetic`.
        device: where the centre computes.
        resume: continue from the checkpoint if there is one.
        progress: see `Progress`.
        workers: processes that share the work.

    Returns:
        The final state, and the federation that was asked.
    """
    federation = open_federation(
        hospitals,
        out=out,
        seed=plan.seed,
        run_id=plan.name_of(name),
        device=device,
        adversarial=name == STUDENT_RUN,
        heads=read_heads(out),
    )

    def on_round(record: Mapping[str, float]) -> None:
        write_heads(out, federation)
        progress(f"distil {name}", int(record["round"]), plan.schedule.rounds, _losses(record))

    state = distill(
        federation,
        **plan.arguments(name, sampler),
        device=device,
        workers=workers,
        checkpoint=out / "checkpoints" / f"{name}.pt",
        resume=resume,
        on_round=on_round,
        on_snapshot=partial(write_snapshot, out / "synthetic", spacing=plan.spacing),
    )
    return state, federation


def _losses(record: Mapping[str, float]) -> str:
    return "  ".join(
        f"{key} {value:.3f}" for key, value in record.items() if key not in ("round", "sites") and ":" not in key
    )
