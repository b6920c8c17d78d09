from __future__ import annotations

import ast
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fediod_med.errors import BudgetExceeded, PrivacyError
from fediod_med.privacy import gate as gate_module
from fediod_med.privacy import mechanisms
from fediod_med.privacy import release as release_module
from fediod_med.privacy.accounting import gaussian_epsilon, rdp_epsilon
from fediod_med.privacy.gate import Gate, digest_of
from fediod_med.privacy.keys import ledger_key
from fediod_med.privacy.ledger import PrivacyLedger
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.noise import SeededNoise
from fediod_med.privacy.policy import (
    PolicyPart,
    PrivacyPolicy,
    count_part,
    release_part,
    sample_release_part,
    training_part,
    universe_id,
)
from fediod_med.privacy.records import Head, Record
from fediod_med.privacy.statement import NOT_PRIVATE
from fediod_med.privacy.verify import verify_ledger

pytest.importorskip("opacus")
PATIENTS = ("p1", "p2")


def policy(root: Path, parts: dict[str, PolicyPart], **changes) -> PrivacyPolicy:
    universe = universe_id(PATIENTS, ledger_key(root / "key"))
    mode = "dp-sgd" if "teacher" in parts else "gradient"
    values = {
        "site": "a",
        "mode": mode,
        "epsilon": 8.0,
        "delta": 1e-5,
        "patients": 3,
        "universe": universe,
        "parts": parts,
    }
    return PrivacyPolicy(**{**values, **changes})


def open_gate(root: Path, parts: dict[str, PolicyPart], *, source=None, **changes) -> Gate:
    return Gate.open(
        root / "log",
        key_folder=root / "key",
        policy=policy(root, parts, **changes),
        patients=PATIENTS,
        source=source,
    )


def answer(noise=4.0, most=5, **kwargs) -> dict[str, PolicyPart]:
    return {"answer": release_part(Mechanism(noise, 1.0, most), clip_norm=1.0, **kwargs)}


def trained() -> dict[str, PolicyPart]:
    return {
        "teacher": training_part(Mechanism(2.0, 0.2, 20), clip_norm=1.0),
        "discriminator": training_part(Mechanism(2.0, 0.2, 10), clip_norm=1.0),
    }


def ask(gate: Gate, query: str = "q", *, value=(0.6, 0.8), digest: str = "d", kind: str = "answer", calls=None):
    def compute() -> np.ndarray:
        if calls is not None:
            calls.append(query)
        return np.array(value, dtype=float)

    return gate.release(kind, query_id=query, query_digest=digest, compute=compute, seal=lambda v: v.tobytes())


def number(sealed) -> np.ndarray:
    return np.frombuffer(sealed.payload)


def test_a_known_query_returns_the_same_bytes_without_charge_or_computation(tmp_path):
    calls: list[str] = []
    gate = open_gate(tmp_path, answer())
    first = ask(gate, calls=calls)
    spent = gate.spent_epsilon()
    reopened = open_gate(tmp_path, answer())
    for again in (ask(gate, calls=calls), ask(reopened, calls=calls)):
        assert again.payload == first.payload and again.head == first.head
    assert calls == ["q"] and reopened.spent_epsilon() == spent


@pytest.mark.parametrize("change", [{"digest": "other"}, {"kind": "pull_back"}])
def test_another_query_under_a_used_id_is_refused(tmp_path, change):
    part = answer()["answer"]
    gate = open_gate(tmp_path, {"answer": part, "pull_back": part})
    ask(gate)
    before = gate.head
    calls: list[str] = []
    with pytest.raises(PrivacyError, match="used for another query"):
        ask(gate, calls=calls, **change)
    assert calls == [] and gate.head == before


def test_a_budget_refuses_before_private_data_are_touched(tmp_path):
    noise, epsilon = 4.0, 2.0
    gate = open_gate(tmp_path, answer(noise, most=1000), epsilon=epsilon)
    calls: list[str] = []
    affordable = max(n for n in range(1, 20) if rdp_epsilon([Mechanism(noise, 1.0, n)], 1e-5) <= epsilon)
    assert affordable > 2
    for i in range(affordable):
        ask(gate, f"q{i}", calls=calls)
    with pytest.raises(BudgetExceeded, match="nothing was computed"):
        ask(gate, "q998", calls=calls)
    spent = gate.spent_epsilon()
    assert spent is not None and spent <= epsilon
    assert gate.remaining() == pytest.approx(epsilon - spent)
    with pytest.raises(BudgetExceeded):  # a new process has no new budget
        ask(open_gate(tmp_path, answer(noise, most=1000), epsilon=epsilon), "q999", calls=calls)
    assert len(calls) == affordable


