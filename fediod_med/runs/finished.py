"""What a distillation has come to when no hospital is asked any more: all that scores, figures and records need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fediod_med.data.layouts import Subject
from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.state import DistillationState
from fediod_med.hospitals import Hospital
from fediod_med.runs.plan import RunPlan
from fediod_med.sites import Site


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished distillation.

    Attributes:
        plan: of the run.
        sites: the hospitals' settings, as given.
        hospitals: opened, in the same order.
        sampler: the public phantoms.
        student: the final state of the distillation.
        phantom_student: the same of the student of phantoms alone, where the plan has one.
        privacy: by hospital, what the run has cost its patients, see `hospitals.privacy_record`.
        sent: bytes by direction (`down`, `up`) and hospital, for the student.
        data_name: whose scans the scores are about, `patients` or `phantoms`.
    """

    plan: RunPlan
    sites: tuple[Site, ...]
    hospitals: tuple[Hospital, ...]
    sampler: PublicSampler
    student: DistillationState
    phantom_student: DistillationState | None
    privacy: Mapping[str, Mapping[str, Any]]
    sent: Mapping[str, Mapping[str, int]]
    data_name: str

    @property
    def network(self) -> nn.Module:
        """The distilled student."""
        network: nn.Module = self.student.student_average.module
        return network

    @property
    def conditions(self) -> PublicSampler | None:
        """The phantoms behind the synthetic volumes; an unconditional generator makes its volumes of noise."""
        return self.sampler if self.plan.mode == "conditional" else None

    @property
    def private(self) -> bool:
        """Whether a hospital promised privacy."""
        return any(site.private for site in self.sites)

    @property
    def discreet(self) -> bool:
        """A private run on patients shows none of them: no slice, no id, no score of a single one."""
        return self.data_name != "phantoms" and self.private

    def held_out(self) -> list[tuple[Site, Subject]]:
        """The scans that no teacher has seen, each with its hospital."""
        return [(h.site, subject) for h in self.hospitals for subject in h.site.subjects()[1]]
