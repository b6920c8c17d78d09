"""The settings of one run over the engine: plain numbers and names, the same in every segment."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fediod_med.errors import SettingsError
from fediod_med.federation.flare.names import RUN_ID

if TYPE_CHECKING:  # the method brings torch and MONAI along, which a process that only watches a run does without
    from fediod_med.distillation.settings import GeneratorObjective, Schedule

MODES = ("conditional", "unconditional", "phantoms")
_SITE = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")


@dataclass(frozen=True)
class RunSettings:
    """What the centre asks of a run.

    Attributes:
        run_id: letters, digits and dashes.
        sites: names of all hospitals, in the order in which the centre counts them.
        spacing: working grid, mm.
        roi: edge of a synthetic volume, voxels.
        mode: of the generator, `conditional` or `unconditional`; `phantoms` distils on phantoms alone.
        seed: of every draw at the centre.
        pool: phantoms that the centre draws from.
        schedule: what differs from `distillation.Schedule`.
        objective: what differs from the mode's `distillation.GeneratorObjective`.
        quorum: good replies that a round needs.
        timeout_s: seconds per trip after which a hospital counts as failed.
        grace_s: seconds that a trip waits for the others once the quorum has answered.
        segment_rounds: rounds of one job at the engine; 0: no limit.
        fetch_interval_s: seconds that a hospital rests after a task before it asks for the next; the server holds that
            request until there is one (`work_bell`).
        data_name: `patients` or `phantoms`; printed beside results.
    """

    run_id: str
    sites: tuple[str, ...]
    spacing: float = 4.0
    roi: int = 48
    mode: str = "conditional"
    seed: int = 0
    pool: int = 240
    schedule: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    quorum: int = 1
    timeout_s: float = 600.0
    grace_s: float = 30.0
    segment_rounds: int = 0
    fetch_interval_s: float = 0.2
    data_name: str = "patients"

    def plain(self) -> dict[str, Any]:
        """The same as JSON values; the inverse of `read_settings`."""
        values = dataclasses.asdict(self)
        return values | {"sites": list(self.sites)}

    def full_schedule(self) -> Schedule:
        """Defaults and what differs from them."""
        from fediod_med.distillation.settings import Schedule

        return Schedule(**self.schedule)

    def full_objective(self) -> GeneratorObjective:
        """Defaults of the mode and what differs from them."""
        from fediod_med.distillation.settings import PAPER_OBJECTIVE, GeneratorObjective

        base = PAPER_OBJECTIVE if self.mode == "unconditional" else GeneratorObjective()
        return dataclasses.replace(base, **self.objective)


def read_settings(values: Mapping[str, Any]) -> RunSettings:
    """Settings from JSON values.

    Raises:
        SettingsError: a missing, unknown or impossible value; names it.
    """
    from fediod_med.distillation.settings import GeneratorObjective, Schedule

    known = {f.name for f in dataclasses.fields(RunSettings)}
    for name, kind, given in (
        ("settings", RunSettings, values),
        ("schedule", Schedule, values.get("schedule", {})),
        ("objective", GeneratorObjective, values.get("objective", {})),
    ):
        allowed = {f.name: f for f in dataclasses.fields(kind)}
        if not isinstance(given, Mapping) or set(given) - set(allowed):
            raise SettingsError(f"run {name}: expected {', '.join(allowed)}, found {given}")
        try:
            json.dumps(dict(given), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"run {name}: expected plain, finite values, found {given}") from error
    missing = {"run_id", "sites"} - set(values)
    if missing:
        raise SettingsError(f"run settings: expected {', '.join(sorted(missing))}, found none")
    made = RunSettings(**{**{k: v for k, v in values.items() if k in known}, "sites": tuple(values["sites"])})
    if not isinstance(made.run_id, str) or not RUN_ID.fullmatch(made.run_id):
        raise SettingsError(f"run_id: expected letters, digits and dashes, found {made.run_id!r}")
    if not made.sites or len(set(made.sites)) != len(made.sites) or not all(_SITE.fullmatch(s) for s in made.sites):
        raise SettingsError(f"sites: expected different names of letters, digits and dashes, found {made.sites}")
    if made.mode not in MODES:
        raise SettingsError(f"mode: expected {', '.join(MODES)}, found {made.mode!r}")
    if not 1 <= made.quorum <= len(made.sites):
        raise SettingsError(f"quorum: expected 1 to {len(made.sites)} hospitals, found {made.quorum}")
    if min(made.timeout_s, made.fetch_interval_s) <= 0 or made.grace_s < 0 or made.segment_rounds < 0:
        raise SettingsError("run settings: expected positive times and a segment of 0 or more rounds")
    return made
