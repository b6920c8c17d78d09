"""A claim is checked at the record that it rests on, for every hospital of a run, and against the site's witness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fediod_med.claims import check_claim, find_claims, stated_with_audit
from fediod_med.errors import InputError
from fediod_med.privacy.gate import Gate
from fediod_med.privacy.keys import ledger_key
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import PrivacyPolicy, count_part, training_part, universe_id
from fediod_med.privacy.verify import Verification

pytest.importorskip("opacus")
PARTS = {
    "counts": count_part(Mechanism(9.0, 1.0, 9), dim=2),
    "teacher": training_part(Mechanism(9.0, 1.0, 5), clip_norm=1.0),
}


def gate_of(folder: Path, name: str = "h0", patients: tuple[str, ...] = ("p1", "p2")) -> Gate:
    """The gate of a site folder, with `site.yaml` that names its ledger."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text(
        f"site_name: {name}\nlayout: brats2018\nlabel_scheme: brats2018\ndataset_dir: .\nbackbone: unet\nwidth: 16\n"
        "spacing: 6.0\nroi: 32\nepsilon: 8.0\n"
    )
    universe = universe_id(patients, ledger_key(folder / "keys"))
    policy = PrivacyPolicy(
        site=name, mode="dp-sgd", epsilon=8.0, delta=1e-5, patients=2, universe=universe, parts=PARTS
    )  # fmt: skip
    return Gate.open(folder / "privacy", key_folder=folder / "keys", policy=policy, patients=patients)


def count(gate: Gate, query: str) -> None:
    gate.release("counts", query_id=query, query_digest="d", compute=lambda: np.eye(2), seal=lambda v: v.tobytes())


def terms_of(gate: Gate) -> dict[str, Any]:
    assert gate.head is not None
    return {
        "mode": "dp-sgd",
        "epsilon": gate.spent_epsilon(),
        "delta": 1e-5,
        "ledger_head": {"sequence": gate.head.sequence, "hash": gate.head.hash},
    }


def write_summary(run: Path, privacy: object, **more: object) -> None:
    (run / "summary.json").write_text(json.dumps({"privacy": privacy, **more}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two hospitals that have spent on a release each, as it was when it ended."""
    run, privacy = tmp_path / "run", {}
    for name in ("h0", "h1"):
        gate = gate_of(tmp_path / name, name)
        count(gate, "q")
        privacy[name] = terms_of(gate)
        shutil.copytree(tmp_path / name / "privacy", run / "privacy" / name)
    write_summary(run, privacy)
    return run


def changed(run: Path, **terms: object) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["privacy"]["h0"] |= terms
    (run / "summary.json").write_text(json.dumps(summary))


def first(target: Path) -> Verification:
    return check_claim(find_claims(target)[0], with_dp_accounting=False)


def grow(run: Path) -> float:
    """The hospital goes on spending, and its ledger in the run's folder with it; what was spent in the end."""
    gate = gate_of(run.parent / "h0")
    for query in "rstu":
        count(gate, query)
    shutil.copytree(run.parent / "h0" / "privacy", run / "privacy" / "h0", dirs_exist_ok=True)
    spent = gate.spent_epsilon()
    assert spent is not None
    return spent


def test_a_claim_stays_right_when_its_ledger_grows_and_the_growth_is_told(run: Path) -> None:
    before = first(run)
    assert before.ok and before.growth == ""
    claimed = json.loads((run / "summary.json").read_text())["privacy"]["h0"]["epsilon"]
    spent = grow(run)
    found = first(run)
    assert found.ok and found.epsilon is not None and found.epsilon.rdp == pytest.approx(spent)
    assert found.witnessed is not None and found.witnessed.epsilon == pytest.approx(claimed)
    assert f"epsilon {claimed:.4g} then, {spent:.4g} now" in found.growth and found.growth in found.statement


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.999, 1.001, 2.0])
@pytest.mark.parametrize("grown", [False, True])
def test_another_epsilon_than_the_ledgers_at_the_claims_record_is_found(run: Path, factor: float, grown: bool) -> None:
    if grown:
        grow(run)
    found = first(run)
    assert found.ok and found.witnessed is not None
    changed(run, epsilon=factor * found.witnessed.epsilon)
    found = first(run)
    assert not found.ok and "claims epsilon" in found.problems[0]
    assert found.statement.startswith("NOT VERIFIED") and "no bound on patient leakage is claimed" in found.statement


