"""What the rows of a cell share: hospitals, phantoms, held-out scans, and the way a row is scored and written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fediod_med.baselines import PreparedScan, network_predictor, prepare
from fediod_med.checkpoints import Provenance, current_commit
from fediod_med.comparison.cells import Cell
from fediod_med.comparison.plan import Plan
from fediod_med.comparison.rows import row_kind
from fediod_med.comparison.storage import pool_paths, read_pool, write_row
from fediod_med.data.layouts import Subject
from fediod_med.data.sampler import PublicSampler
from fediod_med.devices import pick_device
from fediod_med.evaluation import SubjectScore, evaluate_predictor
from fediod_med.hospitals import Hospital, open_hospital
from fediod_med.labels import LabelScheme, get_scheme
from fediod_med.networks import STUDENT, build_segmenter
from fediod_med.site_gate import open_gate
from fediod_med.sites import Site
from fediod_med.teacher import warm_start


@dataclass
class Bench:
    """What the rows of a cell share; each part is read when it is first asked for.

    Attributes:
        plan: of the comparison.
        cell: fold and seed.
        device_name: where to compute.
        began: when the work on this task began.
        began_cpu: the same on the clock of this process.
    """

    plan: Plan
    cell: Cell
    device_name: str
    began: float = field(default_factory=time.perf_counter)
    began_cpu: float = field(default_factory=time.process_time)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Hospitals of the cell."""
        return self.cell.sites(self.plan.sites)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return pick_device(self.device_name)

    @cached_property
    def sampler(self) -> PublicSampler:
        """The seed's phantoms, made once for all rows."""
        profile, seed = self.plan.profile, self.cell.seed
        images, tissues = read_pool(pool_paths(self.plan.out, seed, len(profile.pool_parts)))
        return PublicSampler.of_pool(images, tissues, roi=profile.roi, seed=pool_seed(seed))

    @cached_property
    def hospitals(self) -> list[Hospital]:
        """Hospitals with the cell's teachers."""
        return [
            open_hospital(
                site,
                open_gate(site),
                out=self.plan.out,
                seed=0,  # the cell's seed is in the site's already
                device=self.device_name,
                teachers=self.cell.folder(self.plan.out) / "teachers",
                sampler=None,
                on_epoch=lambda _done, _total, _loss: None,
                on_step=lambda _done, _total: None,
            )
            for site in self.sites
        ]

    @cached_property
    def cases(self) -> list[tuple[str, Subject, LabelScheme]]:
        """Held-out patients of the cell."""
        return [
            (site.site_name, subject, get_scheme(site.label_scheme))
            for site in self.sites
            for subject in site.subjects()[1]
        ]

    @cached_property
    def scans(self) -> dict[str, PreparedScan]:
        """Their scans on the working grid."""
        return prepare([subject for _, subject, _ in self.cases], spacing=self.plan.profile.spacing)

    def start(self) -> nn.Module:
        """The student's network from the public prior."""
        torch.manual_seed(self.cell.seed)
        return warm_start(build_segmenter(**STUDENT), init="auto", spec=STUDENT)

    def scores(self, network: nn.Module) -> list[SubjectScore]:
        """A network's scores on the held-out patients, on their native grids."""
        roi = self.plan.profile.roi
        return evaluate_predictor(network_predictor(network, self.scans, roi=roi, device=self.device), self.cases)

    def write(self, key: str, network: nn.Module, **record: Any) -> None:
        """Score a network on the held-out patients and write its row."""
        trained = time.perf_counter() - self.began
        scores = self.scores(network)
        self.write_scores(key, scores, network=network, seconds_training=round(trained, 1), **record)

    def write_scores(
        self, key: str, scores: Sequence[SubjectScore], *, network: nn.Module | None = None, **record: Any
    ) -> None:
        """Write a row."""
        kind = row_kind(key)
        none = dict.fromkeys(self.plan.site_names, 0)
        content = {
            "data": self.plan.data_name,
            "leaves": kind.leaves,
            "bytes": {"down": none, "up": none},
            "seconds": round(time.perf_counter() - self.began, 1),
            "cpu_seconds": round(time.process_time() - self.began_cpu, 1),
            **record,
        }
        provenance = None if network is None else self._provenance(key)
        write_row(self.plan.out, self.cell, key, scores=scores, record=content, network=network, provenance=provenance)

    def _provenance(self, key: str) -> Provenance:
        none = {"mode": "none", "epsilon": None, "delta": None}
        return Provenance(
            kind=f"comparison row {key}",
            network=STUDENT,
            spacing=self.plan.profile.spacing,
            label_scheme="brats2018",
            sites=self.plan.site_names,
            privacy=dict.fromkeys(self.plan.site_names, none),
            trained_on=self.plan.data_name,
            seed=self.cell.seed,
            settings={"roi": self.plan.profile.roi, "fold": self.cell.fold, "folds": self.cell.folds},
            commit=current_commit(),
        )


def pool_seed(seed: int) -> int:
    """Seed of the phantoms of a cell, as in a single run."""
    return 1000 + seed
