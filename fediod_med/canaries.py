"""Canaries in a throw-away private teacher: a hospital's mechanism, run once on phantoms and attacked.

What is audited is the mechanism: noise, sampling, clipping, crops and schedule of the site's policy and settings, by
the code that trains its teacher. No scan is read and nothing is charged, because no patient takes part. Each canary
is a phantom with a label map that nothing in its image explains. One that its coin leaves out is a null patient: it
is drawn like any other and contributes nothing, as the adjacency of the claim has it, so that the declared number of
patients, and with it the denominator, is the same whatever the coins show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fediod_med.auditing import loss_score, mislabelled_phantoms
from fediod_med.checkpoints import weights_digest
from fediod_med.data.sampler import PublicSampler
from fediod_med.devices import pick_device
from fediod_med.errors import SettingsError
from fediod_med.networks import build_segmenter
from fediod_med.privacy.accounting import rdp_epsilon
from fediod_med.privacy.ledger import POLICY
from fediod_med.privacy.one_run import OneRunAudit, fair_coins, one_run_audit
from fediod_med.privacy.policy import PrivacyPolicy, read_policy
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.trainable import select_trainable
from fediod_med.privacy.training import train_private
from fediod_med.private_teacher import patient_crops, private_schedule, public_crops
from fediod_med.progress import Progress, silent
from fediod_med.sites import Site
from fediod_med.teacher import public_pool, quiet_monai, warm_start

OFF = "canaries: off; --canaries N audits each private teacher's mechanism with N phantoms, and no patient"
CANARY_POOL, FILLER_POOL = 7_000, 8_000  # seeds of the pools; canaries appear in no other pool
REHEARSAL_POOL = 64  # phantoms, as the teacher's bundle makes them

Scan = Mapping[str, Any]
"""`image` `(4, x, y, z)` and `label` `(1, x, y, z)` on the working grid."""


def canary_audits(
    sites: Sequence[Site],
    *,
    run: Path,
    canaries: int,
    confidence: float = 0.95,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> tuple[dict[str, OneRunAudit], list[str]]:
    """Audit the private teachers' mechanisms of a run.

    Args:
        sites: hospitals, with the settings of the run.
        run: its folder; the policies in `privacy/<site>` count, those beside the sites' own ledgers where it has none.
        canaries: per site; 0 for none.
        confidence: of the bounds.
        seed: of the phantoms; coins, sampling and noise come from the operating system.
        device: see `devices.pick_device`.
        progress: see `progress.Progress`.

    Returns:
        Audits by target `teacher:<site>`, for `auditing.audit_run(one_run=...)`; and what was not audited, and why.

    Raises:
        SettingsError: a negative number of canaries.
        PrivacyError: a policy is damaged, or the training failed.
    """
    if canaries < 0:
        raise SettingsError(f"canaries: expected 0 or more, found {canaries}")
    if canaries == 0:
        return {}, [OFF]
    compute_on = pick_device(device)
    found, skipped = {}, []
    for site in sites:
        name = site.site_name
        policy = policy_of_run(site, run)
        if policy is None or policy.mode != "dp-sgd":
            mode = site.privacy_mode if policy is None else policy.mode
            skipped.append(f"{name}, canaries: no policy of a private teacher (privacy_mode {mode})")
            continue
        found[f"teacher:{name}"] = canary_audit(
            site,
            policy,
            canaries=canaries,
            confidence=confidence,
            seed=seed,
            device=compute_on,
            progress=progress,
        )
    return found, skipped


def policy_of_run(site: Site, run: Path) -> PrivacyPolicy | None:
    """The policy that a run copied, else the one beside the site's ledger; read only, a ledger is never opened."""
    paths = (run / "privacy" / site.site_name / POLICY, (site.folder / site.ledger_dir).resolve() / POLICY)
    return next((read_policy(path) for path in paths if path.is_file()), None)