def test_the_epsilon_of_a_later_record_does_not_excuse_an_earlier_one(run: Path) -> None:
    changed(run, epsilon=grow(run))
    assert not first(run).ok


@pytest.mark.parametrize("terms", [{"delta": 1e-2}, {"mode": "gradient"}])
def test_another_delta_or_mode_is_found(run: Path, terms: dict[str, object]) -> None:
    grow(run)
    changed(run, **terms)
    assert not first(run).ok


def test_a_claim_on_a_record_that_is_not_there_is_found(run: Path) -> None:
    changed(run, ledger_head={"sequence": 1, "hash": "0" * 64})
    found = first(run)
    assert not found.ok and found.witnessed is None


@pytest.mark.parametrize("privacy", [{}, [], None, "NOT PRIVATE", {"h0": {}}])
def test_a_summary_without_claims_is_no_claim(run: Path, privacy: object) -> None:
    for folder in (None, run / "privacy"):
        if folder is not None:
            shutil.rmtree(folder)
        write_summary(run, privacy)
        with pytest.raises(InputError, match="expected the privacy of"):
            find_claims(run)


def test_a_hospital_that_the_summary_leaves_out_is_missed(run: Path) -> None:
    privacy = json.loads((run / "summary.json").read_text())["privacy"]
    write_summary(run, {"h0": privacy["h0"]})
    with pytest.raises(InputError, match="found none of h1"):
        find_claims(run)
    shutil.rmtree(run / "privacy" / "h1")
    assert [claim.site for claim in find_claims(run)] == ["h0"]
    write_summary(run, {"h0": privacy["h0"]}, held_out={"h0": "fold 0 of 2", "h1": "fold 0 of 2"})
    with pytest.raises(InputError, match="found none of h1"):
        find_claims(run)


# --- sites -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    gate = gate_of(tmp_path / "h0")
    for query in "qrs":
        count(gate, query)
    return tmp_path / "h0"


def cut(site: Path, lines: int) -> None:
    ledger = site / "privacy" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-lines]))


def test_a_site_verifies_with_its_key_and_witness(site: Path) -> None:
    found = first(site)
    assert found.ok and found.signed and found.growth == ""


@pytest.mark.parametrize("lines", [1, 2, 5])
def test_records_cut_from_the_end_of_a_sites_ledger_are_missed(site: Path, lines: int) -> None:
    cut(site, lines)
    found = first(site)
    assert not found.ok and "was witnessed, and is missing" in found.problems[0]


def test_records_cut_after_the_patients_changed_are_missed(site: Path) -> None:
    gate = gate_of(site, patients=("p2", "p3"))
    count(gate, "t")
    found = first(site)
    assert found.ok and found.patient_sets == 2
    assert "Patients joined or left (2 sets): each is charged with all releases" in found.statement
    cut(site, 1)
    assert not first(site).ok


@pytest.mark.parametrize("lost", ["universes", "ledger.key"])
def test_a_site_whose_witness_or_key_is_lost_does_not_verify(site: Path, lost: str) -> None:
    path = site / "keys" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = first(site)
    assert not found.ok and any(word in found.problems[0] for word in ("witness", "the key is missing"))
    assert not (site / "keys" / "ledger.key").exists() or lost == "universes"


def test_a_copy_of_a_site_without_its_keys_verifies_unsigned(site: Path) -> None:
    shutil.rmtree(site / "keys")
    found = first(site)
    assert found.ok and not found.signed and not (site / "keys").exists()


def test_an_audits_bound_joins_the_statement_and_keeps_the_rest(run: Path, tmp_path: Path) -> None:
    grow(run)
    found, audit = first(run), tmp_path / "audit.json"
    assert stated_with_audit(found, audit) == found.statement
    attack = {"target": "teacher:h0", "epsilon": {"epsilon": 0.25}}
    audit.write_text(json.dumps({"confidence": 0.95, "attacks": [attack], "one_run": [], "alarms": []}))
    stated = stated_with_audit(found, audit)
    assert "Empirical lower bound 0.25" in stated and stated.endswith(found.growth)