def test_the_number_of_releases_is_bounded_retries_included(tmp_path):
    gate = open_gate(tmp_path, answer(50.0, most=3))
    for i in range(2):
        ask(gate, f"q{i}")
    with pytest.raises(ZeroDivisionError):
        gate.release("answer", query_id="x", query_digest="d", compute=lambda: np.array(1 // 0), seal=bytes)
    with pytest.raises(BudgetExceeded, match="allows 3"):
        ask(gate, "x")


@pytest.mark.parametrize("stage", ["compute", "seal"])
def test_what_fails_after_the_charge_stays_charged_and_a_retry_is_a_new_charge(tmp_path, stage):
    def fail(*_):
        raise RuntimeError(stage)

    gate = open_gate(tmp_path, answer())
    functions = {"compute": lambda: np.ones(2), "seal": lambda v: v.tobytes(), stage: fail}
    with pytest.raises(RuntimeError, match=stage):
        gate.release("answer", query_id="q", query_digest="d", **functions)
    reopened = open_gate(tmp_path, answer())
    one = rdp_epsilon([Mechanism(4.0, 1.0, 1)], 1e-5)
    assert reopened.spent_epsilon() == pytest.approx(one)
    ask(reopened)
    assert reopened.spent_epsilon() == pytest.approx(rdp_epsilon([Mechanism(4.0, 1.0, 2)], 1e-5))
    assert verify_ledger(tmp_path / "log").ok


def charges_before_computing(root: Path) -> bool:
    """Whether the file holds the charge when private data are touched, and still holds it after a crash there."""
    gate, seen = open_gate(root, answer()), []

    def charges() -> int:
        return (root / "log" / "ledger.jsonl").read_bytes().count(b'"event":"charge"')

    def crash() -> np.ndarray:
        seen.append(charges())
        raise MemoryError

    with pytest.raises(MemoryError):
        gate.release("answer", query_id="q", query_digest="d", compute=crash, seal=lambda v: v.tobytes())
    return seen == [1] and charges() == 1 and open_gate(root, answer()).spent_epsilon() != 0


def test_the_charge_is_on_disk_before_private_data_are_touched(tmp_path):
    assert charges_before_computing(tmp_path)


def test_a_gate_that_charges_after_the_release_is_seen(tmp_path, monkeypatch):
    append, waiting = PrivacyLedger.append, []

    def late(self, event, body):
        if event == "charge":
            waiting.append(body)
            return Record(self.head.sequence + 1, "", event, "", "", "", False, body)
        if waiting:
            append(self, "charge", waiting.pop())
        return append(self, event, body)

    monkeypatch.setattr(PrivacyLedger, "append", late)
    assert not charges_before_computing(tmp_path)


def test_outputs_of_the_wrong_shape_do_not_leave(tmp_path):
    gate = open_gate(tmp_path, answer(50.0, most=9, dim=2) | {"counts": count_part(Mechanism(9.0, 1.0, 9), dim=2)})
    for kind, value in (
        ("answer", (1, 2, 3)),
        ("counts", (1, 2)),
        ("counts", np.zeros((4, 2))),
        ("counts", np.zeros((2, 3))),
    ):
        with pytest.raises(PrivacyError, match="expected"):
            ask(gate, f"{kind}{np.shape(value)}", kind=kind, value=value)


def test_kinds_that_the_policy_does_not_foresee_do_not_leave(tmp_path):
    gate = open_gate(tmp_path, answer())
    calls: list[str] = []
    with pytest.raises(PrivacyError, match="policy's kinds"):
        ask(gate, kind="counts", calls=calls)
    with pytest.raises(PrivacyError, match="policy's kinds"):
        gate.begin_training("teacher", run_id="r", settings_digest="s")
    assert calls == []


# --- planted faults: an empirical lower bound on mu through the real gate --------------------------------------------


def empirical_mu(gate: Gate, kind: str, present, absent, count=1000) -> tuple[float, np.ndarray]:
    """95 % lower bound on mu between two neighbouring worlds, from `count` releases in each; and the noise seen."""
    worlds = []
    for name, value in (("in", present), ("out", absent)):
        releases = [number(ask(gate, f"{name}{i}", kind=kind, value=value)) for i in range(count)]
        worlds.append(np.array(releases))
    # Direction and threshold are chosen on the first fifth of the releases, the rest is counted.
    pilot = count // 5
    centres = [world[:pilot].mean(axis=0) for world in worlds]
    direction = centres[0] - centres[1]
    inside, outside = ((world[pilot:] - (centres[0] + centres[1]) / 2) @ direction for world in worlds)
    n = count - pilot
    hits, false = int((inside > 0).sum()), int((outside > 0).sum())
    tpr_low = stats.beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    fpr_high = stats.beta.ppf(0.975, false + 1, n - false) if false < n else 1.0
    noise = np.concatenate([(world - world.mean(axis=0)).ravel() for world in worlds])
    return float(stats.norm.ppf(tpr_low) - stats.norm.ppf(fpr_high)), noise


V = np.array([3.0, -4.0, 12.0])
UNIT = Mechanism(0.5, 1.0, 9999)  # mu = 2: an audit of 2000 releases recovers 85 to 95 % of it
OTHERS = [[1, 0, 1, 0], [1, 0, 0, 0]]
CASES = {
    # kind, part (built when a fault may be in place), the two neighbouring worlds, true sensitivity
    "joint": ("answer", lambda: release_part(UNIT, clip_norm=0.5), V, -V, 1.0),
    "samples": ("answer", lambda: sample_release_part(UNIT, clip_norm=0.5, rows=4), [V] * 4, [-V] * 4, 2.0),
    "counts": (
        "counts", lambda: count_part(UNIT, dim=4),
        mechanisms.presence_rows([[1] * 4, *OTHERS]), mechanisms.presence_rows([[0] * 4, *OTHERS]), 1.0,
    ),
}  # fmt: skip


@pytest.fixture
def fast_root(tmp_path) -> Iterator[Path]:
    """In memory where there is such a folder: a disk is slow at replacing files thousands of times."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            yield Path(folder)
    else:
        yield tmp_path


def audit(root, monkeypatch, case: str) -> tuple[float, float, float]:
    """Empirical mu, claimed mu of one release, and noise deviation over what the policy promises."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of releases; nothing here is about power failures
    kind, build, present, absent, sensitivity = CASES[case]
    part = build()
    gate = open_gate(root, {kind: part}, epsilon=1e7)
    mu, noise = empirical_mu(gate, kind, present, absent)
    return mu, 1 / part.noise_multiplier, float(noise.std()) / (part.noise_multiplier * sensitivity)


def passes_audit(mu: float, claimed: float, deviation: float) -> bool:
    # 2000 releases of at least 3 coordinates: the deviation of 6000 normals lies within 6 % but for one in 1e10.
    return mu <= 1.1 * claimed and abs(deviation - 1) < 0.06


@pytest.mark.parametrize("case", CASES)
def test_the_gate_leaks_no_more_than_it_charges(fast_root, monkeypatch, case):
    mu, claimed, deviation = audit(fast_root, monkeypatch, case)
    assert claimed == 2
    assert passes_audit(mu, claimed, deviation)
    assert mu > 0.7 * claimed  # the audit can see: it recovers most of what the mechanism leaks


def halved(vector, std, grid, source=None):
    return mechanisms.clip_joint(vector, math.inf) + std / 2 * np.asarray(source.normal(np.shape(vector)))


def noise_for_a_mean(vector, std, grid, source=None):
    return np.asarray(vector) + std / 3 * np.asarray(source.normal(np.shape(vector)))


def no_noise(vector, std, grid, source=None):
    return np.asarray(vector) + 1e-9 * np.asarray(source.normal(np.shape(vector)))


FAULTS = {
    "s/C in place of s/(2C)": ("joint", mechanisms, "release_sensitivity", lambda C: C),
    "sqrt(B) missing": ("samples", mechanisms, "per_sample_sensitivity", lambda C, B: 2 * C),
    "noise halved": ("joint", release_module, "grid_gaussian", halved),
    "noise of a mean on a sum": ("counts", release_module, "grid_gaussian", noise_for_a_mean),
    "noise dropped": ("joint", release_module, "grid_gaussian", no_noise),
    "patients not clipped": ("counts", mechanisms, "clip_rows", lambda rows, C: np.asarray(rows) * 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fast_root, monkeypatch, fault):
    case, module, name, mutant = FAULTS[fault]
    monkeypatch.setattr(module, name, mutant)
    mu, claimed, deviation = audit(fast_root, monkeypatch, case)
    assert mu > 1.1 * claimed
    assert not passes_audit(mu, claimed, deviation)


def test_counts_are_sums_and_not_means(tmp_path, monkeypatch):
    rows = mechanisms.presence_rows([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    gate = open_gate(tmp_path, {"counts": count_part(Mechanism(0.01, 1.0, 9), dim=4)}, epsilon=1e7)
    assert number(ask(gate, kind="counts", value=rows)) == pytest.approx([1.5, 1.0, 0.5, 0.0], abs=0.08)


def test_a_patient_counted_twice_is_refused(tmp_path):
    gate = open_gate(tmp_path, {"counts": count_part(Mechanism(1.0, 1.0, 9), dim=2)})
    with pytest.raises(PrivacyError, match="up to 3 patients"):
        ask(gate, kind="counts", value=np.zeros((4, 2)))


def test_seeded_noise_is_refused_or_brands_everything(tmp_path):
    with pytest.raises(PrivacyError, match="reproducible"):
        open_gate(tmp_path, answer(), source=SeededNoise(0))
    first = ask(open_gate(tmp_path / "1", answer(), source=SeededNoise(0), insecure=True))
    again = ask(open_gate(tmp_path / "2", answer(), source=SeededNoise(0), insecure=True))
    assert first.payload == again.payload  # what the brand warns of
    done = verify_ledger(tmp_path / "1" / "log")
    assert not done.ok and "INSECURE" in done.problems[0] and done.epsilon is None
    assert all(
        b'"insecure":true' in line for line in (tmp_path / "1" / "log" / "ledger.jsonl").read_bytes().splitlines()
    )


def test_noise_is_fresh_for_every_query_and_site(tmp_path):
    gates = [open_gate(tmp_path / name, answer()) for name in "ab"]
    values = [tuple(number(ask(gate, f"q{i}"))) for gate in gates for i in range(3)]
    assert len(set(values)) == 6


# --- trainings -------------------------------------------------------------------------------------------------------


def test_training_is_charged_in_full_once_and_resumes_on_its_permit(tmp_path):
    gate = open_gate(tmp_path, trained())
    permit = gate.begin_training("teacher", run_id="r", settings_digest="s")
    cost = rdp_epsilon([Mechanism(2.0, 0.2, 20)], 1e-5)
    assert not permit.resumed and gate.spent_epsilon() == pytest.approx(cost)
    del gate  # the process that trained is gone
    gate = open_gate(tmp_path, trained())
    resumed = gate.begin_training("teacher", run_id="r", settings_digest="s")
    assert resumed.resumed and resumed.permit_id == permit.permit_id
    assert gate.spent_epsilon() == pytest.approx(cost)
    gate.finish_training(resumed, "w")
    gate.finish_training(resumed, "w")
    with pytest.raises(PrivacyError, match="other weights"):
        gate.finish_training(resumed, "v")
    assert gate.permit_for("w").permit_id == permit.permit_id
    again = gate.begin_training("teacher", run_id="r", settings_digest="s")
    assert not again.resumed and again.permit_id != permit.permit_id
    assert gate.spent_epsilon() == pytest.approx(rdp_epsilon([Mechanism(2.0, 0.2, 40)], 1e-5))


def test_other_settings_are_another_training_and_over_budget_it_is_refused(tmp_path):
    gate = open_gate(tmp_path, trained(), epsilon=rdp_epsilon([Mechanism(2.0, 0.2, 25)], 1e-5))
    gate.begin_training("teacher", run_id="r", settings_digest="s")
    with pytest.raises(BudgetExceeded):
        gate.begin_training("teacher", run_id="r", settings_digest="t")
    with pytest.raises(BudgetExceeded):
        gate.begin_training("discriminator", run_id="r", settings_digest="s")


def test_one_permit_is_not_trained_twice_at_once(tmp_path):
    first, second = open_gate(tmp_path, trained()), open_gate(tmp_path, trained())
    permit = first.begin_training("teacher", run_id="r", settings_digest="s")
    with pytest.raises(PrivacyError, match="another process"):
        second.begin_training("teacher", run_id="r", settings_digest="s")
    first.finish_training(permit, "w")
    assert not second.begin_training("teacher", run_id="r", settings_digest="s").resumed


def test_only_models_with_a_permit_pass_freely(tmp_path):
    gate, calls = open_gate(tmp_path, trained()), []

    def payload() -> bytes:
        calls.append(1)
        return b"x"

    teacher = gate.begin_training("teacher", run_id="r", settings_digest="s")
    critic = gate.begin_training("discriminator", run_id="r", settings_digest="s")
    for permits in ([], ["0" * 64], [teacher.permit_id], [critic.permit_id, teacher.permit_id]):
        with pytest.raises(PrivacyError):
            gate.pass_through(payload, permits=permits, floor_mode="none")
    assert calls == []
    gate.finish_training(teacher, "w")
    spent = gate.spent_epsilon()
    both = frozenset({"teacher", "discriminator"})
    sealed = gate.pass_through(
        payload, permits=[teacher.permit_id, critic.permit_id], kinds=both, floor_mode="dp-sgd"
    )  # fmt: skip
    assert (sealed.payload, sealed.mode, sealed.head) == (b"x", "dp-sgd", gate.head)
    assert gate.spent_epsilon() == spent
    with pytest.raises(PrivacyError, match="no permit"):
        gate.permit_for("unknown weights")


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["discriminator"], {"discriminator"}),  # a teacher is always involved
        (["discriminator"], {"teacher"}),
        (["teacher"], {"teacher", "discriminator"}),
        (["teacher", "discriminator"], {"teacher"}),
        (["teacher", "teacher"], {"teacher"}),
        (["teacher", "teacher"], {"teacher", "discriminator"}),
    ],
)
def test_every_model_involved_needs_its_own_permit(tmp_path, names, kinds):
    gate = open_gate(tmp_path, trained())
    permits = {kind: gate.begin_training(kind, run_id="r", settings_digest="s") for kind in trained()}
    gate.finish_training(permits["teacher"], "w")
    given = [permits[name].permit_id for name in names]
    with pytest.raises(PrivacyError, match="expected one permit for each of"):
        gate.pass_through(lambda: pytest.fail("computed"), permits=given, kinds=frozenset(kinds), floor_mode="none")


def test_updates_are_counted_in_the_key_folder_and_never_given_out_twice(tmp_path):
    gate = open_gate(tmp_path, trained())
    permit = gate.begin_training("discriminator", run_id="r", settings_digest="s").permit_id
    assert gate.progress(permit) == 0
    gate.advance(permit, 1)
    gate.advance(permit, 4)
    del gate  # nothing that a process or a run folder holds
    gate = open_gate(tmp_path, trained())
    assert gate.begin_training("discriminator", run_id="r", settings_digest="s").resumed
    assert gate.progress(permit) == 4
    for number in (4, 1, 0):
        with pytest.raises(PrivacyError, match="update 4 was begun already"):
            gate.advance(permit, number)
    gate.begin_training("teacher", run_id="r", settings_digest="s")  # other records leave the count alone
    gate.advance(permit, 10)
    with pytest.raises(BudgetExceeded, match="10 were paid for"):
        gate.advance(permit, 11)
    assert gate.progress(permit) == 10


def test_an_update_is_on_disk_before_it_is_let_be_made(tmp_path, monkeypatch):
    gate = open_gate(tmp_path, trained())
    permit = gate.begin_training("discriminator", run_id="r", settings_digest="s").permit_id
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(os.fstat(descriptor))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    gate.advance(permit, 1)
    (witness,) = (tmp_path / "key" / "universes").glob("*.json")
    assert {witness.stat().st_ino, witness.parent.stat().st_ino} <= {stat.st_ino for stat in synced}


def test_finished_or_unknown_trainings_make_no_updates(tmp_path):
    gate = open_gate(tmp_path, trained())
    permit = gate.begin_training("teacher", run_id="r", settings_digest="s")
    gate.finish_training(permit, "w")
    with pytest.raises(PrivacyError, match="it is finished"):
        gate.advance(permit.permit_id, 1)
    for call in (gate.progress, lambda permit_id: gate.advance(permit_id, 1)):
        with pytest.raises(PrivacyError, match="expected a permit of this ledger"):
            call("0" * 64)
    with pytest.raises(PrivacyError, match="mode none"):
        Gate.unprotected("a").advance(permit.permit_id, 1)


def test_nothing_passes_freely_in_mode_gradient_and_a_floor_holds(tmp_path):
    gate = open_gate(tmp_path, answer())
    with pytest.raises(PrivacyError, match="charged release"):
        gate.pass_through(bytes, permits=["0"], floor_mode="none")
    for weak, floor in ((gate, "dp-sgd"), (Gate.unprotected("b"), "gradient"), (Gate.unprotected("b"), "typo")):
        with pytest.raises(PrivacyError, match="below"):
            weak.pass_through(bytes, permits=[], floor_mode=floor)


def test_mode_none_lets_everything_through_and_claims_nothing(tmp_path):
    for gate in (Gate.unprotected("a"), open_gate(tmp_path, {}, mode="none", epsilon=None, delta=None)):
        sealed = ask(gate, value=(30.0, 40.0))
        assert number(sealed).tolist() == [30.0, 40.0] and (sealed.mode, sealed.head) == ("none", None)
        assert number(ask(gate, kind="counts", value=[[1, 0], [1, 1]])).tolist() == [2.0, 1.0]
        assert gate.pass_through(lambda: b"y", permits=[], floor_mode="none").payload == b"y"
        assert gate.spent_epsilon() is None and gate.remaining() is None
        gate.witness(None)
        with pytest.raises(PrivacyError, match="mode none"):
            gate.begin_training("teacher", run_id="r", settings_digest="s")
    assert not (tmp_path / "log").exists()


def test_the_centre_notices_a_ledger_that_it_has_seen_further(tmp_path):
    gate = open_gate(tmp_path, answer())
    seen = ask(gate).head
    gate.witness(seen)
    ask(gate, "q2")
    gate.witness(seen)
    for head in (Head(99, "0" * 64), Head(seen.sequence, "0" * 64)):
        with pytest.raises(PrivacyError, match="centre has seen"):
            gate.witness(head)
    with pytest.raises(PrivacyError, match="centre has seen"):
        Gate.unprotected("a").witness(seen)


def test_the_report_states_the_claim_and_its_limits(tmp_path):
    gate = open_gate(tmp_path, answer())
    for i in range(5):
        ask(gate, f"q{i}")
    done = verify_ledger(tmp_path / "log", key=ledger_key(tmp_path / "key"), head=gate.head)
    assert done.ok and done.signed and done.epsilon is not None
    assert done.epsilon.exact == pytest.approx(gaussian_epsilon(math.sqrt(5) / 4, 1e-5))
    assert done.epsilon.rdp == pytest.approx(gate.spent_epsilon())
    assert (done.by_kind["answer"].charges, done.by_kind["answer"].finished) == (5, 5)
    for part in ("-DP per patient of site a", "delta = 1e-05", "null replacement", "Mode gradient", "RDP", "Excluded"):
        assert part in done.statement
    assert NOT_PRIVATE not in done.statement


def test_digests_do_not_confuse_where_parts_end():
    assert digest_of(b"ab", b"c") != digest_of(b"a", b"bc") != digest_of(b"abc")


def test_sealed_is_made_by_the_gate_alone():
    package = Path(gate_module.__file__).parent.parent
    for path in package.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {getattr(call.func, "id", getattr(call.func, "attr", "")) for call in calls}
        assert "Sealed" not in names or path.name == "gate.py", path
