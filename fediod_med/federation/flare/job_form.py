"""The one form that the application of a job may have at a hospital: a configuration, no code, no argument."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fediod_med.errors import ProtocolError
from fediod_med.federation.flare.names import CLIENT_CONFIG, EXECUTOR, SERVER_CONFIG, TASKS

SLOWEST_FETCH_S = 10.0
SIGNATURES = (
    ".__nvfl_sig.json",
    ".__nvfl_submitter.crt",
)  # of the submitter; the engine verifies them before this check


def client_config(fetch_interval_s: float) -> dict[str, Any]:
    """What a hospital runs: our executor, without arguments."""
    return {
        "format_version": 2,
        "default_task_fetch_interval": fetch_interval_s,
        "executors": [{"tasks": list(TASKS), "executor": {"path": EXECUTOR, "args": {}}}],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }


def check_app(folder: Path) -> None:
    """Hold the application of a job, as deployed, against the one form that is accepted.

    Raises:
        ProtocolError: code or any other file, a value that could act, or another configuration than `client_config`.
    """
    allowed = {
        f"config/{SERVER_CONFIG}",
        f"config/{CLIENT_CONFIG}",
        *(f"{place}{name}" for place in ("", "config/") for name in SIGNATURES),
    }
    files = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    extra = sorted(files - allowed)
    if extra:
        raise ProtocolError(f"job: expected two configuration files and no code, found {extra[0]!r}")
    try:
        found = json.loads((folder / "config" / CLIENT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProtocolError(f"job: expected {CLIENT_CONFIG} in JSON, found none ({error})") from error
    for text in _texts(found):
        if "$" in text or text.startswith(("_", "@", "%")) or "{" in text:
            raise ProtocolError(f"job: expected plain values, found {text!r}, which could act")
    interval = found.get("default_task_fetch_interval") if isinstance(found, dict) else None
    if not isinstance(interval, int | float) or isinstance(interval, bool) or not 0 < interval <= SLOWEST_FETCH_S:
        raise ProtocolError(f"job: expected a fetch interval up to {SLOWEST_FETCH_S:g} s, found {interval!r}")
    if found != client_config(interval):
        raise ProtocolError("job: expected this package's executor and nothing else, found another configuration")


def _texts(value: object) -> Iterator[str]:
    """Every key and text in nested JSON."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
