"""Starts a party of the engine in the foreground, after the checks that would otherwise fail late and far away."""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fediod_med.errors import SettingsError
from fediod_med.federation.flare.audit import AUDIT_FILE, AuditLog
from fediod_med.federation.flare.names import PACKAGE
from fediod_med.federation.flare.plan import centre_plan, hospital_plan

_CLIENT_FILE, _SERVER_FILE = "startup/fed_client.json", "startup/fed_server.json"
HANDSHAKE_TIMEOUT_S = 10.0

SERVER_ENVIRONMENT = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "5"}
"""An ended job would otherwise wait 15 minutes for the last word of a hospital that is gone, and the run with it."""


def site_command(kit: Path) -> list[str]:
    """The command that runs a hospital's kit in the foreground.

    Raises:
        SettingsError: no kit of a hospital, no settings of its own, or a kit whose guards were taken out.
    """
    kit = kit.resolve()
    name = str(_kit_file(kit, _CLIENT_FILE)["client"]["fqsn"])
    hospital_plan(kit)
    check_closed(kit)
    return _engine("client.client_train", "fed_client.json", kit, f"uid={name}", f"org={name.replace('-', '_')}")


def server_command(kit: Path) -> list[str]:
    """The command that runs the server's kit in the foreground; errors as in `site_command`."""
    kit = kit.resolve()
    _kit_file(kit, _SERVER_FILE)
    centre_plan(kit)
    _place_stores(kit)
    return _engine("server.server_train", "fed_server.json", kit, "org=centre")


def run_site(kit: Path) -> None:
    """Check the server's certificate, then become the hospital's process; returns only by an error.

    Raises:
        SettingsError: as in `site_command`; or the server is not the one that this kit was made for.
    """
    command = site_command(kit)
    check_server(kit.resolve())
    AuditLog(kit.resolve() / AUDIT_FILE).write("started")
    os.execv(command[0], command)


def run_server(kit: Path) -> None:
    """Become the server's process; returns only by an error."""
    command = server_command(kit)
    os.execve(command[0], command, os.environ | SERVER_ENVIRONMENT)


def check_closed(kit: Path) -> None:
    """Refuse to start a hospital whose own files no longer hold the guards; `SettingsError` names the file."""
    resources = _kit_file(kit, "local/resources.json")
    allowed = resources.get("class_allow_list")
    if (
        resources.get("class_list_enforcement_mode") != "enforce"
        or not isinstance(allowed, list)
        or any(not str(prefix).startswith(f"{PACKAGE}.") for prefix in allowed)
    ):
        raise SettingsError(f"{kit}/local/resources.json: expected a class_allow_list of {PACKAGE}. alone; restore it")
    if "JobGuard" not in str(resources.get("app_validator")) or resources.get("allow_log_streaming") is not False:
        raise SettingsError(f"{kit}/local/resources.json: expected the JobGuard and no log streaming; restore it")
    privacy = _kit_file(kit, "local/privacy.json")
    scopes = {scope.get("name"): scope for scope in privacy.get("scopes", [])}
    guards = scopes.get(privacy.get("default_scope"), {}).get("task_result_filters", [])
    if len(scopes) != 1 or not guards or "EgressGuard" not in str(guards[-1].get("path")):
        raise SettingsError(f"{kit}/local/privacy.json: expected one scope that ends in the EgressGuard; restore it")
    rights = _kit_file(kit, "local/authorization.json").get("permissions", {})
    if any(role.get("byoc", "none") != "none" for role in rights.values() if isinstance(role, Mapping)):
        raise SettingsError(f"{kit}/local/authorization.json: expected byoc none for everybody; code must not travel")


def check_server(kit: Path) -> None:
    """Shake hands with the server as this kit would; a server that is not up yet is no error.

    Raises:
        SettingsError: it answers with a certificate that this kit's authority did not issue, or refuses this kit's.
    """
    service = _kit_file(kit, _CLIENT_FILE)["servers"][0]
    host, _, port = str(service["service"]["target"]).rpartition(":")
    startup = kit / "startup"
    context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    try:
        with (
            socket.create_connection((host, int(port)), timeout=HANDSHAKE_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=str(service["identity"])) as secure,
        ):
            secure.version()
    except ssl.SSLError as error:
        reason = f"{host}:{port}: expected the server that this kit was made for, found another ({error.reason})"
        AuditLog(kit / AUDIT_FILE).write("refused server", reason=reason)
        raise SettingsError(f"{reason}; ask the centre, and do not go on") from error
    except OSError:
        return  # not up yet: the engine tries again and again, with the same authority


def _place_stores(kit: Path) -> None:
    """Keep jobs and snapshots inside the kit, wherever it lies: the engine's default is one folder for all servers."""
    resources = _kit_file(kit, "local/resources.json")
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "storage" / "snapshots")
    manager = next(part for part in resources["components"] if part["id"] == "job_manager")
    manager["args"]["uri_root"] = str(kit / "storage" / "jobs")
    (kit / "local" / "resources.json").write_text(json.dumps(resources, indent=2) + "\n", encoding="utf-8")


def _kit_file(kit: Path, name: str) -> dict[str, Any]:
    path = kit / name
    if not path.is_file():
        raise SettingsError(f"{path}: expected a file of a startup kit, found nothing; give the folder of your kit")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _engine(module: str, config: str, kit: Path, *values: str) -> list[str]:
    return [
        *(sys.executable, "-u", "-m", f"nvflare.private.fed.app.{module}"),
        *("-m", str(kit), "-s", config, "--set", "secure_train=true", *values, "config_folder=config"),
    ]
