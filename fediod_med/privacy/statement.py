"""The claim in one paragraph: what holds for a patient, on which assumptions, and what is not covered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fediod_med import __version__
from fediod_med.privacy.accounting import EpsilonReport
from fediod_med.privacy.policy import PrivacyPolicy
from fediod_med.privacy.records import Head

NOT_PRIVATE = "This run is not differentially private; no bound on patient leakage is claimed."


def privacy_statement(
    policy: PrivacyPolicy | None,
    *,
    epsilon: EpsilonReport | None = None,
    head: Head | None = None,
    insecure: bool = False,
    lower_bound: float | None = None,
    audit: str = "",
    patient_sets: int = 1,
) -> str:
    """One paragraph for a data-protection officer.

    Args:
        policy: of the site; `None` or mode `none` gives `NOT_PRIVATE`.
        epsilon: of everything spent.
        head: of the ledger.
        insecure: noise was reproducible; gives `NOT_PRIVATE` with the reason.
        lower_bound: empirical, 95 %, from an audit.
        audit: names that audit.
        patient_sets: number of sets, as patients joined or left.
    """
    if policy is None or policy.mode == "none" or epsilon is None or policy.delta is None or policy.epsilon is None:
        return NOT_PRIVATE
    if insecure or policy.insecure:
        return f"INSECURE: the noise was reproducible. {NOT_PRIVATE}"
    accounts = [
        f"{name} {_up(value)}"
        for name, value in (
            ("PRV", epsilon.prv),
            ("closed form", epsilon.exact),
            ("dp-accounting", epsilon.dp_accounting),
        )
        if value is not None
    ]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(policy.versions.items())) or "not recorded"
    empirical = (
        f"Empirical lower bound {lower_bound:.2f} (95 %){f' from {audit}' if audit else ''}."
        if lower_bound is not None
        else "No empirical audit is attached."
    )
    newest = f"{head.sequence}:{head.hash[:16]}" if head is not None else "none"
    changed = (
        [f"Patients joined or left ({patient_sets} sets): each is charged with all releases, whenever admitted."]
        if patient_sets > 1
        else []
    )
    sentences = (
        f"(epsilon = {_up(epsilon.rdp)}, delta = {policy.delta:g})-DP per {policy.unit} of site {policy.site}, "
        f"{policy.adjacency} adjacency, {policy.patients} patients declared and public, over all releases to date "
        f"including training and class counts; budget {policy.epsilon:g}.",
        *changed,
        f"Mode {policy.mode}; accountant RDP, enforced ({'; '.join(accounts) or 'no second account'}); versions: "
        f"{versions}; policy {policy.digest()[:16]}; ledger head {newest}.",
        "Assumptions: each patient at one site only (otherwise the sites' epsilons add), secure randomness, a correct "
        f"gate (fediod-med {__version__}), key and ledger not rewritten together.",
        "Excluded: preprocessing and training on public data, choice of hyper-parameters, side channels such as "
        "timing, what a site learns of its own patients, and facts about a patient that follow from the population.",
        "Held-out patients receive no guarantee from any score reported about them.",
        empirical,
    )
    return " ".join(sentences)


def run_statement(privacy: Mapping[str, Mapping[str, Any]], *, checked: str) -> str:
    """A run's privacy in a sentence or two: as weak as its weakest hospital.

    Args:
        privacy: records by hospital (`hospitals.privacy_record`); `epsilon` is `None` where nothing was promised.
        checked: where the claims are written out, and what they leave out.
    """
    bare = [site for site, terms in privacy.items() if terms["epsilon"] is None]
    if bare:
        return f"NOT PRIVATE ({', '.join(bare)}). {NOT_PRIVATE}"
    worst = max(float(terms["epsilon"]) for terms in privacy.values())
    return (
        f"Differentially private per patient at each of {len(privacy)} hospitals: epsilon at most {worst:.4g} (RDP); "
        f"{checked}"
    )


def _up(value: float) -> str:
    """Three decimals, rounded up: a bound is never stated smaller than it is."""
    return f"{math.ceil(value * 1000 - 1e-6) / 1000:.3f}"
