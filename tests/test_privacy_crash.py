"""Processes that run at once, and processes that are killed: what was spent is never less than what left."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fediod_med.privacy import gate as gate_module
from fediod_med.privacy import keys as keys_module
from fediod_med.privacy import ledger as ledger_module
from fediod_med.privacy import policy as policy_module
from fediod_med.privacy.accounting import rdp_epsilon
from fediod_med.privacy.gate import Gate
from fediod_med.privacy.keys import ledger_key
from fediod_med.privacy.ledger import LEDGER
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import PrivacyPolicy, release_part, training_part, universe_id
from fediod_med.privacy.records import GENESIS, Head, Record, read_chain
from fediod_med.privacy.verify import verify_ledger

pytest.importorskip("opacus")
# From 3.12 on Python warns of forks while libraries hold threads; the children here only write files.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

RELEASES = {"answer": release_part(Mechanism(30.0, 1.0, 50_000), clip_norm=1.0, dim=3)}
TRAININGS = {"teacher": training_part(Mechanism(30.0, 1.0, 3), clip_norm=1.0)}


def open_gate(root: Path, parts=None, epsilon=50.0) -> Gate:
    parts = RELEASES if parts is None else parts
    policy = PrivacyPolicy(
        site="a",
        mode="gradient" if "answer" in parts else "dp-sgd",
        epsilon=epsilon,
        delta=1e-5,
        patients=2,
        universe=universe_id(["p1"], ledger_key(root / "key")),
        parts=parts,
    )
    return Gate.open(root / "log", key_folder=root / "key", policy=policy, patients=["p1"])


def ask(gate: Gate, query: str) -> bytes:
    return gate.release(
        "answer", query_id=query, query_digest="d", compute=lambda: np.ones(3), seal=lambda v: v.tobytes()
    ).payload  # fmt: skip


def fork(work: Callable[..., object], *args: object) -> int:
    """Run `work(*args)` in a child that leaves nothing behind but its effects; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*args)
            code = 0
        finally:
            os._exit(code)
    return child


def records(root: Path) -> list[Record]:
    return list(read_chain((root / "log" / LEDGER).read_bytes(), Head(-1, GENESIS), key=None, where="ledger"))


def drain(pipe: int) -> list[list[str]]:
    os.set_blocking(pipe, False)
    data = b""
    try:
        while more := os.read(pipe, 1 << 16):
            data += more
    except BlockingIOError:
        pass
    return [line.split() for line in data.decode().splitlines()]


