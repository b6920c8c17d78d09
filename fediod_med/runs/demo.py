"""The demo: phantom hospitals from nothing to a segmented scan; no patient is in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from fediod_med.data.phantoms import Grid, Profile, hospital_profiles, write_cohort
from fediod_med.devices import pick_device
from fediod_med.distillation.settings import Schedule
from fediod_med.durable import write_atomically
from fediod_med.errors import InputError, SettingsError
from fediod_med.progress import Progress, silent
from fediod_med.runs.distill import RunResult, run_distillation
from fediod_med.segmentation.cohort import segment_cohort
from fediod_med.segmentation.inputs import find_inputs
from fediod_med.segmentation.options import SegmentOptions, load_model
from fediod_med.segmentation.steps import CaseSegmenter
from fediod_med.sites import load_sites

logger = logging.getLogger(__package__)

DEMO_CASES = 12
PRIVATE_DEMO_CASES = 32  # a budget of 8 drowns a hospital of 9 patients in noise
DEMO_HOSPITALS = ("academic-3t", "community-1t", "thick-slices")


def run_demo(
    *,
    out: Path,
    epsilon: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: Progress = silent,
    announce: Callable[[str], None] = logger.info,
) -> RunResult:
    """Three unlike phantom hospitals, from nothing to a segmented unseen scan; scores are phantom scores.

    With `epsilon`, the hospitals have more patients, a budget and a ledger each, and train by DP-SGD.
    """
    if not (out / "sites").is_dir():
        if out.is_dir() and any(out.iterdir()):
            raise SettingsError(f"{out}: expected a new or empty folder; choose another --out")
        cases = PRIVATE_DEMO_CASES if epsilon else DEMO_CASES
        write_phantom_sites(out, seed=seed, cases=cases, epsilon=epsilon, progress=progress)
    sites = load_sites(out / "sites")
    result = run_distillation(
        sites,
        out=out,
        seed=seed,
        device=device,
        schedule=Schedule(rounds=60, student_steps=12, student_rate=1e-3, checkpoint_every=60),
        pool=240,
        resume=resume,
        data_name="phantoms",
        progress=progress,
        announce=announce,
    )
    progress("segment an unseen scan", 0, 1, "")
    options = SegmentOptions(scheme="brats2023", report=True, uncertainty=True)
    where = pick_device(device)
    model = load_model(out, device=where, options=options)
    segmenter = CaseSegmenter(model, options=options, out=out / "segmented", device=where)
    failed = [found for found in segment_cohort(find_inputs(out / "unseen"), segmenter) if found.status == "failed"]
    if failed:
        raise InputError(
            f"{failed[0].case_id}: the demo's unseen scan could not be segmented: {failed[0].record['reason']}"
        )
    progress("segment an unseen scan", 1, 1, "")
    return result


def write_phantom_sites(
    out: Path, *, seed: int, cases: int = DEMO_CASES, epsilon: float = 0.0, progress: Progress = silent
) -> None:
    """Write three phantom hospitals (scans and site files) and one unseen scan of a fourth below `out`."""
    privacy = f"epsilon: {float(epsilon)}\nprivate_steps: 30\n" if epsilon else "privacy_mode: none\n"
    profiles = {profile.name: profile for profile in hospital_profiles()}
    grid = Grid((48, 48, 48), 4.0)
    for number, name in enumerate(DEMO_HOSPITALS):
        progress("phantom hospitals", number, len(DEMO_HOSPITALS), name)
        prefix = name.replace("-", "").upper()
        write_cohort(
            out / "hospitals" / name,
            count=cases,
            seed=seed * 100 + number,
            grid=grid,
            profile=profiles[name],
            prefix=prefix,
        )
        _write_site_file(out / "sites" / name / "site.yaml", name=name, prefix=prefix, privacy=privacy)
    unseen: Profile = profiles["inverted-contrast"]
    write_cohort(
        out / "unseen", count=1, seed=seed * 100 + 99, grid=grid, profile=unseen, prefix="UNSEEN", layout="brats2023"
    )
    progress("phantom hospitals", len(DEMO_HOSPITALS), len(DEMO_HOSPITALS), "")


def _write_site_file(path: Path, *, name: str, prefix: str, privacy: str) -> None:
    text = (
        f"# A phantom hospital: no patient.\nsite_name: {name}\nlayout: brats2018\nlabel_scheme: brats2018\n"
        f"dataset_dir: ../../hospitals/{name}\nsubject_pattern: Brats18_{prefix}_\nfolds: 4\nfold: 0\n"
        f"spacing: 4.0\nroi: 48\nbackbone: unet\nepochs: 6\n{privacy}"
    )
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
