"""A distillation in generations: hospitals train on from the student, and it is distilled from them again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.errors import SettingsError
from fediod_med.generation import Generation
from fediod_med.parallel import ALONE, Workers
from fediod_med.progress import Progress, silent
from fediod_med.runs.distill import RunResult, run_distillation
from fediod_med.runs.earlier import Earlier
from fediod_med.runs.plan import agreed_grid, public_phantoms
from fediod_med.sites import Site

logger = logging.getLogger(__name__)


def run_generations(
    sites: Sequence[Site],
    *,
    generations: int,
    out: Path,
    seed: int = 0,
    device: str = "auto",
    schedule: Schedule | None = None,
    mode: str = "conditional",
    objective: GeneratorObjective | None = None,
    pool: int = 240,
    teachers: Path | None = None,
    compare: bool = True,
    resume: bool = False,
    data_name: str = "patients",
    progress: Progress = silent,
    announce: Callable[[str], None] = logger.info,
    workers: Workers = ALONE,
) -> RunResult:
    """Distil one student in several generations, and write the run folder of the last one.

    Local epochs and rounds are those of one generation, cut into parts. The first lies in `out/generation-1`, each a
    run folder of its own, the last in `out`. Going down to the hospitals, the student costs its weights once for each
    generation but the first; no weight comes up.

    Args:
        sites: see `distill.run_distillation`; none of them promises privacy.
        generations: 1 is a plain run.
        out: run folder.
        seed: see there, and so the others.
        device: likewise.
        schedule: of all generations together.
        mode: likewise.
        objective: likewise.
        pool: likewise.
        teachers: likewise; only of a single generation, because others train them anew.
        compare: of the last generation.
        resume: generations that are done are kept, and the one that was interrupted is continued.
        data_name: likewise.
        progress: likewise.
        announce: likewise.
        workers: likewise; only of a single generation.

    Raises:
        SettingsError: a hospital promises privacy: its training would be charged once for each generation; fewer epochs
            or rounds than generations; given teachers or several processes; or as `run_distillation`.
    """
    schedule = Schedule() if schedule is None else schedule
    parts = [Generation(number, generations) for number in range(1, max(1, generations) + 1)]
    _check(sites, parts[0], schedule, teachers, workers)
    public = None
    if generations > 1:
        spacing, roi = agreed_grid(sites)
        public = public_phantoms(spacing=spacing, roi=roi, count=pool, seed=seed, progress=progress)
    earlier: Earlier | None = None
    result: RunResult | None = None
    for part in parts:
        folder = out if part.last else out / f"generation-{part.number}"
        summary = folder / "summary.json"
        if not (resume and not part.last and summary.is_file()):
            result = run_distillation(
                sites,
                out=folder,
                seed=seed,
                device=device,
                schedule=schedule,
                mode=mode,
                objective=objective,
                pool=pool,
                teachers=teachers,
                compare=compare and part.last,
                resume=resume,
                data_name=data_name,
                progress=progress,
                announce=announce,
                workers=workers,
                public=public,
                generation=part,
                earlier=earlier,
            )
        if not part.last:
            earlier = Earlier(
                student=folder / "student.safetensors",
                teachers=folder / "teachers",
                sent=json.loads(summary.read_text(encoding="utf-8"))["bytes"],
            )
    assert result is not None  # the last generation always runs
    return result


def _check(
    sites: Sequence[Site], part: Generation, schedule: Schedule, teachers: Path | None, workers: Workers
) -> None:
    """Refuse, before anything is computed, what several generations cannot do."""
    if part.last:
        return
    if private := [site.site_name for site in sites if site.private]:
        raise SettingsError(
            f"--generations {part.of}: {', '.join(private)} promises privacy, and a training is charged in full each "
            f"time; use --generations 1"
        )
    if teachers is not None or workers.size > 1:
        raise SettingsError(
            f"--generations {part.of}: expected one process, and no --teachers, because each generation trains them; "
            f"found {workers.size} and {teachers or 'none'}"
        )
    part.share(schedule.rounds)
    for site in sites:
        part.share(site.epochs)
