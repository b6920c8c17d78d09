"""Opens a hospital's privacy gate: its settings become a policy, its patients a universe, its folder a ledger."""

from __future__ import annotations

from importlib.metadata import version

from fediod_med import __version__
from fediod_med.data.partitions import by_patient
from fediod_med.errors import PrivacyError
from fediod_med.privacy.calibration import Part, plan_noise
from fediod_med.privacy.gate import Gate
from fediod_med.privacy.keys import ledger_key
from fediod_med.privacy.ledger import LEDGER, check_unpromised
from fediod_med.privacy.policy import (
    PolicyPart,
    PrivacyPolicy,
    count_part,
    release_part,
    training_part,
    universe_id,
)
from fediod_med.sites import Site

CLASSES = 4


def open_gate(site: Site) -> Gate:
    """The gate of a hospital, on its own ledger; without a ledger in mode `none`.

    The patient universe are all labelled patients of the site, held-out ones too: a fold that rotates must not begin
    a new budget. A hospital may take in or drop patients: the ledger goes on, and everybody bears all that was spent.

    Raises:
        PrivacyError: the ledger is missing, damaged or set back, see `privacy.ledger`; or mode `none` for patients whom
            the site's ledger covers.
        InputError: no labelled patient.
    """
    ledger, keys = (site.folder / site.ledger_dir).resolve(), (site.folder / site.key_dir).resolve()
    if not site.private:
        if keys.exists() or (ledger / LEDGER).exists():
            everyone, _ = _patients(site)
            check_unpromised(ledger, key_folder=keys, site=site.site_name, patients=everyone)
        return Gate.unprotected(site.site_name)
    everyone, trained_on = _patients(site)
    policy = site_policy(site, patients=len(trained_on), universe=universe_id(everyone, ledger_key(keys)))
    return Gate.open(ledger, key_folder=keys, policy=policy, patients=everyone)


def _patients(site: Site) -> tuple[set[str], set[str]]:
    """Ids of all labelled patients, and of those that are trained on."""
    training, held_out = site.subjects()
    return set(by_patient((*training, *held_out))), set(by_patient(training))


def site_policy(site: Site, *, patients: int, universe: str) -> PrivacyPolicy:
    """What a site promises, with the noise that its budget needs.

    Args:
        site: in mode `dp-sgd` or `gradient`.
        patients: declared number n of training patients; public under null replacement.
        universe: see `privacy.policy.universe_id`.

    Raises:
        PrivacyError: mode `none`, or a budget that no noise can keep.
    """
    if site.privacy_mode == "dp-sgd":
        planned = plan_noise(
            {
                "counts": Part(1.0, 1, site.counts_share),
                "teacher": Part(site.sample_rate, site.private_steps, 1 - site.counts_share - site.discriminator_share),
                "discriminator": Part(site.sample_rate, site.discriminator_steps, site.discriminator_share),
            },
            epsilon=site.epsilon,
            delta=site.delta,
        )
        parts: dict[str, PolicyPart] = {
            "teacher": training_part(planned["teacher"], clip_norm=site.clip_norm),
            "discriminator": training_part(planned["discriminator"], clip_norm=site.clip_norm),
        }
    elif site.privacy_mode == "gradient":
        planned = plan_noise(
            {
                "counts": Part(1.0, 1, site.counts_share),
                "answer": Part(1.0, site.releases, 1 - site.counts_share),
            },
            epsilon=site.epsilon,
            delta=site.delta,
        )
        # Answers and pull-backs share the plan: the budget, not the limit of either kind, ends them.
        part = release_part(planned["answer"], clip_norm=site.clip_norm)
        parts = {"answer": part, "pull_back": part}
    else:
        raise PrivacyError(f"{site.site_name}: mode {site.privacy_mode} has no policy; nothing is promised")
    return PrivacyPolicy(
        site=site.site_name,
        mode=site.privacy_mode,
        epsilon=site.epsilon,
        delta=site.delta,
        patients=patients,
        universe=universe,
        parts={"counts": count_part(planned["counts"], dim=CLASSES), **parts},
        versions={"fediod-med": __version__, "opacus": version("opacus")},
    )
