"""Canaries in a private teacher: no patient, no charge, a constant n, and noise that was left out is noticed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fediod_med import canaries
from fediod_med.auditing import AUDIT_FILE, RunFiles, audit_run
from fediod_med.canaries import OFF, canary_audit, canary_audits, claimed_epsilon, policy_of_run
from fediod_med.checkpoints import Provenance, save_state, save_weights, weights_digest
from fediod_med.claims import check_claim, find_claims, stated_with_audit
from fediod_med.cli.main import command_line
from fediod_med.data.phantoms import Grid, write_cohort
from fediod_med.errors import InputError, PrivacyError, SettingsError
from fediod_med.networks import PatchDiscriminator, build_segmenter
from fediod_med.privacy.accounting import rdp_epsilon
from fediod_med.privacy.gate import Gate
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import PrivacyPolicy
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.training import PrivateSchedule, PrivateTrainer
from fediod_med.private_teacher import private_schedule
from fediod_med.site_gate import open_gate, site_policy
from fediod_med.sites import Site, load_site

SETTINGS: dict[str, Any] = {
    "site_name": "north",
    "layout": "brats2018",
    "label_scheme": "brats2018",
    "folds": 2,
    "spacing": 8.0,
    "roi": 24,
    "width": 4,
    "depth": 2,
    "rehearsal": 0.0,
    "privacy_mode": "dp-sgd",
    "epsilon": 0.5,
    "private_steps": 2,
    "subspace": 2,
    "sample_rate": 1.0,
    "crops": 1,
}


def site_folder(folder: Path, data: Path, **settings: Any) -> Path:
    lines = SETTINGS | {"dataset_dir": str(data)} | settings
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of four phantom patients, two of them held out."""
    folder = tmp_path_factory.mktemp("data")
    write_cohort(folder, count=4, seed=1, grid=Grid((24, 24, 24), 8.0), prefix="NORTH")
    return folder


@pytest.fixture
def site(tmp_path: Path, data: Path) -> Site:
    """A private hospital whose ledger is open, and whose scans can be lost."""
    own = shutil.copytree(data, tmp_path / "scans")
    return load_site(site_folder(tmp_path / "sites" / "north", own))


def coarse_site(folder: Path, **settings: Any) -> tuple[Site, PrivacyPolicy]:
    """A hospital of 16 patients on a grid so coarse that training takes seconds; there are no scans at all."""
    site = load_site(site_folder(folder / "north", folder / "absent", spacing=16.0, roi=16, **settings))
    return site, site_policy(site, patients=16, universe="ab")


def every_second(count: int) -> list[bool]:
    return [number % 2 == 1 for number in range(count)]


def every_file(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what it may not touch --------------------------------------------------------------------------------------------


def test_no_patient_is_read_and_nothing_is_charged(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = open_gate(site)
    before, head = every_file(site.folder), gate.head
    shutil.rmtree(site.data_root)
    monkeypatch.setattr(Site, "subjects", lambda self: pytest.fail("patients were looked up"))
    monkeypatch.setattr(Gate, "open", lambda *_, **__: pytest.fail("a ledger was opened"))
    found, skipped = canary_audits([site], run=site.folder / "run", canaries=3, device="cpu")
    assert set(found) == {"teacher:north"} and not skipped
    assert (found["teacher:north"].canaries, found["teacher:north"].guesses) == (3, 3)
    assert every_file(site.folder) == before
    assert gate.head == head and gate.spent() == []


def test_the_policy_of_the_run_counts_before_the_sites_own(site: Site, tmp_path: Path) -> None:
    own = open_gate(site).policy
    assert policy_of_run(site, tmp_path / "run") == own
    copied = site_policy(dataclasses.replace(site, epsilon=0.3), patients=2, universe="ab")
    (tmp_path / "run" / "privacy" / "north").mkdir(parents=True)
    (tmp_path / "run" / "privacy" / "north" / "policy.json").write_bytes(copied.canonical())
    assert policy_of_run(site, tmp_path / "run") == copied != own
    assert policy_of_run(dataclasses.replace(site, ledger_dir="elsewhere"), tmp_path) is None


def test_sites_without_a_private_teacher_are_named(site: Site, tmp_path: Path) -> None:
    assert canary_audits([site], run=tmp_path, canaries=0) == ({}, [OFF])
    unprotected = dataclasses.replace(site, privacy_mode="none", epsilon=0.0)
    paper = dataclasses.replace(site, site_name="paper", privacy_mode="gradient", ledger_dir="paper", key_dir="k")
    open_gate(paper)
    found, skipped = canary_audits([unprotected, paper], run=tmp_path, canaries=2, device="cpu")
    assert found == {}
    assert [line.split(": ")[0] for line in skipped] == ["north, canaries", "paper, canaries"]
    assert "privacy_mode none" in skipped[0] and "privacy_mode gradient" in skipped[1]
    with pytest.raises(SettingsError, match="expected 0 or more, found -1"):
        canary_audits([site], run=tmp_path, canaries=-1)


# --- the mechanism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coins", "null"),
    [(lambda n: [True] * n, 0), (lambda n: [False] * n, 3), (every_second, 2)],
    ids=["all", "none", "half"],
)
@pytest.mark.parametrize(("patients", "places"), [(5, 5), (2, 3)])
def test_the_declared_number_of_patients_is_the_same_whatever_the_coins_show(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    coins: Callable[[int], Sequence[bool]],
    null: int,
    patients: int,
    places: int,
) -> None:
    site, policy = coarse_site(tmp_path)
    policy = dataclasses.replace(policy, patients=patients)
    seen: list[tuple[int, int, str]] = []

    def noted(network: torch.nn.Module, members: Sequence[Any], **options: Any) -> torch.nn.Module:
        seen.append((len(members), sum(not scans for scans in members), options["schedule"].digest()))
        return network

    monkeypatch.setattr(canaries, "train_private", noted)
    found = canary_audit(site, policy, canaries=3, coins=coins)
    (trained,) = seen
    assert trained[:2] == (places, null) and found.inserted == 3 - null
    start = canaries._untrained(site)
    init = weights_digest(start.state_dict())
    assert trained[2] == private_schedule(site, policy, init=init, device=torch.device("cpu")).digest()


def test_a_canary_that_was_left_out_contributes_nothing(tmp_path: Path) -> None:
    site, _ = coarse_site(tmp_path)
    network = build_segmenter(**site.network())
    before = [parameter.detach().clone() for parameter in network.parameters()]
    schedule = PrivateSchedule(Mechanism(1e-9, 1.0, 1), optimizer="sgd", learning_rate=1.0)
    trainer = PrivateTrainer(network, schedule, patients=4, per_row_loss=per_row_dice_ce)
    trainer.step(lambda _: canaries._no_crops(site))
    for now, then in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-7)


