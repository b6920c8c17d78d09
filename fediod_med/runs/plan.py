"""What a run is to do: settings that must fit, and what every process of it must know to distil its students."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.settings import PAPER_OBJECTIVE, GeneratorObjective, Schedule
from fediod_med.errors import SettingsError
from fediod_med.networks import STUDENT, Generator, build_segmenter
from fediod_med.progress import Progress
from fediod_med.runs.stages import on_count
from fediod_med.sites import Site
from fediod_med.teacher import warm_start

MODES = ("conditional", "unconditional")
STUDENT_RUN, PHANTOMS_RUN = "student", "kd-phantoms"


@dataclass(frozen=True)
class RunPlan:
    """What every process of a run must know to distil its students; see `distill.run_distillation`.

    Attributes:
        run_id: the hospitals keep their state of the run under it, see `name_of`.
        spacing: of the working grid, mm.
        roi: edge of a synthetic volume, voxels.
        seed: of everything.
        mode: of the generator, one of `MODES`.
        pool: phantoms the centre draws from.
        schedule: rounds, steps and rates.
        objective: terms of the generator.
        compare: whether a student of phantoms alone is distilled too.
    """

    run_id: str
    spacing: float
    roi: int
    seed: int
    mode: str
    pool: int
    schedule: Schedule
    objective: GeneratorObjective
    compare: bool

    def plain(self) -> dict[str, Any]:
        """As plain values; `of` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RunPlan:
        """From what `plain` gave."""
        return cls(
            **{
                **plain,
                "schedule": Schedule(**plain["schedule"]),
                "objective": GeneratorObjective(**plain["objective"]),
            }
        )

    @property
    def students(self) -> tuple[str, ...]:
        """The students to distil, in this order."""
        return (STUDENT_RUN, PHANTOMS_RUN) if self.compare else (STUDENT_RUN,)

    def name_of(self, student: str) -> str:
        """The run id that the hospitals keep their state of one student under."""
        return f"{self.run_id}-{student}"

    def sampler(self, progress: Progress) -> PublicSampler:
        """The public phantoms."""
        return PublicSampler(
            spacing=self.spacing,
            roi=self.roi,
            count=self.pool,
            seed=1000 + self.seed,
            progress=on_count(progress, "public phantoms"),
        )

    def arguments(self, student: str, sampler: PublicSampler) -> dict[str, Any]:
        """Of `distill`, with networks made anew: a student with a generator, or one of phantoms alone."""
        torch.manual_seed(self.seed)
        generator = Generator(self.mode, size=self.roi) if student == STUDENT_RUN else None
        torch.manual_seed(self.seed)
        return {
            "student": warm_start(build_segmenter(**STUDENT), init="auto", spec=STUDENT),
            "generator": generator,
            "sampler": sampler if generator is None or generator.mode == "conditional" else None,
            "objective": self.objective,
            "schedule": self.schedule,
            "size": self.roi,
            "seed": self.seed,
            "run_id": self.name_of(student),
        }


def require_mode(mode: str) -> None:
    """Refuse a mode that no generator has; `SettingsError`."""
    if mode not in MODES:
        raise SettingsError(f"mode: expected {' or '.join(MODES)}, found {mode!r}")


def agreed_grid(sites: Sequence[Site]) -> tuple[float, int]:
    """The spacing (mm) and the edge of a window (voxels) of all hospitals; `SettingsError` unless they agree."""
    return _common(sites, "spacing"), int(_common(sites, "roi"))


def default_objective(mode: str) -> GeneratorObjective:
    """Of a generator of this mode: ours, or the paper's."""
    return GeneratorObjective() if mode == "conditional" else PAPER_OBJECTIVE


def _common(sites: Sequence[Site], key: str) -> float:
    values = {site.site_name: float(getattr(site, key)) for site in sites}
    if len(set(values.values())) > 1:
        raise SettingsError(f"{key}: expected one value for all hospitals of a run, found {values}; use --{key}")
    return next(iter(values.values()))
