"""Server, administrator and hospitals as processes of their own, with mutual TLS on loopback; none is left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fediod_med.checkpoints import load_weights
from fediod_med.federation.flare.centre import run_rounds
from fediod_med.federation.flare.egress import default_rules
from fediod_med.federation.flare.settings import read_settings
from fediod_med.hospitals import open_federation, open_hospital
from fediod_med.privacy.ledger import LEDGER
from fediod_med.site_gate import open_gate
from fediod_med.sites import load_site
from tests.flare_kits import (
    NAMES,
    PATIENCE_S,
    audit,
    fediod,
    make_kits,
    reached,
    reasons,
    record,
    start_all,
    status_of,
    submission,
    works,
)
from tests.flare_parties import ROI, SPACING, Parties, parties, wait_for, write_hospitals

pytest.importorskip("nvflare", reason="the extra `federation` is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(20 * PATIENCE_S)]

GRADIENT = "epsilon: 8.0\nprivacy_mode: gradient\nreleases: {releases}\npatient_ids: subjects\n"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Parties]:
    with parties(tmp_path / "logs") as found:
        yield found


def embedded_student(root: Path, out: Path, run: str, rounds: int) -> dict[str, torch.Tensor]:
    """The same run with all hospitals in one process, a fresh one with one thread, as the engine's processes have.

    Setting the number of threads in this process is too late: sums would be rounded otherwise than in the engine's.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            weights = fresh.submit(_embedded_student, root, out, run, rounds).result()
    return {name: torch.from_numpy(values) for name, values in weights.items()}


def _embedded_student(root: Path, out: Path, run: str, rounds: int) -> dict[str, np.ndarray]:
    settings = read_settings(
        {
            "run_id": run,
            "sites": list(NAMES),
            "spacing": SPACING,
            "roi": ROI,
            "pool": 2,
            "quorum": 3,
            "schedule": {"rounds": rounds, "checkpoint_every": 2},
        }
    )
    opened = []
    for name in NAMES:
        site = load_site(root / "sites" / name)
        opened.append(
            open_hospital(
                site,
                open_gate(site),
                out=out,
                seed=0,
                device="cpu",
                teachers=root / "sites",
                sampler=None,
                on_epoch=lambda _a, _b, _c: None,
                on_step=lambda _a, _b: None,
            )
        )
    federation = open_federation(opened, out=out, seed=0, run_id=run, device=torch.device("cpu"), adversarial=True)
    state = run_rounds(federation, settings, folder=out, device="cpu", on_round=lambda _record: None)
    return {name: tensor.numpy() for name, tensor in state.student_average.module.state_dict().items()}


def test_five_rounds_over_mutual_tls_equal_the_embedded_federation(tmp_path: Path, started: Parties) -> None:
    """Hospitals differ in backbone, folder layout, label scheme and scanner; the weights agree to the last bit."""
    write_hospitals(tmp_path, NAMES)
    kits = make_kits(tmp_path)
    start_all(started, kits)
    done = subprocess.run(
        submission(kits, "first"), capture_output=True, text=True, timeout=10 * PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + started.log("server")[-3000:]
    assert "NOT PRIVATE" in done.stdout and "Not for clinical use" in done.stdout
    folder = kits / "server" / "runs" / "first"
    found, provenance = load_weights(folder / "student.safetensors")
    reference = embedded_student(tmp_path, tmp_path / "embedded", "first", 5)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], reference[name].float()) for name in found)
    assert provenance.sites == NAMES
    for name in NAMES:
        sent = [line for line in audit(kits, name) if line["event"] == "sent"]
        assert {line["kind"] for line in sent} == {"describe", "answer", "pull_back", "account"}
        assert not reasons(kits, name)
        assert "Traceback" not in started.log(name)
    told = status_of(kits, "first")
    assert "completed" in told and "round 5 of 5" in told and told.count("NOT PRIVATE") == 3


