"""Tiny phantom hospitals for `fediod compare --profile smoke`: everything runs, no number means anything."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.durable import write_atomically

CASES = 4
GRID = Grid((24, 24, 24), 8.0)


def write_smoke_sites(out: Path, *, seed: int = 0) -> Path:
    """Write two phantom hospitals of four tiny scans each below `out`; returns the folder of their site files."""
    for number, profile in enumerate(hospital_profiles()[:2]):
        name = f"phantom-{number}"
        prefix = f"PH{number}"
        write_cohort(
            out / "data" / name, count=CASES, seed=seed * 100 + number, grid=GRID, profile=profile, prefix=prefix
        )
        text = (
            f"# A phantom hospital: no patient.\nsite_name: {name}\nlayout: brats2018\nlabel_scheme: brats2018\n"
            f"dataset_dir: ../../data/{name}\nprivacy_mode: none\n"
        )
        write_atomically(out / "sites" / name / "site.yaml", partial(_write, text))
    return out / "sites"


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
