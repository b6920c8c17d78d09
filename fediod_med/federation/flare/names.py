"""Words that both ends of the engine and its job files use."""

from __future__ import annotations

import re

QUERY_TASK = "fediod_query"
ACCOUNT_TASK = "fediod_account"
TASKS = (QUERY_TASK, ACCOUNT_TASK)

CONTENT = "fediod"
"""The one entry of an engine message that is ours; to a hospital it holds `message`, `sequence` and `hash`."""

PACKAGE = "fediod_med.federation.flare"
EXECUTOR = f"{PACKAGE}.executor.HospitalExecutor"
CONTROLLER = f"{PACKAGE}.controller.DistillController"
EGRESS_GUARD = f"{PACKAGE}.guard.EgressGuard"
JOB_GUARD = f"{PACKAGE}.job_guard.JobGuard"

STATUS_TOPIC = "fediod.status"
PAUSE_TOPIC = "fediod.pause"

RUN_ID = re.compile(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,79}")

PROJECT = "fediod"
SERVER_CONFIG = "config_fed_server.json"
CLIENT_CONFIG = "config_fed_client.json"