def canary_audit(
    site: Site,
    policy: PrivacyPolicy,
    *,
    canaries: int,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | None = None,
    coins: Callable[[int], Sequence[bool]] = fair_coins,
    progress: Progress = silent,
) -> OneRunAudit:
    """Train one throw-away teacher by a site's mechanism on canaries and phantoms, and guess which canaries it saw.

    The declared number n of patients is the policy's, or the number of canaries where that is larger: epsilon depends
    on noise, sampling rate and steps, and not on n. Phantoms with their true labels fill the places that are not
    canaries'. The attacker knows the public starting weights, and scores a canary by how far its loss fell from there.

    Args:
        site: settings; only those of the teacher's network and training are read.
        policy: in mode `dp-sgd`; its part `teacher` is the mechanism, and the claim.
        canaries: each inserted with probability 1/2; all are guessed.
        confidence: of the bound.
        seed: of the phantoms.
        device: of the computation; the CPU when omitted. It decides the precision, as in the teacher's own training.
        coins: of the insertions; secret and fair unless a test says otherwise.
        progress: see `progress.Progress`.

    Raises:
        PrivacyError: no canary, or the training diverged.
    """
    compute_on = torch.device("cpu") if device is None else device
    stage = f"canaries {site.site_name}"
    places = max(policy.patients, canaries)
    progress(stage, 0, policy.part("teacher").steps, "public phantoms")
    planted, fillers = _phantoms(site, canaries=canaries, places=places, seed=seed)
    rehearsal = public_crops(
        public_pool(
            rehearsal=site.rehearsal, spacing=site.spacing, roi=site.roi, count=REHEARSAL_POOL, seed=site.seed + seed
        )
    )
    start = _untrained(site).to(compute_on)
    schedule = private_schedule(site, policy, init=weights_digest(start.state_dict()), device=compute_on)

    def score(network: nn.Module, number: int) -> float:
        image, label = planted[number]["image"], planted[number]["label"]
        return loss_score(network, image, label, roi=site.roi, device=compute_on)

    before = [score(start.eval(), number) for number in range(canaries)]

    def train(inserted: Sequence[int]) -> nn.Module:
        null: list[Scan] = []
        patients: list[list[Scan]] = [[planted[number]] for number in inserted]
        patients += [null] * (canaries - len(inserted))
        with quiet_monai():
            return train_private(
                copy.deepcopy(start),
                [*patients, *fillers],
                schedule=schedule,
                draw=lambda scans: patient_crops(scans, site) if scans else _no_crops(site),
                per_row_loss=per_row_dice_ce,
                public=rehearsal,
                on_step=lambda done, steps: progress(stage, done, steps, "private steps on phantoms"),
                device=compute_on,
            )

    return one_run_audit(
        train,
        range(canaries),
        score_fn=lambda network, number: score(network, number) - before[number],
        delta=policy.delta or 0.0,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon(policy),
        coins=coins,
    )


def claimed_epsilon(policy: PrivacyPolicy) -> float | None:
    """What the policy's teacher costs on its own, by the enforced accountant; `None` where nothing is promised."""
    return None if policy.delta is None else rdp_epsilon([policy.part("teacher").planned], policy.delta)


def _phantoms(site: Site, *, canaries: int, places: int, seed: int) -> tuple[list[dict[str, Any]], list[list[Scan]]]:
    """Canaries, and patients of one truly labelled phantom each for the other places."""

    def pool(first: int, count: int) -> PublicSampler:
        return PublicSampler(spacing=site.spacing, roi=site.roi, count=count, seed=first + seed)

    planted = mislabelled_phantoms(pool(CANARY_POOL, canaries), seed=seed) if canaries else []
    others = pool(FILLER_POOL, places - canaries).volumes() if places > canaries else iter(())
    return planted, [[{"image": image.float(), "label": classes[None]}] for image, classes in others]


def _untrained(site: Site) -> nn.Module:
    """The network that the site's teacher starts from, with the same parameters trainable."""
    spec = site.network()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(site.seed)
        network = warm_start(build_segmenter(**spec), init=site.init, spec=spec)
    select_trainable(network, site.trainable)
    return network


def _no_crops(site: Site) -> tuple[Tensor, Tensor]:
    """The rows of a null patient: none, so that its gradient is zero."""
    edges = (site.roi,) * 3
    return torch.zeros(0, 4, *edges), torch.zeros(0, *edges, dtype=torch.long)
