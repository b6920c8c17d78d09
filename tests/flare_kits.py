"""Kits of phantom hospitals, and what the commands and files of a run over the engine say about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fediod_med.federation.flare.egress import default_rules
from tests.flare_parties import ROI, SPACING, Parties, free_port

PATIENCE_S = float(os.environ.get("FEDIOD_ENGINE_PATIENCE_S", "120"))  # a busy machine imports slowly
NAMES = ("north", "south", "west")
FEDIOD = [sys.executable, "-m", "fediod_med.cli.main"]


def fediod(*words: object) -> list[str]:
    return [*FEDIOD, *map(str, words)]


def submission(kits: Path, run: str, names: Sequence[str] = NAMES, **options: object) -> list[str]:
    given = {"rounds": 5, "pool": 2, "roi": ROI, "spacing": SPACING, "checkpoint-every": 2, "interval": 0.05}
    given |= {"data": "phantoms", "timeout": PATIENCE_S} | {name.replace("_", "-"): v for name, v in options.items()}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    sites = [word for name in names for word in ("--site", name)]
    return fediod("federation", "submit", "--kit", kits / "admin", "--run", run, *sites, *words)


def make_kits(root: Path, names: Sequence[str] = NAMES) -> Path:
    from fediod_med.federation.flare.provision import provision

    made = provision(
        root / "kits", server="localhost", port=free_port(), sites=names, egress=default_rules(batch=2, size=ROI)
    )
    for name in names:
        (made[name] / "local" / "fediod.yaml").write_text(f"site: {root}/sites/{name}\ndevice: cpu\n", encoding="utf-8")
    (made["server"] / "local" / "fediod.yaml").write_text("device: cpu\n", encoding="utf-8")
    return root / "kits"


def start_all(started: Parties, kits: Path, names: Sequence[str] = NAMES) -> None:
    started.start("server", fediod("federation", "server", kits / "server"))
    for name in names:
        started.start(name, fediod("federation", "site", kits / name))


def record(kits: Path, run: str) -> dict[str, Any]:
    path = kits / "admin" / "runs" / f"{run}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def reached(kits: Path, run: str, number: int) -> bool:
    return int(record(kits, run).get("furthest", 0)) >= number


def works(kits: Path, run: str, segment: int) -> bool:
    """Whether this segment, or a later one, has brought a round."""
    found = record(kits, run)
    segments, status = found.get("segments", []), found.get("status", {})
    return len(segments) >= segment and status.get("job") == segments[-1]["job"] and status.get("round", 0) > 0


def audit(kits: Path, name: str) -> list[dict[str, Any]]:
    path = kits / name / "fediod-audit.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def reasons(kits: Path, name: str) -> str:
    return "\n".join(str(line.get("reason", "")) for line in audit(kits, name) if "refused" in str(line["event"]))


def status_of(kits: Path, run: str) -> str:
    words = fediod("federation", "status", "--kit", kits / "admin", "--run", run)
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout
