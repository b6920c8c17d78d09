from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fediod_med.errors import PrivacyError
from fediod_med.privacy.accounting import rdp_epsilon
from fediod_med.privacy.gate import Gate
from fediod_med.privacy.keys import ledger_key
from fediod_med.privacy.ledger import PrivacyLedger
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import PrivacyPolicy, count_part, training_part, universe_id
from fediod_med.privacy.records import GENESIS, Head, Record, read_chain
from fediod_med.privacy.verify import verify_ledger

pytest.importorskip("opacus")
PARTS = {
    "counts": count_part(Mechanism(9.0, 1.0, 4), dim=2),
    "teacher": training_part(Mechanism(9.0, 1.0, 5), clip_norm=1.0),
}

CHARGE = {
    "kind": "counts", "query": "n", "digest": "d", "noise_multiplier": 9.0, "sample_rate": 1.0, "steps": 1,
    "clip_norm": 1.0, "sensitivity": 1.0,
}  # fmt: skip


def policy(root: Path, patients=("p1", "p2"), **changes) -> PrivacyPolicy:
    values = {"site": "a", "mode": "dp-sgd", "epsilon": 8.0, "delta": 1e-5, "patients": 2, "parts": PARTS}
    return PrivacyPolicy(**{**values, "universe": universe_id(patients, ledger_key(root / "key")), **changes})


def open_gate(root: Path, patients=("p1", "p2"), folder="log", **changes) -> Gate:
    return Gate.open(
        root / folder, key_folder=root / "key", policy=policy(root, patients, **changes), patients=patients
    )  # fmt: skip


def open_ledger(root: Path) -> PrivacyLedger:
    return PrivacyLedger.open(
        root / "log", key_folder=root / "key", policy=policy(root), patients=["p1", "p2"]
    )  # fmt: skip


def release(gate: Gate, query: str = "q") -> bytes:
    return gate.release(
        "counts", query_id=query, query_digest="d", compute=lambda: np.eye(2), seal=lambda v: v.tobytes()
    ).payload  # fmt: skip


@pytest.fixture
def root(tmp_path) -> Path:
    """A ledger of six records: opened, a release, a training begun and finished."""
    gate = open_gate(tmp_path)
    release(gate)
    gate.finish_training(gate.begin_training("teacher", run_id="r", settings_digest="s"), "w")
    return tmp_path


def ledger(root: Path) -> Path:
    return root / "log" / "ledger.jsonl"


def verified(root: Path, **kwargs) -> bool:
    return verify_ledger(root / "log", with_dp_accounting=False, **kwargs).ok


def stops(root: Path, message: str, **changes) -> None:
    """Opening is a hard stop, again and again, and gives nothing out."""
    for _ in range(2):
        with pytest.raises(PrivacyError, match=message):
            open_gate(root, **changes)


def test_records_are_canonical_and_chained(root):
    lines = ledger(root).read_bytes().splitlines(keepends=True)
    records = list(read_chain(b"".join(lines), Head(-1, GENESIS), key=ledger_key(root / "key"), where="x"))
    assert [record.event for record in records] == ["open", "charge", "done", "train", "trained"]
    assert [record.line() for record in records] == lines
    assert [record.previous for record in records[1:]] == [record.hash for record in records[:-1]]
    assert all(record.policy == policy(root).digest() for record in records)
    assert b"p1" not in ledger(root).read_bytes()


def test_any_changed_byte_of_ledger_policy_or_payload_is_seen(root):
    assert verified(root)
    files = [ledger(root), root / "log" / "policy.json", *(root / "log" / "payloads").iterdir()]
    rng = np.random.default_rng(0)
    for path in files:
        data = path.read_bytes()
        for place in range(len(data)):
            other = data[place] ^ int(rng.integers(1, 256))
            path.write_bytes(data[:place] + bytes([other]) + data[place + 1 :])
            assert not verified(root), f"{path.name}: byte {place} became {other}"
        path.write_bytes(data)
    assert verified(root)


def test_any_changed_order_or_missing_line_is_seen(root):
    path, head = ledger(root), open_gate(root).head
    lines = path.read_bytes().splitlines(keepends=True)
    for i in range(len(lines)):
        for j in range(i + 1, len(lines)):
            swapped = [*lines]
            swapped[i], swapped[j] = lines[j], lines[i]
            path.write_bytes(b"".join(swapped))
            assert not verified(root)
        for changed in (lines[:i] + lines[i + 1 :], [*lines[: i + 1], *lines[i:]]):
            path.write_bytes(b"".join(changed))
            assert not verified(root, head=head)
    path.write_bytes(b"".join(lines[:-1]))
    assert verified(root), "without a witness a missing end cannot be seen"
    assert not verified(root, head=head)


