"""A distillation in generations: hospitals train on from the student, and it is distilled from them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from fediod_med.data.sampler import PublicSampler
from fediod_med.generation import Generation
from fediod_med.runs.distill import RunResult
from fediod_med.runs.earlier import Earlier


class OneGeneration(Protocol):
    """`distill.run_distillation` with everything given but what changes from one generation to the next."""

    def __call__(
        self,
        *,
        out: Path,
        compare: bool,
        resume: bool,
        generation: Generation,
        earlier: Earlier | None,
        public: PublicSampler | None,
    ) -> RunResult:
        """Run one generation into `out`."""


def run_generations(
    one: OneGeneration, *, generations: int, out: Path, compare: bool = True, resume: bool = False
) -> RunResult:
    """Distil one student in several generations, and write the run folder of the last one.

    Local epochs and rounds are those of one generation, cut into parts. The first lies in `out/generation-1`, each a
    run folder of its own, the last in `out`. Going down to the hospitals, the student costs its weights once for each
    generation but the first; no weight comes up.

    Args:
        one: runs one of them.
        generations: 1 is a plain run.
        out: run folder.
        compare: whether the last one trains the rows that only a comparison needs.
        resume: generations that are done are kept, and the one that was interrupted is continued.

    Raises:
        SettingsError: fewer generations than 1, or as `run_distillation`.
    """
    earlier: Earlier | None = None
    public: PublicSampler | None = None
    for number in range(1, generations):
        folder = out / f"generation-{number}"
        summary = folder / "summary.json"
        if not (resume and summary.is_file()):
            generation = Generation(number, generations)
            made = one(out=folder, compare=False, resume=resume, generation=generation, earlier=earlier, public=public)
            public = made.public
        sent = json.loads(summary.read_text(encoding="utf-8"))["bytes"]
        earlier = Earlier(folder / "student.safetensors", folder / "teachers", sent)
    last = Generation(generations, generations)
    return one(out=out, compare=compare, resume=resume, generation=last, earlier=earlier, public=public)
