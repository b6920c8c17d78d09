"""Opens hospitals for a run in one process: gate, teacher, scans and node, each as its own machine would hold them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fediod_med.baselines import presence_bits, weights_path
from fediod_med.checkpoints import Provenance, load_segmenter, weights_digest
from fediod_med.data.partitions import by_patient
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import preprocessing
from fediod_med.devices import private_precision
from fediod_med.distillation.settings import Schedule, generator_rounds
from fediod_med.errors import PrivacyError, SettingsError
from fediod_med.federation.critic import Critic, PlainCritic, PrivateCritic
from fediod_med.federation.critic_design import CriticDesign
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.privacy.accounting import epsilon_report, rdp_epsilon
from fediod_med.privacy.discriminator import DiscriminatorPlan
from fediod_med.privacy.gate import Gate, digest_of
from fediod_med.privacy.records import Head
from fediod_med.privacy.statement import NOT_PRIVATE, privacy_statement
from fediod_med.privacy.subspace import signal_to_noise
from fediod_med.sites import Site
from fediod_med.teacher import labelled, train_teacher


@dataclass(frozen=True)
class Hospital:
    """One site with what its node needs, all of it on the site's own machine in a real federation.

    Attributes:
        site: settings.
        gate: on the site's ledger.
        teacher: trained segmenter.
        presence: `(patients, 4)`, see `baselines.presence_bits`.
        patients: preprocessed training scans `(4, D, H, W)`, by patient.
        permits: ledger entry that paid for the teacher; empty unless the mode is `dp-sgd`.
    """

    site: Site
    gate: Gate
    teacher: nn.Module
    presence: Tensor
    patients: tuple[tuple[Tensor, ...], ...]
    permits: tuple[str, ...]


def open_hospital(
    site: Site,
    gate: Gate,
    *,
    out: Path,
    seed: int,
    device: str,
    teachers: Path | None,
    sampler: PublicSampler | None,
    on_epoch: Callable[[int, int, float], None],
    on_step: Callable[[int, int], None],
) -> Hospital:
    """Find or train the teacher, read the scans.

    Args:
        site: settings; its seed is added to the run's.
        gate: of the site, see `site_gate.open_gate`.
        out: run folder; a teacher trained here lies in `teachers/<site>`.
        seed: of the run.
        device: see `devices.pick_device`.
        teachers: folder with trained teachers; trained here when omitted.
        sampler: phantoms for rehearsal; not needed with `teachers`.
        on_epoch: receives (epoch, epochs, loss) of a training that is not private.
        on_step: receives (step, steps) of a private one.

    Raises:
        SettingsError: a teacher is missing or works on another grid.
        PrivacyError: the site promises `dp-sgd`, and its ledger did not pay for this teacher.
    """
    name = site.site_name
    site = dataclasses.replace(site, seed=site.seed + seed)
    trained = weights_path(out / "teachers" if teachers is None else teachers, name)
    if trained is None and teachers is not None:
        raise SettingsError(
            f"{teachers}: expected {name}/model.safetensors, found none; run `fediod site train {name}`"
        )
    if trained is None:
        trained = train_teacher(
            site,
            output_dir=out / "teachers" / name,
            device=device,
            public=sampler if site.rehearsal else None,
            on_epoch=on_epoch,
            on_step=on_step,
            gate=gate,
        )
    teacher, provenance = load_segmenter(trained)
    if provenance.spacing != site.spacing:
        raise SettingsError(
            f"{trained}: trained at {provenance.spacing:g} mm, this run works at {site.spacing:g} mm; train it again"
        )
    steps = preprocessing(spacing=site.spacing, with_label=True)
    patients = [
        [steps(item) for item in labelled(visits, site.label_scheme)]
        for visits in by_patient(site.subjects()[0]).values()
    ]
    return Hospital(
        site,
        gate,
        teacher,
        presence_bits([[item["label"].as_tensor() for item in visits] for visits in patients]),
        tuple(tuple(item["image"].as_tensor() for item in visits) for visits in patients),
        teacher_permits(gate, teacher, provenance, trained),
    )


def teacher_permits(gate: Gate, teacher: nn.Module, provenance: Provenance, path: Path) -> tuple[str, ...]:
    """The ledger entry that paid for a teacher; none is needed unless the mode is `dp-sgd`.

    Raises:
        PrivacyError: this ledger did not pay for these weights.
    """
    if gate.mode != "dp-sgd":
        return ()
    try:
        return (gate.permit_for(weights_digest(teacher.state_dict())).permit_id,)
    except PrivacyError as error:
        mode = provenance.privacy.get(gate.site, {}).get("mode", "unknown")
        raise PrivacyError(
            f"{path}: expected a teacher that the ledger of {gate.site} paid for, found one of mode {mode}; run "
            f"`fediod site train {gate.site}`"
        ) from error


def open_federation(
    hospitals: Sequence[Hospital],
    *,
    out: Path,
    seed: int,
    run_id: str,
    device: torch.device,
    adversarial: bool,
    heads: Mapping[str, Head] | None = None,
    design: CriticDesign | None = None,
) -> EmbeddedFederation:
    """The hospitals as one federation; with `adversarial`, each has a discriminator, paid for where that is due.

    `heads` are the states of the hospitals' ledgers that the centre has seen before; `design` is of all discriminators,
    see `open_node`.
    """
    open_one = partial(
        open_node, out=out, seed=seed, run_id=run_id, device=device, adversarial=adversarial, design=design
    )
    return EmbeddedFederation({h.site.site_name: open_one(h) for h in hospitals}, heads=heads)


def open_node(
    hospital: Hospital,
    *,
    out: Path,
    seed: int,
    run_id: str,
    device: torch.device,
    adversarial: bool,
    joins_late: bool = False,
    design: CriticDesign | None = None,
) -> SiteNode:
    """What answers for one hospital in one run; with `adversarial`, its discriminator is paid for where that is due.

    With `joins_late`, a hospital that a run has not reached before may begin with any round. `design` is of its
    discriminator, the plain one when omitted; without `adversarial` there is none, and it is not looked at.

    Raises:
        PrivacyError: a private hospital with another design than the plain one.
    """
    return SiteNode(
        hospital.site.site_name,
        hospital.teacher,
        hospital.presence,
        critic=_critic(
            hospital,
            out=out,
            seed=seed,
            run_id=run_id,
            device=device,
            joins_late=joins_late,
            design=CriticDesign() if design is None else design,
        )
        if adversarial
        else None,
        gate=hospital.gate,
        permits=hospital.permits,
        device=device,
    )


def planned_releases(schedule: Schedule, *, compare: bool) -> int:
    """Answers and pull-backs that a run asks of each hospital; mode `gradient` pays for every one of them."""
    return schedule.rounds + generator_rounds(schedule) + (schedule.rounds if compare else 0)


def announcement(site: Site, gate: Gate, schedule: Schedule, *, compare: bool) -> str:
    """What the privacy of a run will cost one hospital's patients, before anything is asked or trained.

    Raises:
        SettingsError: a hospital of mode `gradient` has planned fewer releases than the run needs.
    """
    if not site.private:
        return f"{site.site_name}: NOT PRIVATE. {NOT_PRIVATE}"
    needed = planned_releases(schedule, compare=compare)
    if site.privacy_mode == "gradient" and needed > site.releases:
        raise SettingsError(
            f"{site.site_name}: this run needs {needed} releases, and the site plans {site.releases}; set "
            f"`releases: {needed}` in its site file, or ask for fewer rounds or --no-compare"
        )
    return f"{site.site_name}: {planned_cost(gate, releases=needed)}{_prospect(site, gate)}"


def _prospect(site: Site, gate: Gate) -> str:
    """A warning where the noise of a step is larger than any signal that the patients could give."""
    if gate.policy is None or site.privacy_mode != "dp-sgd" or site.subspace == 0:
        return ""
    teacher = gate.policy.part("teacher")
    ratio = signal_to_noise(
        noise_multiplier=teacher.noise_multiplier,
        expected_patients=teacher.sample_rate * gate.policy.patients,
        dimensions=site.subspace,
    )
    if ratio >= 1:
        return ""
    return (
        f". The noise of a step is {1 / ratio:.1f} times the largest signal that its patients could give: expect the "
        "teacher to learn next to nothing from them; more patients or a larger budget would help"
    )


def planned_cost(gate: Gate, *, releases: int) -> str:
    """The epsilon that a site's plan truly costs, by every accountant at hand, with what was spent before."""
    policy = gate.policy
    if policy is None or policy.delta is None:
        return NOT_PRIVATE
    if policy.mode == "gradient":
        part = policy.part("answer")
        plan = [policy.part("counts").planned, dataclasses.replace(part.planned, steps=releases)]
        how = f"{releases} releases, noise {part.noise_multiplier:.3g} x sensitivity 2C = {part.sensitivity:g}"
    else:
        plan = [part.planned for part in policy.parts.values()]
        teacher = policy.part("teacher")
        how = f"{teacher.steps} private steps at q = {teacher.sample_rate:g}, noise {teacher.noise_multiplier:.3g} x C"
    report = epsilon_report(plan, policy.delta)
    spent = gate.spent()
    before = (
        "nothing spent before"
        if not spent
        else (
            f"spent before {rdp_epsilon(spent, policy.delta):.4g}, with this run at most "
            f"{rdp_epsilon([*spent, *plan], policy.delta):.4g}"
        )
    )
    tighter = "" if report.prv is None else f", {report.prv:.3g} by PRV"
    return (
        f"mode {policy.mode}, {policy.patients} patients, {how}: epsilon {report.rdp:.4g} by RDP (enforced){tighter}, "
        f"delta {policy.delta:g}; budget {policy.epsilon:g}, {before}"
    )


