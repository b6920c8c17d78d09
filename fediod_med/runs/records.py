"""What a run folder says in writing: whose it is, what the ledgers held, where weights come from, what was found."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fediod_med.checkpoints import Provenance, current_commit
from fediod_med.data.layouts import Subject
from fediod_med.durable import write_atomically
from fediod_med.errors import SettingsError
from fediod_med.evaluation import SubjectScore, paired_difference, summarise
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.networks import STUDENT
from fediod_med.privacy.records import Head
from fediod_med.privacy.statement import run_statement
from fediod_med.records import run_record, write_json
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.runs.finished import FinishedRun
from fediod_med.sites import Site


def claim(out: Path, *, resume: bool) -> str:
    """The run's id; a folder that holds a run is touched only on request.

    Raises:
        SettingsError: the folder holds a run, and `resume` is not set.
    """
    path = out / "run_id"
    if path.is_file():
        if not resume:
            raise SettingsError(f"{out}: holds a run already; add --resume to continue it, or choose another --out")
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex
    write_atomically(path, lambda temporary: temporary.write_text(run_id, encoding="utf-8"))
    return run_id


def read_heads(out: Path) -> dict[str, Head]:
    """The newest ledger states that this run's centre has seen, from an earlier start of the run."""
    path = out / "heads.json"
    if not path.is_file():
        return {}
    return {site: Head(**head) for site, head in json.loads(path.read_text(encoding="utf-8")).items()}


def write_heads(out: Path, federation: EmbeddedFederation) -> None:
    """Keep the newest ledger states that the centre has seen; nothing where no hospital has a ledger."""
    if federation.heads:
        heads = {site: dataclasses.asdict(head) for site, head in federation.heads.items()}
        write_json(out / "heads.json", heads)


def student_provenance(done: FinishedRun) -> Provenance:
    """Where the distilled student's weights come from."""
    plan = done.plan
    return Provenance(
        kind="student",
        network=STUDENT,
        spacing=plan.spacing,
        label_scheme="brats2018",
        sites=tuple(done.privacy),
        privacy=done.privacy,
        trained_on=f"synthetic volumes, answered by teachers trained on {done.data_name}",
        seed=plan.seed,
        settings={"roi": plan.roi, "rounds": plan.schedule.rounds, "student_steps": plan.schedule.student_steps},
        commit=current_commit(),
    )


def privacy_statement(done: FinishedRun) -> str:
    """What the run promises the patients of its hospitals, in words."""
    return run_statement(
        done.privacy,
        checked="summary.json has the full statement of each, `fediod privacy verify` checks it. Scores on "
        "held-out patients are not covered.",
    )


def run_summary(
    done: FinishedRun, scores: Mapping[str, list[SubjectScore]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Everything that `summary.json` holds; `rows.<key>.{TC,WT,ET,mean}` are mean Dice over held-out scans.

    Args:
        done: the distillation.
        scores: by row.
        seconds: by stage, as far as the run has come.
    """
    plan, seed = done.plan, done.plan.seed
    rows = {key: summarise(found, seed=seed) for key, found in scores.items()}
    site_means = [row["mean"] for key, row in rows.items() if key.startswith("site:")]
    return {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy": {site: dict(terms) for site, terms in done.privacy.items()},
        "privacy_statement": privacy_statement(done),
        "data": done.data_name,
        "seed": seed,
        "mode": plan.mode,
        "rounds": plan.schedule.rounds,
        "objective": dataclasses.asdict(plan.objective),
        "held_out": {site.site_name: f"fold {site.fold} of {site.folds}" for site in done.sites},
        "rows": rows,
        "ratios": {
            "student_to_ensemble": rows["student"]["mean"] / rows["ensemble"]["mean"] if "ensemble" in rows else None,
            "student_to_best_site": rows["student"]["mean"] / max(site_means) if site_means else None,
        },
        "student_minus": {
            key: paired_difference(scores["student"], found, seed=seed)
            for key, found in scores.items()
            if key != "student"
        },
        "bytes": {direction: dict(sent) for direction, sent in done.sent.items()},
        "seconds": dict(seconds),
    }


def distillation_record(
    done: FinishedRun,
    held_out: Sequence[tuple[Site, Subject]],
    *,
    device: str,
    processes: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Content of `run.json`: software, options, and, unless the run is discreet, the scans that were scored.

    Args:
        done: the distillation.
        held_out: scans, each with its hospital.
        device: as used.
        processes: that shared the distillation.
        seconds: by stage.
    """
    plan = done.plan
    named = () if done.discreet else held_out
    return run_record(
        command="distill",
        device=device,
        commit=current_commit(),
        options={
            "seed": plan.seed,
            "processes": processes,
            "mode": plan.mode,
            "pool": plan.pool,
            "schedule": dataclasses.asdict(plan.schedule),
            "objective": dataclasses.asdict(plan.objective),
            "sites": {site.site_name: _plain(site) for site in done.sites},
        },
        privacy=done.privacy,
        seeds={"run": plan.seed},
        seconds=seconds,
        inputs=[path for _, subject in named for path in dict.fromkeys(subject.images.values())],
        cases={subject.subject_id: {"site": site.site_name, "status": "scored"} for site, subject in named},
    )


def _plain(site: Site) -> dict[str, Any]:
    return {f.name: getattr(site, f.name) for f in dataclasses.fields(site) if f.name not in ("folder", "dataset_dir")}