@pytest.mark.slow
def test_a_run_survives_the_death_of_every_party_and_charges_each_query_once(tmp_path: Path, started: Parties) -> None:
    write_hospitals(tmp_path, NAMES, privacy={"south": GRADIENT.format(releases=400)})
    kits = make_kits(tmp_path)
    start_all(started, kits)
    rounds, saved = 100, 20  # at an interval that leaves time to interfere
    words = submission(kits, "hard", rounds=rounds, quorum=2, grace=2, checkpoint_every=saved, interval=0.4)
    started.start("submit", words)

    def past(number: int) -> None:
        wait_for(f"round {number}", lambda: reached(kits, "hard", number), timeout_s=10 * PATIENCE_S, every_s=0.5)

    def under_way(segment: int) -> None:
        wait_for(f"segment {segment}", lambda: works(kits, "hard", segment), timeout_s=10 * PATIENCE_S)

    past(4)
    started.kill("north")  # a hospital loses power
    past(6)
    started.start("north", fediod("federation", "site", kits / "north"))
    under_way(2)  # north is back

    west = started.job_process("west")  # a hospital that answers after the timeout
    os.kill(west, signal.SIGSTOP)
    wait_for("west to be missed", lambda: "west" in record(kits, "hard")["status"]["absent"], timeout_s=PATIENCE_S)
    os.kill(west, signal.SIGCONT)
    wait_for("west to answer", lambda: not record(kits, "hard")["status"]["absent"], timeout_s=PATIENCE_S)

    segments = len(record(kits, "hard")["segments"])
    os.kill(started.job_process("south"), signal.SIGKILL)  # a job's process dies; the engine ends the job
    under_way(segments + 1)
    before = record(kits, "hard")["furthest"]
    past(before + 3)

    # halfway between two checkpoints, which drop the trips before them
    wait_for("a trip to lose", lambda: 7 <= record(kits, "hard")["furthest"] % saved <= 12, timeout_s=PATIENCE_S)
    started.kill("server")  # the centre loses power, and with it the last trip's end: the hospitals are asked again
    trips = sorted((kits / "server" / "runs" / "hard" / "journal").glob("*/ended.json"))
    repeated = trips[-1].parent.name
    trips[-1].unlink()
    started.start("server", fediod("federation", "server", kits / "server"))
    wait_for("the end", lambda: record(kits, "hard").get("state") == "completed", timeout_s=20 * PATIENCE_S, every_s=1)

    number, _, kind = repeated.partition("-")
    sent = [(line.get("round"), line["kind"]) for line in audit(kits, "south") if line["event"] == "sent"]
    assert sent.count((int(number), kind)) >= 2  # the duplicate was answered, from what had left before
    ledger = (tmp_path / "sites" / "south" / "privacy" / LEDGER).read_text(encoding="utf-8").splitlines()
    queries = [json.loads(line)["body"]["query"] for line in ledger if json.loads(line)["event"] == "charge"]
    assert len(queries) == len(set(queries))
    verified = subprocess.run(
        fediod("privacy", "verify", tmp_path / "sites" / "south"), capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    history = json.loads((kits / "server" / "runs" / "hard" / "history.json").read_text(encoding="utf-8"))["rounds"]
    assert [entry["round"] for entry in history] == list(range(1, rounds + 1))
    assert {entry["sites"] for entry in history} == {2, 3}


@pytest.mark.slow
def test_hospitals_refuse_by_their_own_rules_and_the_others_go_on(tmp_path: Path, started: Parties) -> None:
    write_hospitals(tmp_path, NAMES, privacy={"south": GRADIENT.format(releases=3)})
    kits = make_kits(tmp_path)
    rules = kits / "north" / "local" / "privacy.json"
    narrowed = json.loads(rules.read_text(encoding="utf-8"))
    fields = narrowed["scopes"][0]["task_result_filters"][0]["args"]["fields"]
    del fields["answer"]["realism"]
    fields["pull_back"]["x_gradient"]["dtypes"] = ["F8_E4M3"]
    rules.write_text(json.dumps(narrowed), encoding="utf-8")
    rights = kits / "server" / "local" / "authorization.json"  # a centre that would let code through
    rights.write_text(rights.read_text(encoding="utf-8").replace('"byoc": "none"', '"byoc": "any"'), encoding="utf-8")
    start_all(started, kits)
    words = submission(kits, "narrow", rounds=4, quorum=1, grace=20)
    done = subprocess.run(words, capture_output=True, text=True, timeout=10 * PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "undeclared field 'realism" in reasons(kits, "north")
    assert "BudgetExceeded" in reasons(kits, "south")
    assert not reasons(kits, "west")
    assert not [line for line in audit(kits, "north") if line["event"] == "sent" and line["kind"] == "answer"]

    for change, why in (("code", "no code"), ("target", "could act"), ("filter", "another configuration")):
        job = change_job(write_plain_job(tmp_path / change), change)
        assert submit_raw(kits, job, tmp_path / f"{change}.out") != "FINISHED:COMPLETED"
        for name in NAMES:
            assert why in reasons(kits, name), change


def write_plain_job(folder: Path) -> Path:
    from fediod_med.federation.flare.jobs import write_job

    values = {"run_id": "raw", "sites": list(NAMES), "quorum": 1, "schedule": {"rounds": 1}}
    return write_job(folder, read_settings(values))


def change_job(job: Path, change: str) -> Path:
    config = job / "app" / "config" / "config_fed_client.json"
    found = json.loads(config.read_text(encoding="utf-8"))
    if change == "code":
        (job / "app" / "custom").mkdir()
        (job / "app" / "custom" / "stealer.py").write_text("print('code')\n", encoding="utf-8")
    elif change == "target":
        found["components"] = [{"id": "x", "_target_": "os.system", "args": {"command": "$(id)"}}]
    else:
        found["task_result_filters"] = [{"tasks": ["*"], "filters": [{"path": "x.Y", "args": {}}]}]
    config.write_text(json.dumps(found), encoding="utf-8")
    return job


def submit_raw(kits: Path, job: Path, out: Path) -> str:
    """Submit a job as an administrator could without this package's supervisor; returns the engine's last word."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from fediod_med.federation.flare.supervisor import session\n"
        "with session(Path(sys.argv[1])) as engine:\n"
        "    job = engine.submit_job(sys.argv[2])\n"
        "    while not str(engine.get_job_meta(job)['status']).startswith('FINISHED'):\n        time.sleep(0.5)\n"
        "    Path(sys.argv[3]).write_text(str(engine.get_job_meta(job)['status']))\n"
    )
    words = [sys.executable, "-c", code, str(kits / "admin"), str(job), str(out)]
    subprocess.run(words, check=False, timeout=5 * PATIENCE_S, capture_output=True)
    return out.read_text(encoding="utf-8") if out.is_file() else "refused at submission"


def test_a_hospital_does_not_talk_to_a_server_of_another_authority(tmp_path: Path) -> None:
    kits = make_kits(tmp_path, ["north"])
    other = make_kits(tmp_path / "other", ["north"])
    port = int(json.loads((kits / "north/startup/fed_client.json").read_text())["servers"][0]["service"]["target"][10:])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(other / "server/startup/server.crt", other / "server/startup/server.key")
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=_accept_once, args=(listener, context))
        thread.start()
        words = fediod("federation", "site", kits / "north")
        done = subprocess.run(words, capture_output=True, text=True, timeout=5 * PATIENCE_S, check=False)
        thread.join(timeout=10)
    assert done.returncode == 2 and "expected the server that this kit was made for" in done.stderr
    assert [line["event"] for line in audit(kits, "north")] == ["refused server"]


def _accept_once(listener: socket.socket, context: ssl.SSLContext) -> None:
    connection, _ = listener.accept()
    with connection:
        try:
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            return


def test_a_hospital_can_be_added_under_the_same_authority(tmp_path: Path) -> None:
    from fediod_med.federation.flare.provision import provision

    kits = make_kits(tmp_path, ["north"])
    more = provision(
        tmp_path / "more",
        server="localhost",
        port=8002,
        sites=["east"],
        egress=default_rules(batch=2, size=ROI),
        authority=kits / "authority",
    )
    assert set(more) == {"east"}
    first, added = (kit / "startup" / "rootCA.pem" for kit in (kits / "north", more["east"]))
    assert added.read_bytes() == first.read_bytes()
    words = ["openssl", "verify", "-CAfile", str(first), str(more["east"] / "startup" / "client.crt")]
    if shutil.which("openssl"):
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    assert (kits / "north" / "startup" / "client.key").stat().st_mode & 0o077 == 0


def change_json(path: Path, **values: object) -> None:
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("resources", {"class_allow_list": ["*"]}, "class_allow_list"),
        ("resources", {"class_list_enforcement_mode": "warn"}, "class_allow_list"),
        ("resources", {"app_validator": None}, "JobGuard"),
        ("resources", {"allow_log_streaming": True}, "log streaming"),
        ("privacy", {"scopes": []}, "EgressGuard"),
        ("authorization", {"permissions": {"lead": {"byoc": "any"}}}, "byoc"),
    ],
)
def test_a_kit_without_its_guards_does_not_start(
    one_kit: Path, tmp_path: Path, name: str, values: dict[str, Any], why: str
) -> None:
    from fediod_med.errors import SettingsError
    from fediod_med.federation.flare.launch import site_command

    kit = tmp_path / "north"
    shutil.copytree(one_kit, kit)
    assert "nvflare.private.fed.app.client.client_train" in site_command(kit)
    change_json(kit / "local" / f"{name}.json", **values)
    with pytest.raises(SettingsError, match=why):
        site_command(kit)


@pytest.fixture(scope="module")
def one_kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("one"), ["north"]) / "north"