def test_the_claim_is_the_teachers_part_alone(tmp_path: Path) -> None:
    _, policy = coarse_site(tmp_path)
    part = policy.part("teacher")
    claimed = claimed_epsilon(policy)
    assert claimed == rdp_epsilon([Mechanism(part.noise_multiplier, part.sample_rate, part.steps)], 1e-5)
    assert claimed is not None and policy.epsilon is not None and 0.8 * policy.epsilon < claimed < policy.epsilon


def without_noise(*arguments: Any, **options: Any) -> PrivateSchedule:
    """The fault to be found: the schedule that is trained has a thousandth of a standard deviation."""
    schedule = private_schedule(*arguments, **options)
    return dataclasses.replace(schedule, mechanism=dataclasses.replace(schedule.mechanism, noise_multiplier=1e-3))


LEARNING: dict[str, Any] = {"width": 8, "init": "random", "private_rate": 0.02, "sample_rate": 0.9, "epsilon": 1.0}


@pytest.mark.parametrize("faulty", [True, False], ids=["without noise", "as claimed"])
def test_noise_that_was_left_out_is_found_and_the_claimed_noise_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: bool
) -> None:
    """Whole heads instead of augmented crops, so that seconds are enough; the slow test has those.

    With the noise in place, only 16 lucky guesses of 16 contradict: once in 12,870 runs.
    """
    site, policy = coarse_site(tmp_path, private_steps=40, **LEARNING)
    monkeypatch.setattr(
        canaries, "patient_crops", lambda scans, _: (scans[0]["image"][None].float(), scans[0]["label"].long())
    )
    if faulty:
        monkeypatch.setattr(canaries, "private_schedule", without_noise)
    found = canary_audit(site, policy, canaries=16, coins=every_second)
    assert found.claimed_epsilon is not None and found.claimed_epsilon < 1 < found.ceiling
    assert found.contradicts_claim == faulty
    if faulty:
        assert found.epsilon_lower_bound > 1


@pytest.mark.slow
def test_noise_that_was_left_out_is_found_with_the_sites_own_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, policy = coarse_site(
        tmp_path, private_steps=400, **(LEARNING | {"width": 16, "depth": 3, "private_rate": 0.01, "sample_rate": 0.5})
    )
    monkeypatch.setattr(canaries, "private_schedule", without_noise)
    found = canary_audit(site, policy, canaries=16, coins=every_second)
    assert found.contradicts_claim and found.epsilon_lower_bound > 1


def test_a_training_without_canaries_shows_nothing_and_is_refused(tmp_path: Path) -> None:
    site, policy = coarse_site(tmp_path)
    with pytest.raises(PrivacyError, match="expected guesses from 1"):
        canary_audit(site, dataclasses.replace(policy, patients=1), canaries=0)


# --- audits and reports -----------------------------------------------------------------------------------------------


def write_run(site: Site, run: Path, *, mode: str = "dp-sgd") -> None:
    """A run folder of one hospital, whose networks have learnt nothing."""
    terms = {"north": {"mode": mode, "epsilon": 0.5, "delta": 1e-5}}
    provenance = Provenance(
        kind="teacher",
        network=site.network(),
        spacing=site.spacing,
        label_scheme=site.label_scheme,
        sites=("north",),
        privacy=terms,
        trained_on="phantoms",
        seed=0,
        settings={"roi": site.roi},
    )
    weights = build_segmenter(**site.network()).state_dict()
    for name in ("teachers/north/model.safetensors", "student.safetensors"):
        save_weights(run / name, weights, provenance)
    save_state(
        run / "site_state" / "north" / "discriminator-ab.pt",
        {"training": {"network": PatchDiscriminator().state_dict()}},
    )


