"""The privacy claims of a run or of a hospital, found on disk and checked against their ledgers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fediod_med.errors import InputError
from fediod_med.privacy.ledger import KEY, ledger_key
from fediod_med.privacy.records import Head
from fediod_med.privacy.statement import NOT_PRIVATE
from fediod_med.privacy.verify import Verification, verify_ledger
from fediod_med.sites import SITE_FILE, load_site

SUMMARY = "summary.json"
_SAME = 1e-6  # of two evaluations of one composition, on two machines


@dataclass(frozen=True)
class Claim:
    """What is claimed for one hospital, and where it can be checked.

    Attributes:
        site: name.
        mode: `none`, `dp-sgd` or `gradient`.
        ledger: folder of the ledger or of its copy; `None` in mode `none`.
        key: of the site, where it is at hand.
        head: newest record that the claim rests on.
        epsilon: claimed, by RDP.
    """

    site: str
    mode: str
    ledger: Path | None
    key: bytes | None = None
    head: Head | None = None
    epsilon: float | None = None


def find_claims(target: Path) -> tuple[Claim, ...]:
    """The claims of a run folder (`summary.json`, `privacy/<site>/`) or of a site folder (`site.yaml`).

    Raises:
        InputError: the folder is neither.
    """
    if (target / SITE_FILE).is_file():
        return (_claim_of_site(target),)
    if (target / SUMMARY).is_file():
        return tuple(_claims_of_run(target))
    raise InputError(f"{target}: expected a run folder with {SUMMARY} or a site folder with {SITE_FILE}, found neither")


def check_claim(claim: Claim, *, with_dp_accounting: bool = True) -> Verification:
    """Recompute one claim from its ledger; mode `none` claims nothing, so nothing about it can be right."""
    if claim.ledger is None:
        return Verification(False, (f"{claim.site}: NOT PRIVATE",), None, None, None, {}, False, NOT_PRIVATE)
    found = verify_ledger(claim.ledger, key=claim.key, head=claim.head, with_dp_accounting=with_dp_accounting)
    problems = list(found.problems)
    if found.policy is not None and (found.policy.site, found.policy.mode) != (claim.site, claim.mode):
        problems.append(
            f"{claim.ledger}: expected the ledger of {claim.site} in mode {claim.mode}, found that of "
            f"{found.policy.site} in mode {found.policy.mode}"
        )
    if claim.epsilon is not None and found.epsilon is not None:
        # The site may have spent more since; it cannot have spent less.
        grown = claim.head is not None and found.head is not None and found.head.sequence > claim.head.sequence
        same = math.isclose(claim.epsilon, found.epsilon.rdp, rel_tol=_SAME)
        if not same and not (grown and found.epsilon.rdp > claim.epsilon):
            problems.append(f"{claim.site}: claims epsilon {claim.epsilon:.6g}, its ledger {found.epsilon.rdp:.6g}")
    return replace(found, ok=not problems, problems=tuple(problems))


def _claim_of_site(folder: Path) -> Claim:
    site = load_site(folder)
    if not site.private:
        return Claim(site.site_name, "none", None)
    keys = (site.folder / site.key_dir).resolve()
    key = ledger_key(keys) if (keys / KEY).is_file() else None
    return Claim(site.site_name, site.privacy_mode, (site.folder / site.ledger_dir).resolve(), key=key)


def _claims_of_run(folder: Path) -> list[Claim]:
    path = folder / SUMMARY
    try:
        privacy: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["privacy"]
        claims = []
        for site, terms in privacy.items():
            if terms["mode"] == "none":
                claims.append(Claim(site, "none", None))
                continue
            head = Head(int(terms["ledger_head"]["sequence"]), str(terms["ledger_head"]["hash"]))
            claims.append(
                Claim(
                    site,
                    str(terms["mode"]),
                    folder / "privacy" / site,
                    key=_key_beside(folder, site),
                    head=head,
                    epsilon=float(terms["epsilon"]),
                )
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected the privacy of each hospital, found something else ({error!r})") from error
    return claims


def _key_beside(run: Path, site: str) -> bytes | None:
    """The site's key where the run holds its site files too (a demo); a real run never has it."""
    keys = run / "sites" / site / "keys"
    return ledger_key(keys) if (keys / KEY).is_file() and (run / "sites" / site / SITE_FILE).is_file() else None
