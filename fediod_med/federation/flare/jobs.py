"""Writes the job that travels: two configuration files of a fixed form, no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fediod_med.federation.flare.job_form import client_config
from fediod_med.federation.flare.names import CLIENT_CONFIG, CONTROLLER, SERVER_CONFIG
from fediod_med.federation.flare.settings import RunSettings

HEARTBEAT_TIMEOUT_S = 600


def server_config(settings: RunSettings) -> dict[str, Any]:
    """What the server runs: our controller, with the settings of the run."""
    return {
        "format_version": 2,
        "server": {"heart_beat_timeout": HEARTBEAT_TIMEOUT_S, "task_request_interval": settings.fetch_interval_s},
        "workflows": [{"id": "distillation", "path": CONTROLLER, "args": {"settings": settings.plain()}}],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }


def write_job(folder: Path, settings: RunSettings) -> Path:
    """Write a job folder for `submit_job`; returns it."""
    config = folder / "app" / "config"
    config.mkdir(parents=True, exist_ok=True)
    meta = {
        "name": f"fediod-{settings.run_id}",
        "min_clients": settings.quorum,
        "deploy_map": {"app": ["@ALL"]},
        "resource_spec": {},
    }
    for path, content in (
        (folder / "meta.json", meta),
        (config / SERVER_CONFIG, server_config(settings)),
        (config / CLIENT_CONFIG, client_config(settings.fetch_interval_s)),
    ):
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder
