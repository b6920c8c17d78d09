"""Startup kits with mutual TLS for every party, closed before anybody starts: no code gets in, no log or file out.

`nvflare provision` makes the certificates. The files below a kit's `local/` belong to whoever holds the kit; what is
written here is the strictest setting that a run needs, and a hospital may narrow it further.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fediod_med.errors import SettingsError
from fediod_med.federation.flare.names import EGRESS_GUARD, JOB_GUARD, PACKAGE, PROJECT
from fediod_med.federation.flare.plan import PLAN_FILE

ADMIN = "admin@fediod.org"
_NAME = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")

SITE_RIGHTS = {"submit_job": "any", "manage_job": "any", "view": "any"}
"""What the administrator may have a hospital do: take a job, end it, tell its state. No shell, file, log or code."""

SERVER_RIGHTS = {"submit_job": "any", "manage_job": "any", "view": "any", "app_command": "any"}
_NO_RIGHTS = ("clone_job", "download_job", "operate", "shell_commands", "byoc", "server-predeployed-flwr")


def provision(
    out: Path,
    *,
    server: str,
    port: int,
    sites: Sequence[str],
    egress: dict[str, Any],
    floor_mode: str = "none",
    authority: Path | None = None,
) -> dict[str, Path]:
    """Make kits below `out`, one folder a party; returns them by name (`server`, `admin`, and each site).

    Args:
        out: new or empty folder; whoever holds it can issue certificates (`authority/`), so keep it offline afterwards.
        server: host name under which the hospitals reach the server; in its certificate.
        port: of the server; the only one that is opened anywhere.
        sites: names as in their site files.
        egress: rules for `privacy.json`, see `egress.default_rules`.
        floor_mode: the weakest privacy mode that the sites' guards let out, at first.
        authority: folder of an earlier call; its server then knows these hospitals too, and only their kits are made.

    Raises:
        SettingsError: a name that cannot stand in a certificate, a folder in use, no such authority, or the engine's
            tool fails.
    """
    check_names(server, port, sites)
    if authority is not None and not (authority / "cert.json").is_file():
        raise SettingsError(f"{authority}: expected the authority of an earlier provision, found none")
    if out.is_dir() and any(out.iterdir()):
        raise SettingsError(f"{out}: expected a new or empty folder, found files; kits are made once, choose another")
    with tempfile.TemporaryDirectory() as scratch:
        if authority is not None:
            shutil.copytree(authority, Path(scratch) / "made" / PROJECT / "state")
        project = Path(scratch) / "project.yml"
        project.write_text(yaml.safe_dump(_project(server, port, sites)), encoding="utf-8")
        command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", str(project), "-w", f"{scratch}/made"]
        command += ["--force"] if authority is not None else []  # it asks before it goes on with a folder that exists
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
        made = Path(scratch) / "made" / PROJECT / "prod_00"
        if done.returncode or not made.is_dir():
            raise SettingsError(f"{out}: nvflare provision failed: {(done.stdout + done.stderr).strip()[-800:]}")
        kits = ({} if authority is not None else {"server": server, "admin": ADMIN}) | {site: site for site in sites}
        for kit, folder in kits.items():
            shutil.copytree(made / folder, out / kit)
        shutil.copytree(made.parent / "state", out / "authority")
    if authority is None:
        _close_server(out / "server")
    for site in sites:
        _close_site(out / site, egress, floor_mode)
    for secret in (out / "authority", *(out / kit / "startup" for kit in kits)):
        secret.chmod(0o700)
        for path in secret.rglob("*.key"):
            path.chmod(0o600)
    return {kit: out / kit for kit in kits}


def check_names(server: str, port: int, sites: Sequence[str]) -> None:
    """Refuse names that a certificate or a site file cannot bear; `SettingsError`."""
    if not _HOST.fullmatch(server):
        raise SettingsError(f"server: expected a host name, found {server!r}")
    if not 1 <= port <= 65535:
        raise SettingsError(f"port: expected 1 to 65535, found {port}")
    reserved = {"server", "admin", "authority"}
    if not sites or len(set(sites)) != len(sites) or reserved & set(sites):
        raise SettingsError(f"sites: expected different names, none of {', '.join(sorted(reserved))}, found {sites}")
    for site in sites:
        if not _NAME.fullmatch(site):
            raise SettingsError(f"site name: expected letters, digits and dashes, found {site!r}")


def _project(server: str, port: int, sites: Sequence[str]) -> dict[str, Any]:
    def organisation(site: str) -> str:
        return site.replace("-", "_")

    builders = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": PROJECT,
        "participants": [
            {"name": server, "type": "server", "org": "centre", "fed_learn_port": port},
            *({"name": site, "type": "client", "org": organisation(site)} for site in sites),
            {"name": ADMIN, "type": "admin", "org": "centre", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{builders}.workspace.WorkspaceBuilder"},
            {
                "path": f"{builders}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "require_signed_jobs": True},
            },
            {"path": f"{builders}.cert.CertBuilder"},
            {"path": f"{builders}.signature.SignatureBuilder"},
        ],
    }


def _close_site(kit: Path, egress: dict[str, Any], floor_mode: str) -> None:
    resources = _resources(kit)
    resources["class_allow_list"] = [f"{PACKAGE}.executor.", f"{PACKAGE}.guard."]
    resources["allow_log_streaming"] = False  # tracebacks and paths stay at home
    resources["components"] = [part for part in resources["components"] if part["id"] != "site_log_streamer"]
    resources["app_validator"] = {"path": JOB_GUARD, "args": {}}
    _write(kit / "local" / "resources.json", resources)
    guard = {"path": EGRESS_GUARD, "args": {"fields": egress, "floor_mode": floor_mode}}
    scope = {"name": "patients", "properties": {}, "task_result_filters": [guard], "task_data_filters": []}
    _write(kit / "local" / "privacy.json", {"scopes": [scope], "default_scope": "patients"})
    _write(kit / "local" / "authorization.json", _rights(SITE_RIGHTS))
    (kit / PLAN_FILE).write_text(
        "# This hospital's own settings; no job can read or change them. Paths start at this kit, or are absolute.\n"
        'site: ""              # folder of your site.yaml\n'
        'data_root: ""         # overrides dataset_dir of site.yaml\n'
        'teachers: ""          # folder with <site>/models/model.safetensors; the folder above `site` when empty\n'
        "state: state          # discriminator and replies of each run\n"
        "device: auto\n"
        "seed: 0               # of a discriminator without privacy\n",
        encoding="utf-8",
    )


def _close_server(kit: Path) -> None:
    resources = _resources(kit)
    resources["class_allow_list"] = [f"{PACKAGE}.controller."]
    resources["components"] = [part for part in resources["components"] if part["id"] != "log_receiver"]
    _write(kit / "local" / "resources.json", resources)
    _write(kit / "local" / "authorization.json", _rights(SERVER_RIGHTS))
    (kit / PLAN_FILE).write_text(
        "# The centre's own settings. Paths start at this kit, or are absolute.\nruns: runs            # run folders\n"
        "device: auto\n",
        encoding="utf-8",
    )


def _resources(kit: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((kit / "local" / "resources.json.default").read_text(encoding="utf-8"))
    return found | {"class_list_enforcement_mode": "enforce"}


def _rights(granted: dict[str, str]) -> dict[str, Any]:
    rights = dict.fromkeys(_NO_RIGHTS, "none") | granted
    return {"format_version": "1.0", "permissions": {"project_admin": rights}}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
