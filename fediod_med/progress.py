"""How a long procedure tells where it stands, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, detail)."""


def silent(stage: str, done: int, total: int, detail: str) -> None:
    """A `Progress` that shows nothing."""
