"""How large a comparison is: working grid, local compute, student updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fediod_med.comparison.averaging import AveragingPlan
from fediod_med.errors import SettingsError

PHANTOMS_A_TASK = 240  # at 4 mm; of finer phantoms as many as have the same number of voxels


@dataclass(frozen=True)
class Profile:
    """Size of every row.

    Attributes:
        name: `cpu`, `gpu` or `smoke`.
        spacing: working grid, mm.
        roi: edge of training crops and synthetic volumes, voxels.
        pool: public phantoms the centre draws from.
        epochs: of a teacher.
        steps_per_epoch: optimiser steps of an epoch.
        rounds: of each distillation.
        student_steps: student updates a round; the same in every distilled row.
        averaging: FedAvg before tuning.
        mu: of FedProx before tuning.
        candidates: of FedAvg's tuning on validation patients, all with the same local compute.
        mus: of FedProx's tuning, at FedAvg's tuned setting.
    """

    name: str
    spacing: float
    roi: int
    pool: int
    epochs: int
    steps_per_epoch: int
    rounds: int
    student_steps: int
    averaging: AveragingPlan
    mu: float
    candidates: tuple[AveragingPlan, ...]
    mus: tuple[float, ...]

    @property
    def pool_parts(self) -> tuple[range, ...]:
        """Numbers of the phantoms that one task makes, task by task: a pool on a fine grid is made by many workers."""
        most = max(1, round(PHANTOMS_A_TASK * (self.spacing / 4) ** 3))
        return tuple(range(first, min(first + most, self.pool)) for first in range(0, self.pool, most))


_CPU = Profile(
    name="cpu",
    spacing=4.0,
    roi=48,
    pool=240,
    epochs=15,
    steps_per_epoch=20,
    rounds=60,
    student_steps=6,
    averaging=AveragingPlan(rounds=5),
    mu=0.01,
    candidates=(
        AveragingPlan(rounds=5),
        AveragingPlan(rounds=15),
        AveragingPlan(rounds=5, rate=0.4),
        AveragingPlan(rounds=15, rate=2.0),
    ),
    mus=(0.001, 0.1),
)
_GPU = Profile(
    name="gpu",
    spacing=1.0,
    roi=96,
    pool=48,
    epochs=15,  # local steps and rounds are those at 4 mm, so that the two differ in the grid alone
    steps_per_epoch=20,
    rounds=60,
    student_steps=6,
    averaging=AveragingPlan(rounds=10),
    mu=0.01,
    candidates=(
        AveragingPlan(rounds=10),
        AveragingPlan(rounds=30),
        AveragingPlan(rounds=10, rate=0.4),
        AveragingPlan(rounds=30, rate=2.0),
    ),
    mus=(0.001, 0.1),
)
_SMOKE = Profile(
    name="smoke",
    spacing=8.0,
    roi=16,
    pool=3,
    epochs=1,
    steps_per_epoch=2,
    rounds=2,
    student_steps=1,
    averaging=AveragingPlan(rounds=1),
    mu=0.01,
    candidates=(AveragingPlan(rounds=1), AveragingPlan(rounds=2)),
    mus=(0.1,),
)
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in (_CPU, _GPU, _SMOKE)}


def get_profile(name: str) -> Profile:
    """Profile by name; `SettingsError` on an unknown one."""
    if name not in PROFILES:
        raise SettingsError(f"--profile: expected {', '.join(PROFILES)}, found {name!r}")
    return PROFILES[name]
