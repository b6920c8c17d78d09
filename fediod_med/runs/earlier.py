"""What a generation of a distillation takes over from the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fediod_med.baselines import weights_path
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.networks import STUDENT
from fediod_med.sites import Site


@dataclass(frozen=True, eq=False)
class Earlier:
    """What the generation before left.

    Attributes:
        student: its weights file; the centre sends it to the hospitals.
        teachers: folder of its teachers (`<site>/model.safetensors`), each of which stayed at its hospital.
        sent: bytes by direction (`down`, `up`) and hospital, of all generations so far.
    """

    student: Path
    teachers: Path
    sent: Mapping[str, Mapping[str, int]]

    def starts(self, sites: Sequence[Site]) -> dict[str, Path]:
        """Weights that each hospital's next teacher starts from, by name.

        The student, where the hospital has the student's network, and otherwise its own last teacher.
        """
        own = {site.site_name: weights_path(self.teachers, site.site_name) for site in sites}
        starts = {site.site_name: self.student if site.network() == STUDENT else own[site.site_name] for site in sites}
        return {name: path for name, path in starts.items() if path is not None}


def total_bytes(federation: EmbeddedFederation, earlier: Earlier | None) -> dict[str, dict[str, int]]:
    """Bytes by direction and hospital, of this generation and those before, students sent down included."""
    sent = {"down": dict(federation.bytes_down), "up": dict(federation.bytes_up)}
    if earlier is None:
        return sent
    weights = earlier.student.stat().st_size
    return {
        "down": {site: count + earlier.sent["down"].get(site, 0) + weights for site, count in sent["down"].items()},
        "up": {site: count + earlier.sent["up"].get(site, 0) for site, count in sent["up"].items()},
    }
