"""A job has one form, a kit its own settings, a hospital an audit log; all checked without the engine running."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fediod_med.errors import ProtocolError, SettingsError
from fediod_med.federation.flare.audit import AuditLog
from fediod_med.federation.flare.job_form import SIGNATURES, check_app, client_config
from fediod_med.federation.flare.jobs import write_job
from fediod_med.federation.flare.names import CLIENT_CONFIG
from fediod_med.federation.flare.plan import centre_plan, hospital_plan
from fediod_med.federation.flare.provision import check_names
from fediod_med.federation.flare.settings import read_settings
from tests.command import run


@pytest.fixture
def app(tmp_path: Path) -> Path:
    values = {"run_id": "r", "sites": ["north", "south"], "quorum": 2, "schedule": {"rounds": 3}}
    return write_job(tmp_path / "job", read_settings(values)) / "app"


def changed(app: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = app / "config" / CLIENT_CONFIG
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")
    return app


def test_the_job_that_this_package_writes_is_accepted_signed_or_not(app: Path) -> None:
    check_app(app)
    for name in SIGNATURES:
        (app / "config" / name).write_text("{}", encoding="utf-8")
    check_app(app)
    meta = json.loads((app.parent / "meta.json").read_text(encoding="utf-8"))
    assert meta["min_clients"] == 2 and meta["deploy_map"] == {"app": ["@ALL"]}
    server = json.loads((app / "config" / "config_fed_server.json").read_text(encoding="utf-8"))
    assert read_settings(server["workflows"][0]["args"]["settings"]).sites == ("north", "south")


@pytest.mark.parametrize("name", ["custom/steal.py", "config/more.json", "steal.py", "config/custom/x.pyc"])
def test_a_job_with_any_other_file_is_refused(app: Path, name: str) -> None:
    (app / name).parent.mkdir(exist_ok=True)
    (app / name).write_text("print()", encoding="utf-8")
    with pytest.raises(ProtocolError, match="no code"):
        check_app(app)


def test_a_link_out_of_the_job_is_refused(app: Path, tmp_path: Path) -> None:
    (app / "custom").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ProtocolError, match="no code"):
        check_app(app)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c["components"].append({"_target_": "os.system"}), "could act"),
        (lambda c: c["executors"][0]["executor"]["args"].update(site="$import os"), "could act"),
        (lambda c: c["executors"][0]["executor"]["args"].update(site="{workspace}/x"), "could act"),
        (lambda c: c["executors"][0]["executor"]["args"].update(site="/data"), "another configuration"),
        (lambda c: c["executors"][0].update(tasks=["*"]), "another configuration"),
        (lambda c: c["executors"][0]["executor"].update(path="subprocess.Popen"), "another configuration"),
        (lambda c: c["components"].append({"id": "x", "path": "a.B", "args": {}}), "another configuration"),
        (lambda c: c["task_result_filters"].append({"tasks": ["*"], "filters": []}), "another configuration"),
        (lambda c: c.update(handlers=[]), "another configuration"),
        (lambda c: c.update(default_task_fetch_interval=3600), "fetch interval"),
        (lambda c: c.update(default_task_fetch_interval=True), "fetch interval"),
    ],
)
def test_a_job_that_asks_for_anything_else_is_refused(
    app: Path, change: Callable[[dict[str, Any]], object], why: str
) -> None:
    with pytest.raises(ProtocolError, match=why):
        check_app(changed(app, change))


def test_a_job_without_a_configuration_is_refused(app: Path) -> None:
    (app / "config" / CLIENT_CONFIG).write_text("executors: []", encoding="utf-8")
    with pytest.raises(ProtocolError, match="in JSON"):
        check_app(app)
    (app / "config" / CLIENT_CONFIG).write_text("[]", encoding="utf-8")
    with pytest.raises(ProtocolError):
        check_app(app)


def test_no_argument_reaches_a_hospital() -> None:
    assert client_config(0.2)["executors"][0]["executor"]["args"] == {}


def write_plan(kit: Path, text: str) -> Path:
    (kit / "local").mkdir(parents=True, exist_ok=True)
    (kit / "local" / "fediod.yaml").write_text(text, encoding="utf-8")
    return kit


def test_a_hospitals_paths_start_at_its_kit(tmp_path: Path) -> None:
    found = hospital_plan(write_plan(tmp_path / "kit", "site: ../sites/north\nseed: 3\n"))
    assert found.site == tmp_path / "sites" / "north"
    assert found.teachers == tmp_path / "sites"  # where `fediod site train` writes
    assert found.state == tmp_path / "kit" / "state"
    assert (found.data_root, found.seed, found.device) == (None, 3, "auto")
    assert centre_plan(write_plan(tmp_path / "server", "device: cpu\n")).runs == tmp_path / "server" / "runs"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("device: cpu\n", "expected key 'site'"),
        ("site: a\nteacher: b\n", "unknown key 'teacher'"),
        ("site: $import os\n", "not allowed"),
        ("site: a\nseed: many\n", "whole number"),
    ],
)
def test_a_plan_is_plain_and_complete(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        hospital_plan(write_plan(tmp_path, text))


def test_a_kit_without_a_plan_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected the settings of this kit"):
        hospital_plan(tmp_path)


@pytest.mark.parametrize(
    ("server", "port", "sites"),
    [
        ("fl.example.org", 0, ["north"]),
        ("a b", 8002, ["north"]),
        ("fl.example.org", 8002, []),
        ("fl.example.org", 8002, ["north", "north"]),
        ("fl.example.org", 8002, ["server"]),
        ("fl.example.org", 8002, ["north_wing"]),
    ],
)
def test_names_that_a_certificate_cannot_bear_are_refused(server: str, port: int, sites: list[str]) -> None:
    check_names("fl.example.org", 8002, ["north", "south-2"])
    with pytest.raises(SettingsError):
        check_names(server, port, sites)


def test_the_audit_log_keeps_whole_lines_and_cuts_long_reasons(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "kit" / "audit.jsonl")
    assert log.lines() == []
    log.write("refused", reason="x" * 5000 + "\n")
    log.write("sent", kind="answer", round=2, bytes=7)
    first, second = log.lines()
    assert len(str(first["reason"])) == 500
    assert (second["event"], second["round"], second["bytes"]) == ("sent", 2, 7)
    assert (tmp_path / "kit" / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_commands_say_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("nvflare", reason="the extra `federation` is not installed")
    assert run("federation", "status", "--kit", tmp_path, "--run", "r")[0] == 2
    assert run("federation", "site", tmp_path)[0] == 2
    assert run("federation", "server", tmp_path)[0] == 2
    code, text = run("federation", "provision", "--out", tmp_path, "--server", "h", "--site", "n", "--floor", "all")
    assert code == 2 and "--floor" in text


def test_a_party_starts_and_a_run_is_watched_without_the_method() -> None:
    """The engine's own process stays small, and a command that only looks answers at once."""
    pytest.importorskip("nvflare", reason="the extra `federation` is not installed")
    code = (
        "import sys\n"
        "import fediod_med.federation.flare.launch, fediod_med.federation.flare.supervisor\n"
        "print({'torch', 'monai'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
