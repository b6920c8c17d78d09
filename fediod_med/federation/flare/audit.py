"""A hospital's own record of what left and what was refused, one JSON line each; it never leaves."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

AUDIT_FILE = "fediod-audit.jsonl"  # in the folder of the hospital's kit
LONGEST_REASON = 500  # characters


class AuditLog:
    """Appends to one file; lines of several processes do not mix."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **facts: str | int | float | None) -> None:
        """Append one line.

        Args:
            event: `sent`, `refused`, `accepted job`, `refused job`, `refused server`, `started`.
            facts: plain values; a long text is cut.
        """
        line: dict[str, str | int | float | None] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "event": event,
        }
        line |= {name: value[:LONGEST_REASON] if isinstance(value, str) else value for name, value in facts.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, (json.dumps(line, sort_keys=True) + "\n").encode())  # one write: lines stay whole
        finally:
            os.close(descriptor)

    def lines(self) -> list[dict[str, str | int | float | None]]:
        """Everything written so far; empty when there is no file."""
        if not self._path.is_file():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