def test_eight_processes_at_once_charge_exactly_and_chain(tmp_path):
    open_gate(tmp_path)

    def work(number: int) -> None:
        gate = open_gate(tmp_path)
        for i in range(5):
            ask(gate, f"own-{number}-{i}")
            ask(gate, f"shared-{i}")

    children = [fork(work, n) for n in range(8)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    events = [record.event for record in records(tmp_path)]
    assert events == ["open", *["charge", "done"] * 45]  # 40 queries of their own and 5 that all of them ask
    gate = open_gate(tmp_path)
    assert gate.spent_epsilon() == pytest.approx(rdp_epsilon([Mechanism(30.0, 1.0, 45)], 1e-5))
    assert verify_ledger(tmp_path / "log", key=ledger_key(tmp_path / "key"), head=gate.head).ok


def test_processes_that_open_a_gate_at_once_make_one_ledger_and_one_key(tmp_path):
    children = [fork(lambda n: ask(open_gate(tmp_path), f"q{n}"), n) for n in range(8)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert [record.event for record in records(tmp_path)].count("open") == 1
    assert verify_ledger(tmp_path / "log", key=ledger_key(tmp_path / "key")).ok


def test_processes_at_once_never_exceed_the_budget(tmp_path):
    epsilon = rdp_epsilon([Mechanism(30.0, 1.0, 11)], 1e-5) + 1e-6
    gate = open_gate(tmp_path, epsilon=epsilon)  # inherited by the children: a gate survives a fork
    read, write = os.pipe()

    def work(number: int) -> None:
        for i in range(4):
            ask(gate, f"{number}-{i}")
            os.write(write, b"left\n")

    for child in [fork(work, n) for n in range(8)]:
        os.waitpid(child, 0)
    left = len(drain(read))
    os.close(read)
    os.close(write)
    assert left == 11 == [record.event for record in records(tmp_path)].count("charge")
    spent = gate.spent_epsilon()
    assert spent is not None and spent <= epsilon


# --- kills -----------------------------------------------------------------------------------------------------------


def kill_loop(kills: int, work: Callable[[int, int], None], seed: int) -> list[list[str]]:
    """Run `work(i, pipe)` in children, each killed after a random time up to its usual one or a little later.

    Returns:
        What left, after so many kills that found the child alive.
    """
    read, write = os.pipe()
    chance = random.Random(seed)
    started = time.perf_counter()
    for i in range(-4, 0):
        os.waitpid(fork(work, i, write), 0)
    usual = (time.perf_counter() - started) / 4
    left: list[list[str]] = []
    i = done = 0
    while done < kills:
        child = fork(work, i, write)
        time.sleep(chance.uniform(0, 1.2 * usual))
        os.kill(child, signal.SIGKILL)
        done += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        left += drain(read)
        i += 1
    os.close(read)
    os.close(write)
    return left


def check_releases(root: Path, left: list[list[str]]) -> None:
    open_gate(root)  # sets a line aside whose writer was killed
    events = [record.event for record in records(root)]
    assert events.count("charge") >= len({query for query, _ in left})
    payloads = defaultdict(set)
    for query, payload in left:
        payloads[query].add(payload)
    assert all(len(values) == 1 for values in payloads.values()), "one query left with two different noises"
    gate = open_gate(root)
    for query, values in payloads.items():
        assert hashlib.sha256(ask(gate, query)).hexdigest() in values  # what left is what is replayed
    assert [record.event for record in records(root)].count("charge") == events.count("charge")
    assert gate.spent_epsilon() == pytest.approx(rdp_epsilon([Mechanism(30.0, 1.0, events.count("charge"))], 1e-5))
    assert verify_ledger(root / "log", key=ledger_key(root / "key"), head=gate.head).ok


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_releases_killed_at_random_times_are_charged_and_never_noised_twice(tmp_path, kills):
    gate = open_gate(tmp_path)
    ask(gate, "warm")

    def work(i: int, pipe: int) -> None:
        query = f"q{i // 3}"  # each query is asked by three processes, some of which die
        payload = ask(gate, query)
        os.write(pipe, f"{query} {hashlib.sha256(payload).hexdigest()}\n".encode())

    left = kill_loop(kills, work, seed=1)
    assert len(left) >= kills // 20, "some must get through"
    check_releases(tmp_path, left)


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_trainings_killed_at_random_times_stay_charged_and_resume(tmp_path, kills):
    gate = open_gate(tmp_path, TRAININGS)

    def work(i: int, pipe: int) -> None:
        run = f"r{i // 3}"
        permit = gate.begin_training("teacher", run_id=run, settings_digest="s")
        os.write(pipe, f"begun {run} {permit.permit_id}\n".encode())
        weights = hashlib.sha256(run.encode() + permit.permit_id.encode()).hexdigest()
        gate.finish_training(permit, weights)
        os.write(pipe, f"finished {permit.permit_id} {weights}\n".encode())

    left = kill_loop(kills, work, seed=2)
    assert len(left) >= kills // 20, "some must get through"
    reopened = open_gate(tmp_path, TRAININGS)  # sets a line aside whose writer was killed
    begun = {record.hash for record in records(tmp_path) if record.event == "train"}
    finished = {(r.body["permit"], r.body["weights"]) for r in records(tmp_path) if r.event == "trained"}
    assert {permit for what, _, permit in left if what == "begun"} <= begun
    assert {(permit, weights) for what, permit, weights in left if what == "finished"} <= finished
    # A run that was not finished has one permit, however often its process was killed.
    open_runs = [r.body["run"] for r in records(tmp_path) if r.event == "train" and r.hash not in dict(finished)]
    assert len(open_runs) == len(set(open_runs))
    assert reopened.spent_epsilon() == pytest.approx(rdp_epsilon([Mechanism(30.0, 1.0, 3 * len(begun))], 1e-5))
    assert verify_ledger(tmp_path / "log", key=ledger_key(tmp_path / "key"), head=reopened.head).ok


def test_a_kill_before_and_after_every_system_call_of_a_release_is_safe(tmp_path, monkeypatch):
    """Kills at each write, sync and rename in turn, and within writes, until one release runs to its end."""
    ask(open_gate(tmp_path), "warm")
    read, write = os.pipe()
    left: list[list[str]] = []
    for when in range(1000):
        remaining = [when]

        def counted(function):
            def call(*args, **kwargs):
                for step in (lambda: None, lambda: function(*args, **kwargs)):
                    result = step()
                    remaining[0] -= 1  # noqa: B023 (used in this round only)
                    if remaining[0] < 0:  # noqa: B023
                        os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        def work() -> None:
            write_part = os.write
            # A kill within a write leaves a part of it behind, as at the border of two memory pages.
            monkeypatch.setattr(os, "write", lambda file, data: write_part(file, data[: max(len(data) // 2, 200)]))
            for name in ("write", "fsync", "open"):
                monkeypatch.setattr(os, name, counted(getattr(os, name)))
            monkeypatch.setattr(Path, "replace", counted(Path.replace))
            payload = ask(open_gate(tmp_path), "q")
            monkeypatch.undo()
            os.write(write, f"q {hashlib.sha256(payload).hexdigest()}\n".encode())

        killed = os.WIFSIGNALED(os.waitpid(fork(work), 0)[1])
        left += drain(read)
        if not killed:
            break
    os.close(read)
    os.close(write)
    assert 20 < when < 200
    assert list((tmp_path / "log").glob("ledger.jsonl.torn-*"))
    charges = [record for record in records(tmp_path) if record.event == "charge" and record.body["query"] == "q"]
    assert len(charges) > 1  # killed between charge and release: spent, and paid again
    check_releases(tmp_path, left)


def test_the_modules_under_test_use_the_patched_calls():
    """The test above replaces names in `os`; code that bound them at import would escape it."""
    for module in (policy_module, keys_module, ledger_module, gate_module):
        assert not [name for name in ("write", "fsync", "open") if vars(module).get(name) is getattr(os, name)]
