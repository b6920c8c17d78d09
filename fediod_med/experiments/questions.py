"""The paper's open questions on phantom hospitals: which experiment is meant, and its tables."""

from __future__ import annotations

from pathlib import Path

from fediod_med.errors import SettingsError
from fediod_med.experiments.backbones import run_backbones
from fediod_med.experiments.divergence import run_divergence
from fediod_med.experiments.scaling import run_scaling
from fediod_med.progress import Progress

QUESTIONS = {"backbones": run_backbones, "divergence": run_divergence, "scaling": run_scaling}
PROFILES = ("full", "smoke")


def run_question(name: str, out: Path, profile: str, *, resume: bool, progress: Progress) -> str:
    """Run one of `QUESTIONS`; writes `results.json` and `table.md` and returns the table.

    Raises:
        SettingsError: unknown name or profile, or a folder that holds another experiment.
    """
    if name not in QUESTIONS or profile not in PROFILES:
        raise SettingsError(
            f"experiment: expected {', '.join(QUESTIONS)} with profile {' or '.join(PROFILES)}, found {name!r} with "
            f"{profile!r}"
        )
    return QUESTIONS[name](out, profile, resume=resume, progress=progress)