@pytest.mark.parametrize("name", ["ledger.jsonl", "policy.json"])
@pytest.mark.parametrize("data", [None, b"", b"\n", b"[]\n", b"\xff\n", b'{"a":1}\n', b"{" * 5000])
def test_files_that_are_no_ledger_do_not_verify(root, name, data):
    path = root / "log" / name
    path.unlink() if data is None else path.write_bytes(data)
    done = verify_ledger(root / "log")
    assert not done.ok and "no bound on patient leakage is claimed" in done.statement


def rewrite(root: Path, change: Callable[[Record], dict], key: bytes) -> None:
    """What a forger can do: change any record, and make hashes, links and signatures anew with a key of their own."""
    lines: list[bytes] = []
    head = Head(-1, GENESIS)
    renamed: dict[str, str] = {}
    for record in read_chain(ledger(root).read_bytes(), head, key=None, where="x"):
        fields = {**vars(record), "previous": head.hash, **change(record)}
        fields["body"] = {k: renamed.get(v, v) if isinstance(v, str) else v for k, v in fields["body"].items()}
        again = Record(**fields).signed(key)
        renamed[record.hash] = again.hash
        lines.append(again.line())
        head = Head(again.sequence, again.hash)
    ledger(root).write_bytes(b"".join(lines))


def test_a_rewritten_history_shows_in_its_signatures(root):
    rewrite(root, lambda _: {"time": "1970-01-01T00:00:00Z"}, b"not the key")
    assert verified(root), "hashes alone can be recomputed by whoever edits the file"
    assert not verified(root, key=ledger_key(root / "key"))
    stops(root, "not signed by this site's key")


def test_spending_beyond_the_policy_does_not_verify(root):
    """Not even the holder of the key can state a composition above the budget."""
    tight, key = policy(root, epsilon=rdp_epsilon([Mechanism(9.0, 1.0, 5)], 1e-5) + 0.01), ledger_key(root / "key")
    opening = {"policy": json.loads(tight.canonical())}
    rewrite(root, lambda r: {"policy": tight.digest()} | ({"body": opening} if r.event == "open" else {}), key)
    (root / "log" / "policy.json").write_bytes(tight.canonical())
    done = verify_ledger(root / "log", key=key)
    assert len(done.problems) == 1 and "the policy allows" in done.problems[0]


def test_an_older_copy_is_a_hard_stop(root):
    shutil.copytree(root / "log", root / "old")
    release(open_gate(root), "q2")
    shutil.rmtree(root / "log")
    (root / "old").rename(root / "log")
    stops(root, "as witnessed")


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_shortened_ledger_is_a_hard_stop(root, keep):
    lines = ledger(root).read_bytes().splitlines(keepends=True)
    ledger(root).write_bytes(b"".join(lines[:keep]))
    stops(root, "witness|these patients have spent before")


def test_a_missing_ledger_of_known_patients_is_a_hard_stop(root):
    ledger(root).unlink()
    stops(root, "these patients have spent before")
    shutil.rmtree(root / "log")
    stops(root, "these patients have spent before")
    with pytest.raises(PrivacyError, match=f"spent before, in the ledger at {root / 'log'}"):
        open_gate(root, folder="elsewhere")


@pytest.mark.parametrize("written", [1, 20, -1])
def test_a_line_whose_writer_was_killed_is_set_aside_and_costs_nothing(root, written):
    before, spent = ledger(root).read_bytes(), open_gate(root).spent_epsilon()
    shutil.copytree(root / "key", root / "key-before")
    release(open_gate(root), "q2")
    later = ledger(root).read_bytes()
    charge = later[len(before) :].split(b"\n")[0] + b"\n"
    shutil.rmtree(root / "key")
    shutil.copytree(root / "key-before", root / "key")  # the kill came before the witness moved
    ledger(root).write_bytes(before + charge[:written])
    assert not verify_ledger(root / "log").ok
    gate = open_gate(root)
    assert gate.spent_epsilon() == spent
    assert ledger(root).read_bytes() == before
    assert [path.read_bytes() for path in (root / "log").glob("ledger.jsonl.torn-*")] == [charge[:written]]
    assert verify_ledger(root / "log", key=ledger_key(root / "key"), head=gate.head).ok
    release(gate, "q2")
    assert len(ledger(root).read_bytes().splitlines()) == len(later.splitlines())


def test_a_torn_end_that_a_witness_has_seen_whole_is_a_hard_stop_and_stays(root):
    release(open_gate(root), "q2")
    torn = ledger(root).read_bytes()[:-10]
    ledger(root).write_bytes(torn)
    stops(root, "as witnessed")
    assert ledger(root).read_bytes() == torn
    ledger(root).write_bytes(torn.rpartition(b"\n")[0] + b"\n")
    stops(root, "as witnessed")


