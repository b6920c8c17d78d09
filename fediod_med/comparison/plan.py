"""What a comparison is, in one value that worker processes receive whole; and the settings its folder remembers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fediod_med.comparison.cells import Cell, cells_of
from fediod_med.comparison.profiles import Profile
from fediod_med.errors import SettingsError
from fediod_med.networks import STUDENT
from fediod_med.records import write_json
from fediod_med.sites import Site, check_disjoint, check_settings

PLAN_FILE = "plan.json"
AS_SITES, SHARED = "as-sites", "shared"
_MAY_GROW = ("rows", "seeds", "notice")
_PLACES = ("folder", "dataset_dir")


@dataclass(frozen=True)
class Plan:
    """Everything that a row depends on.

    Attributes:
        out: run folder.
        sites: hospitals, with the profile's grid and compute; folds and seeds come from the cells.
        profile: sizes.
        folds: of the cross-validation.
        seeds: repetitions.
        rows: keys, in order.
        data_name: `patients` or `phantoms`; beside every score.
        teachers: `shared` (the student's network everywhere) or `as-sites` (each hospital's own).
    """

    out: Path
    sites: tuple[Site, ...]
    profile: Profile
    folds: int
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    data_name: str
    teachers: str

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed by seed."""
        return cells_of(self.folds, self.seeds)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Hospitals in order."""
        return tuple(site.site_name for site in self.sites)


def planned_sites(sites: Sequence[Site], profile: Profile, *, teachers: str) -> tuple[Site, ...]:
    """The hospitals on the profile's grid and with its local compute.

    With `shared`, every teacher is the student's network; see `with_shared_network`.

    Raises:
        SettingsError: a hospital promises privacy, or `teachers` is unknown.
        InputError: one patient at two hospitals.
    """
    if teachers not in (SHARED, AS_SITES):
        raise SettingsError(f"--teachers: expected {SHARED} or {AS_SITES}, found {teachers!r}")
    planned = []
    for site in sites:
        if site.private:
            raise SettingsError(
                f"site {site.site_name}: promises {site.privacy_mode}, and a comparison pools scans and moves weights, "
                f"which keeps no promise; use sites with privacy_mode none"
            )
        site = dataclasses.replace(
            site,
            spacing=profile.spacing,
            roi=profile.roi,
            epochs=profile.epochs,
            steps_per_epoch=profile.steps_per_epoch,
        )
        planned.append(with_shared_network(site) if teachers == SHARED else site)
        check_settings(planned[-1])
    check_disjoint(planned)
    return tuple(planned)


def with_shared_network(site: Site) -> Site:
    """The hospital with the student's network, warm-started, and default rates: its own belong to its own backbone."""
    defaults = {field.name: field.default for field in dataclasses.fields(Site)}
    changed: dict[str, Any] = {key: STUDENT[key] for key in ("backbone", "width", "depth")}
    changed |= {key: defaults[key] for key in ("init", "learning_rate", "batch_size", "rehearsal")}
    return dataclasses.replace(site, **changed)


def remember(plan: Plan, *, resume: bool) -> None:
    """Write the plan's settings into its folder, or make sure that a resumed run has the same ones.

    Rows and seeds may be added; whatever changes a row that is there already may not.

    Raises:
        SettingsError: the folder holds a run and `resume` is not set, or its settings differ.
    """
    path = plan.out / PLAN_FILE
    settings = json.loads(json.dumps(_settings(plan), default=str))
    if path.is_file():
        if not resume:
            raise SettingsError(f"{plan.out}: holds a comparison already; add --resume, or choose another --out")
        before = json.loads(path.read_text(encoding="utf-8"))
        for key in settings:
            if key not in _MAY_GROW and settings[key] != before.get(key):
                raise SettingsError(
                    f"{plan.out}: was started with {key} = {before.get(key)}, this run asks for {settings[key]}; "
                    f"resume with the same settings, or choose another --out"
                )
    elif plan.out.is_dir() and any(plan.out.iterdir()):
        raise SettingsError(f"{plan.out}: expected a new or empty folder; choose another --out")
    write_json(path, settings)


def _settings(plan: Plan) -> dict[str, Any]:
    plain = {
        site.site_name: {key: value for key, value in dataclasses.asdict(site).items() if key not in _PLACES}
        for site in plan.sites
    }
    return {
        "profile": dataclasses.asdict(plan.profile),
        "folds": plan.folds,
        "seeds": plan.seeds,
        "rows": plan.rows,
        "data": plan.data_name,
        "teachers": plan.teachers,
        "sites": plain,
    }
