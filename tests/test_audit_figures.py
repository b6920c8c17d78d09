"""Audit figures: every attack drawn, alarms coloured, and the notice on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fediod_med.audit_figures import ALARM, SAFE, write_audit_figures
from fediod_med.errors import InputError


def attack(target: str, low: float, *, claim: float | None = None, bound: float = 0.0) -> dict[str, Any]:
    return {
        "target": target,
        "attack": "loss",
        "members": 8,
        "non_members": 8,
        "auc": (low + 1) / 2,
        "auc_interval": [low, 1.0],
        "epsilon": {"epsilon": bound, "ceiling": 1.5},
        "claim": None if claim is None else {"epsilon": claim, "delta": 1e-5},
        "roc": {"fpr": [0.0, 0.5, 1.0], "tpr": [0.25, 0.75, 1.0]},
    }


def result(*attacks: dict[str, Any]) -> dict[str, Any]:
    return {
        "notice": "Research software. Not for clinical use.",
        "not_private": "Computed from patients without noise.",
        "confidence": 0.95,
        "attacks": list(attacks),
        "one_run": [
            {"target": "teacher:a", "epsilon_lower_bound": 0.4, "ceiling": 1.8, "claimed_epsilon": None},
        ],
    }


def pixels_of(path: Path, colour: str) -> int:
    """Pixels of exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    with Image.open(path) as image:
        return int((np.asarray(image.convert("RGB")) == wanted).all(axis=-1).sum())


def test_an_interval_above_one_half_is_drawn_as_an_alarm(tmp_path: Path) -> None:
    calm = write_audit_figures(tmp_path / "calm", result(attack("teacher:a", 0.3), attack("student", 0.4)))
    loud = write_audit_figures(tmp_path / "loud", result(attack("teacher:a", 0.7), attack("student", 0.4)))
    for name in ("auc", "roc"):
        assert pixels_of(calm[name], ALARM) == 0 < pixels_of(calm[name], SAFE)
        assert pixels_of(loud[name], ALARM) > 100 and pixels_of(loud[name], SAFE) > 100


def test_a_bound_above_the_claim_is_drawn_as_an_alarm(tmp_path: Path) -> None:
    kept = write_audit_figures(tmp_path / "kept", result(attack("t", 0.3, claim=1.0, bound=0.9)))["epsilon"]
    broken = write_audit_figures(tmp_path / "broken", result(attack("t", 0.3, claim=0.5, bound=0.9)))["epsilon"]
    assert pixels_of(kept, ALARM) == 0 and pixels_of(broken, ALARM) > 100


@pytest.mark.parametrize("count", [1, 7])
def test_figures_grow_with_the_attacks(count: int, tmp_path: Path) -> None:
    paths = write_audit_figures(tmp_path, result(*[attack(f"teacher:{i}", 0.3) for i in range(count)]))
    assert sorted(paths) == ["auc", "epsilon", "roc"]
    for path in paths.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.height > 300 + 40 * count


def test_an_audit_without_attacks_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at least one attack"):
        write_audit_figures(tmp_path, result())