def test_a_changed_byte_is_a_hard_stop(root):
    data = bytearray(ledger(root).read_bytes())
    data[len(data) // 2] ^= 1
    ledger(root).write_bytes(bytes(data))
    stops(root, "changed after it was written|found something else")


def test_a_ledger_swapped_while_in_use_is_a_hard_stop(root):
    gate = open_gate(root)
    lines = ledger(root).read_bytes().splitlines(keepends=True)
    ledger(root).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(PrivacyError, match="shortened or rewritten"):
        release(gate, "q2")


def test_a_lost_witness_or_key_is_a_hard_stop(root):
    (witness,) = (root / "key" / "universes").glob("*.json")
    content = witness.read_bytes()
    witness.write_bytes(b"")
    stops(root, "expected a witness")
    witness.unlink()
    stops(root, "witness of this ledger is missing")
    witness.write_bytes(content)
    open_gate(root)
    key = root / "key" / "ledger.key"
    before = key.read_bytes()
    key.unlink()
    stops(root, "the key is missing, and it has signed ledgers")
    assert not key.exists()
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    stops(root, "not signed by this site's key")
    key.write_bytes(before)
    assert open_gate(root).spent_epsilon() not in (None, 0.0)


def test_an_edited_policy_file_is_a_hard_stop(root):
    path = root / "log" / "policy.json"
    path.write_bytes(path.read_bytes().replace(b'"epsilon":8.0', b'"epsilon":9.0'))
    stops(root, "never edited by hand")


def test_other_patients_need_another_ledger(root):
    stops(root, "other patients", patients=("p3",))
    open_gate(root / "fresh")  # with an opening record only
    stops(root / "fresh", "other patients", patients=("p3",))
    assert open_gate(root, patients=("p3",), folder="log2").spent_epsilon() == 0


@pytest.mark.parametrize("patients", [("p1", "p2", "p3"), ("p1",), ("p2", "p3"), ("p1", "p2")])
def test_a_patient_who_has_spent_cannot_begin_another_ledger(root, patients):
    with pytest.raises(PrivacyError, match=f"spent before, in the ledger at {root / 'log'}"):
        open_gate(root, patients=patients, folder="log2")
    assert not (root / "log2").exists()
    shutil.copytree(root / "log", root / "log2")
    release(open_gate(root), "q2")  # the copy is behind now
    with pytest.raises(PrivacyError, match=f"as witnessed at {root / 'log'}"):
        open_gate(root, patients=patients, folder="log2")


def test_a_patient_who_joins_or_leaves_continues_what_was_spent(root):
    before = open_gate(root).spent_epsilon()
    for patients in (("p1", "p2", "p3"), ("p2", "p3"), ("p3", "p4"), ("p3", "p4")):
        gate = open_gate(root, patients=patients)
        assert gate.spent_epsilon() == before
    release(gate, "q2")
    more = gate.spent_epsilon()
    assert more is not None and before is not None and more > before
    events = [r.event for r in read_chain(ledger(root).read_bytes(), Head(-1, GENESIS), key=None, where="x")]
    assert events.count("open") == 4  # a set that has not changed is not recorded again
    # p1 left long ago, and is still known.
    with pytest.raises(PrivacyError, match="spent before"):
        open_gate(root, patients=("p1", "p9"), folder="log2")
    assert open_gate(root, patients=("p1",)).spent_epsilon() == more
    assert open_gate(root, patients=("p9",), folder="log2").spent_epsilon() == 0
    done = verify_ledger(root / "log", key=ledger_key(root / "key"))
    assert done.ok and done.epsilon is not None and done.epsilon.rdp == more


def test_patients_of_two_ledgers_cannot_be_joined(root):
    open_gate(root, patients=("p3",), folder="log2")
    for folder in ("log", "log2", "log3"):
        with pytest.raises(PrivacyError, match="two budgets cannot be joined"):
            open_gate(root, patients=("p1", "p3"), folder=folder)


def test_the_key_folder_names_no_patient(root):
    for path in (root / "key").rglob("*"):
        assert path.is_dir() or not any(name in path.read_bytes() for name in (b'"p1"', b'"p2"'))


def test_a_ledger_may_move(root):
    before = open_gate(root).spent_epsilon()
    (root / "log").rename(root / "moved")
    assert open_gate(root, folder="moved").spent_epsilon() == before
    with pytest.raises(PrivacyError, match=f"in the ledger at {root / 'moved'}"):
        open_gate(root, patients=("p2", "p3"))


def test_a_witness_of_an_earlier_version_is_completed_by_its_own_patients_only(root):
    (witness,) = (root / "key" / "universes").glob("*.json")
    raw = json.loads(witness.read_bytes())
    witness.write_text(json.dumps({"sequence": raw["sequence"], "hash": raw["hash"]}))
    for patients in (("p1", "p3"), ("p9",)):
        with pytest.raises(PrivacyError, match="did not record whom this ledger covers"):
            open_gate(root, patients=patients, folder="log2")
    open_gate(root)
    assert json.loads(witness.read_bytes()) == raw
    open_gate(root, patients=("p9",), folder="log2")


def test_the_policy_must_be_of_the_patients_that_are_named(root):
    with pytest.raises(PrivacyError, match="universe id of these 1 patients"):
        Gate.open(root / "log", key_folder=root / "key", policy=policy(root), patients=["p1"])


@pytest.mark.parametrize("patients", [("p1", "p2"), ("p1",), ("p2", "p3")])
def test_mode_none_is_refused_to_patients_with_a_promise(root, patients):
    none = PrivacyPolicy(site="a", mode="none", epsilon=None, delta=None, patients=2, universe="")
    for folder in ("log", "log2"):
        with pytest.raises(PrivacyError, match=f"the ledger at {root / 'log'} covers; mode none would let out"):
            Gate.open(root / folder, key_folder=root / "key", policy=none, patients=patients)
    assert Gate.open(root / "log", key_folder=root / "key", policy=none, patients=["p9"]).mode == "none"
    shutil.rmtree(root / "key")
    with pytest.raises(PrivacyError, match="no witness of whom it covers"):
        Gate.open(root / "log", key_folder=root / "key", policy=none, patients=patients)


def test_a_new_policy_for_the_same_patients_continues_what_was_spent(root):
    before = open_gate(root).spent_epsilon()
    gate = open_gate(root, epsilon=20.0)
    assert gate.spent_epsilon() == before
    assert gate.permit_for("w").kind == "teacher"
    release(gate, "q2")
    assert verified(root, key=ledger_key(root / "key"), head=gate.head)
    assert verify_ledger(root / "log").policy == policy(root, epsilon=20.0)


def test_a_gate_of_an_outdated_policy_must_be_opened_again(root):
    gate = open_gate(root)
    open_gate(root, epsilon=20.0)
    before = ledger(root).read_bytes()
    with pytest.raises(PrivacyError, match="another policy"):
        release(gate, "q2")
    assert ledger(root).read_bytes() == before


def test_a_full_disk_charges_nothing_and_leaves_the_ledger_whole(root, monkeypatch):
    gate, before = open_gate(root), ledger(root).read_bytes()
    write = os.write
    calls: list[int] = []

    def full(descriptor, data):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(1)
        return write(descriptor, bytes(data)[:7])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(PrivacyError, match="No space left"):
            release(gate, "q2")
    assert ledger(root).read_bytes() == before
    release(gate, "q2")
    assert verified(root, head=gate.head)


def test_a_lost_or_changed_payload_is_not_replayed(root):
    (payload,) = (root / "log" / "payloads").iterdir()
    payload.write_bytes(b"other")
    with pytest.raises(PrivacyError, match="another or none"):
        release(open_gate(root))


def test_key_is_private_and_made_once(tmp_path):
    key = ledger_key(tmp_path / "key")
    path = tmp_path / "key" / "ledger.key"
    assert len(key) == 32 and ledger_key(tmp_path / "key") == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in (tmp_path / "key").iterdir()] == ["ledger.key"]
    path.chmod(0o644)
    with pytest.raises(PrivacyError, match="chmod 600"):
        ledger_key(tmp_path / "key")
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(PrivacyError, match="32 bytes"):
        ledger_key(tmp_path / "key")