def test_the_command_audits_canaries_and_discriminators_and_the_report_takes_them_up(
    site: Site, tmp_path: Path
) -> None:
    open_gate(site)
    run = tmp_path / "run"
    write_run(site, run)
    words = ["privacy", "audit", str(run), "--sites", str(site.folder.parent), "--device", "cpu", "--quiet"]
    silent = CliRunner().invoke(command_line(), words, catch_exceptions=False)
    assert silent.exit_code == 0 and f"Skipped: {OFF}" in silent.output
    done = CliRunner().invoke(command_line(), [*words, "--canaries", "5"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "teacher:north, canaries: " in done.output and "of 5 guesses right on 5 canaries" in done.output
    assert "discriminator:north, realism score" in done.output and "Skipped" not in done.output
    audit = json.loads((run / "audit" / AUDIT_FILE).read_text())
    assert audit["one_run"][0]["target"] == "teacher:north" and audit["skipped"] == []
    assert audit["one_run"][0]["claimed_epsilon"] < 0.5
    assert audit["one_run"][0]["ceiling"] >= audit["one_run"][0]["epsilon_lower_bound"] >= 0

    shutil.copytree(run / "audit", site.folder / "audit")
    report = CliRunner().invoke(command_line(), ["privacy", "report", str(site.folder)], catch_exceptions=False)
    assert re.search(r"Empirical lower bound 0\.\d\d \(95 %\) from audit\.json, the largest of 6\.", report.output)
    shutil.rmtree(site.folder / "audit")
    report = CliRunner().invoke(command_line(), ["privacy", "report", str(site.folder)], catch_exceptions=False)
    assert "No empirical audit is attached" in report.output


def audit_of(path: Path, *bounds: tuple[str, float], confidence: float = 0.95, alarms: Sequence[str] = ()) -> Path:
    attacks = [{"target": target, "epsilon": {"epsilon": bound}} for target, bound in bounds]
    path.write_text(json.dumps({"confidence": confidence, "attacks": attacks, "one_run": [], "alarms": [*alarms]}))
    return path


def test_a_report_states_the_largest_bound_on_this_sites_patients(site: Site, tmp_path: Path) -> None:
    open_gate(site)
    (claim,) = find_claims(site.folder)
    found = check_claim(claim, with_dp_accounting=False)
    path = tmp_path / AUDIT_FILE
    assert stated_with_audit(found, path) == found.statement
    several = audit_of(path, ("teacher:north", 0.1), ("student", 0.2), ("teacher:south", 0.4))
    assert "Empirical lower bound 0.20 (95 %) from audit.json, the largest of 2." in stated_with_audit(found, several)
    of_others = audit_of(path, ("teacher:south", 0.4), alarms=["teacher:south, loss"])
    assert stated_with_audit(found, of_others) == found.statement
    weak = audit_of(path, ("teacher:north", 0.4), confidence=0.8)
    assert stated_with_audit(found, weak) == found.statement
    broken = audit_of(path, ("teacher:north", 3.0), alarms=["teacher:north, loss", "teacher:south, loss"])
    told = stated_with_audit(found, broken)
    assert "3.00 (95 %) from audit.json; CONTRADICTED, look for a fault (teacher:north, loss)." in told
    unverified = dataclasses.replace(found, ok=False, statement="NOT VERIFIED")
    assert stated_with_audit(unverified, broken) == "NOT VERIFIED"
    path.write_text("[]")
    with pytest.raises(InputError, match="expected the result of an audit"):
        stated_with_audit(found, path)


def test_canaries_are_enough_where_nobody_is_held_out(site: Site, tmp_path: Path) -> None:
    open_gate(site)
    whole = dataclasses.replace(site, folds=1)
    found, _ = canary_audits([whole], run=tmp_path, canaries=2, device="cpu")
    drawn: list[Path] = []
    result = audit_run(
        [whole],
        files=RunFiles({}),
        out=tmp_path,
        one_run=found,
        figures=lambda folder, _: drawn.append(folder),
        device="cpu",
    )
    assert result["skipped"] == ["north: no held-out patients; set folds: 2 or more"]
    assert len(result["one_run"]) == 1 and not drawn


@pytest.mark.parametrize(("mode", "promised"), [("dp-sgd", True), ("gradient", False)])
def test_only_a_discriminator_that_was_trained_privately_carries_a_claim(
    site: Site, tmp_path: Path, mode: str, promised: bool
) -> None:
    write_run(site, tmp_path, mode=mode)
    result = audit_run(
        [site],
        files=RunFiles({}, tmp_path / "student.safetensors"),
        out=tmp_path,
        discriminators={"north": lambda volume: float(volume.mean())},
        device="cpu",
    )
    (entry,) = [attack for attack in result["attacks"] if attack["target"] == "discriminator:north"]
    assert (entry["claim"] is not None) == promised
