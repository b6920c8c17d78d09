"""The privacy claims of a run or of a hospital, found on disk and checked against their ledgers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fediod_med.errors import InputError, PrivacyError
from fediod_med.privacy.keys import KEY, UNIVERSES, head_of, ledger_key
from fediod_med.privacy.ledger import POLICY
from fediod_med.privacy.policy import read_policy
from fediod_med.privacy.records import Head
from fediod_med.privacy.statement import NOT_PRIVATE, privacy_statement
from fediod_med.privacy.verify import Verification, unverified, verify_ledger
from fediod_med.sites import SITE_FILE, load_site

SUMMARY, LEDGERS = "summary.json", "privacy"
_LEAST_CONFIDENCE = 0.95
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
        delta: claimed.
        problem: what is wrong with the claim before any ledger is read.
    """

    site: str
    mode: str
    ledger: Path | None
    key: bytes | None = None
    head: Head | None = None
    epsilon: float | None = None
    delta: float | None = None
    problem: str = ""


def find_claims(target: Path) -> tuple[Claim, ...]:
    """The claims of a run folder (`summary.json`, `privacy/<site>/`) or of a site folder (`site.yaml`).

    Raises:
        InputError: the folder is neither; or the run claims nothing, or not for every hospital that it names.
    """
    if (target / SITE_FILE).is_file():
        return (_claim_of_site(target),)
    if (target / SUMMARY).is_file():
        return tuple(_claims_of_run(target))
    raise InputError(f"{target}: expected a run folder with {SUMMARY} or a site folder with {SITE_FILE}, found neither")


def check_claim(claim: Claim, *, with_dp_accounting: bool = True) -> Verification:
    """Recompute one claim from its ledger; mode `none` claims nothing, so nothing about it can be right."""
    if claim.ledger is None:
        return Verification(False, ("NOT PRIVATE, so nothing is promised",), None, None, None, {}, False, NOT_PRIVATE)
    found = verify_ledger(claim.ledger, key=claim.key, head=claim.head, with_dp_accounting=with_dp_accounting)
    problems = [claim.problem] if claim.problem else []
    problems += [*found.problems, *_differences(claim, found)]
    if not problems:
        return replace(found, statement=" ".join(filter(None, (found.statement, found.growth))))
    return replace(found, ok=False, problems=tuple(problems), statement=unverified(problems[0]))


def _differences(claim: Claim, found: Verification) -> list[str]:
    """Where a claim differs from what its ledger said at the claim's own record; what came later excuses nothing."""
    then = found.witnessed
    policy = found.policy if then is None else then.policy
    problems = []
    if policy is not None and (policy.site, policy.mode) != (claim.site, claim.mode):
        problems.append(
            f"{claim.ledger}: expected the ledger of {claim.site} in mode {claim.mode}, found that of {policy.site} "
            f"in mode {policy.mode}"
        )
    if claim.epsilon is not None and found.epsilon is not None:
        epsilon = found.epsilon.rdp if then is None else then.epsilon
        if not math.isclose(claim.epsilon, epsilon, rel_tol=_SAME):
            problems.append(f"{claim.site}: claims epsilon {claim.epsilon:.6g}, its ledger {epsilon:.6g}")
    if claim.delta is not None and policy is not None and claim.delta != policy.delta:
        problems.append(f"{claim.site}: claims delta {claim.delta:g}, its ledger {policy.delta:g}")
    return problems


def stated_with_audit(found: Verification, audit: Path) -> str:
    """The statement of a verified claim with what an audit showed about the site; as it is where there is no audit.

    The largest bound of the attacks on the site's own targets and on the student counts. As the largest of several, it
    overstates rather than understates what was shown, and the sentence says of how many.

    Args:
        found: from `check_claim`.
        audit: `audit.json`, which may be absent.

    Raises:
        InputError: the file is not an audit.
    """
    if not found.ok or found.policy is None or not audit.is_file():
        return found.statement
    bounds, alarms = _bounds(audit, found.policy.site)
    if not bounds:
        return found.statement
    told = f"{audit.name}, the largest of {len(bounds)}" if len(bounds) > 1 else audit.name
    if alarms:
        told += f"; CONTRADICTED, look for a fault ({'; '.join(alarms)})"
    stated = privacy_statement(
        found.policy,
        epsilon=found.epsilon,
        head=found.head,
        lower_bound=max(bounds),
        audit=told,
        patient_sets=found.patient_sets,
    )
    return " ".join(filter(None, (stated, found.growth)))