def test_the_key_may_not_lie_beside_the_ledger(tmp_path):
    with pytest.raises(PrivacyError, match="must not lie inside"):
        PrivacyLedger.open(tmp_path, key_folder=tmp_path / "key", policy=policy(tmp_path), patients=["p1", "p2"])


def test_records_are_appended_under_the_lock_only(root):
    opened = open_ledger(root)
    with pytest.raises(PrivacyError, match="outside of locked"):
        opened.append("trained", {"permit": "x", "weights": "y"})


@pytest.mark.parametrize(
    ("event", "body"),
    [
        ("done", {"charge": 0, "payload": "x"}),
        ("done", {"charge": [], "payload": "x"}),
        ("trained", {"permit": "0" * 64, "weights": "x"}),
        ("charge", {**CHARGE, "noise_multiplier": 99.0}),
        ("charge", {**CHARGE, "query": "q"}),
        ("charge", {"kind": "answer", "query": "n", "digest": "d"}),
    ],
)
def test_records_that_contradict_the_history_are_never_written(root, event, body):
    opened = open_ledger(root)
    before = ledger(root).read_bytes()
    with pytest.raises(PrivacyError), opened.locked():
        opened.append(event, body)
    assert ledger(root).read_bytes() == before
    newest = open_gate(root).head
    with opened.locked():
        assert opened.head == newest