def privacy_record(hospital: Hospital) -> dict[str, Any]:
    """A hospital's entry in `summary.json`, weights and bundle: mode, what was spent, and the claim in words."""
    gate = hospital.gate
    policy = gate.policy
    if policy is None or policy.delta is None or gate.head is None:
        return {"mode": "none", "epsilon": None, "delta": None, "statement": NOT_PRIVATE}
    report = epsilon_report(gate.spent(), policy.delta)
    return {
        "mode": policy.mode,
        "epsilon": report.rdp,
        "epsilon_prv": report.prv,
        "budget": policy.epsilon,
        "delta": policy.delta,
        "patients": policy.patients,
        "ledger_head": {"sequence": gate.head.sequence, "hash": gate.head.hash},
        "policy": policy.digest(),
        "statement": privacy_statement(policy, epsilon=report, head=gate.head),
    }


def copy_ledger(hospital: Hospital, folder: Path) -> None:
    """Copy a hospital's ledger, policy and sealed payloads into the run folder, for whoever checks the claim."""
    if hospital.site.private:
        shutil.rmtree(folder, ignore_errors=True)
        source = (hospital.site.folder / hospital.site.ledger_dir).resolve()
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.lock", ".*"))


def _critic(
    hospital: Hospital,
    *,
    out: Path,
    seed: int,
    run_id: str,
    device: torch.device,
    joins_late: bool,
    design: CriticDesign,
) -> Critic:
    site, gate = hospital.site, hospital.gate
    if gate.mode != "none" and not design.plain:
        raise PrivacyError(
            f"{site.site_name}: expected the plain discriminator in mode {gate.mode}, found {design}; the analysis of "
            "what one patient can change was made for that one alone. Leave the design out, or the privacy"
        )
    state_dir = out / "site_state" / site.site_name
    if gate.mode != "dp-sgd" or gate.policy is None:
        volumes = [volume for volumes in hospital.patients for volume in volumes]
        return PlainCritic(
            site.site_name,
            volumes,
            state_dir=state_dir,
            seed=seed,
            device=device,
            joins_late=joins_late,
            design=design,
            teacher=hospital.teacher if design.joint else None,
        )
    part = gate.policy.part("discriminator")
    plan = DiscriminatorPlan(
        part.planned,
        clip_norm=part.clip_norm,
        physical_batch=site.physical_batch,
        precision=private_precision(device),
    )
    permit = gate.begin_training(
        "discriminator", run_id=run_id, settings_digest=digest_of(repr(plan).encode(), site.site_name.encode())
    )
    return PrivateCritic(
        site.site_name,
        hospital.patients,
        plan=plan,
        permit=permit.permit_id,
        done=gate.progress(permit.permit_id),
        journal=partial(gate.advance, permit.permit_id),
        state_dir=state_dir,
        device=device,
    )