def _bounds(path: Path, site: str) -> tuple[list[float], list[str]]:
    """Lower bounds of at least 95 % confidence, and alarms, on targets that hold this site's patients."""
    targets = {"student", *(f"{kind}:{site}" for kind in ("teacher", "discriminator", "student"))}
    try:
        audit: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        by_attack = [
            (str(entry["target"]), float(entry["epsilon"]["epsilon"]), float(audit["confidence"]))
            for entry in audit["attacks"]
        ]
        by_canaries = [
            (str(entry["target"]), float(entry["epsilon_lower_bound"]), float(entry["confidence"]))
            for entry in audit["one_run"]
        ]
        alarms = [str(line) for line in audit["alarms"] if str(line).partition(",")[0] in targets]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected the result of an audit, found something else ({error!r})") from error
    found = [
        bound
        for target, bound, confidence in (*by_attack, *by_canaries)
        if target in targets and confidence >= _LEAST_CONFIDENCE and math.isfinite(bound)
    ]
    return found, alarms


def _claim_of_site(folder: Path) -> Claim:
    """The claim of a site, as far as its key folder has witnessed it: a cut-off end of the ledger is noticed."""
    site = load_site(folder)
    if not site.private:
        return Claim(site.site_name, "none", None)
    ledger, keys = ((site.folder / name).resolve() for name in (site.ledger_dir, site.key_dir))
    if not (keys / KEY).exists() and not (keys / UNIVERSES).exists():
        return Claim(site.site_name, site.privacy_mode, ledger)  # a copy without its keys: `signed` says so
    try:
        claim = Claim(site.site_name, site.privacy_mode, ledger, key=ledger_key(keys))
        head = head_of(keys, read_policy(ledger / POLICY).universe)
    except PrivacyError as error:
        return Claim(site.site_name, site.privacy_mode, ledger, problem=str(error))
    if head is None:
        return replace(claim, problem=f"{keys}: expected the witness of the ledger in {ledger}, found none; restore it")
    return replace(claim, head=head)


def _claims_of_run(folder: Path) -> list[Claim]:
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        privacy: Mapping[str, Mapping[str, Any]] = summary["privacy"]
        named = set(summary["held_out"]) if isinstance(summary.get("held_out"), Mapping) else set()
        claims = [_claim_of_run(folder, site, terms) for site, terms in privacy.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected the privacy of each hospital, found something else ({error!r})") from error
    if (folder / LEDGERS).is_dir():
        named |= {ledger.name for ledger in (folder / LEDGERS).iterdir() if ledger.is_dir()}
    missing = sorted(named - set(privacy))
    if missing or not claims:
        raise InputError(
            f"{path}: expected the privacy of every hospital of the run, found none of {', '.join(missing) or 'any'}; "
            "the summary is incomplete, so nothing about the run is verified"
        )
    return claims


def _claim_of_run(folder: Path, site: str, terms: Mapping[str, Any]) -> Claim:
    if terms["mode"] == "none":
        return Claim(site, "none", None)
    return Claim(
        site,
        str(terms["mode"]),
        folder / LEDGERS / site,
        key=_key_beside(folder, site),
        head=Head(int(terms["ledger_head"]["sequence"]), str(terms["ledger_head"]["hash"])),
        epsilon=float(terms["epsilon"]),
        delta=float(terms["delta"]),
    )


def _key_beside(run: Path, site: str) -> bytes | None:
    """The site's key where the run holds its site files too (a demo); a real run never has it."""
    keys = run / "sites" / site / "keys"
    return ledger_key(keys) if (keys / KEY).is_file() and (run / "sites" / site / SITE_FILE).is_file() else None
