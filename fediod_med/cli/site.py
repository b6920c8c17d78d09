"""Commands of one hospital: `fediod site init|verify|train|evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fediod_med.cli.display import progress_bars
from fediod_med.cli.options import DataRoot, Device, Epochs, Quiet, Roi, SitesDir, Spacing, overridden
from fediod_med.errors import FediodError, SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE


def init(hospital: str, sites: SitesDir = Path("sites")) -> None:
    """Write a site file for a new hospital from the template's defaults."""
    folder = sites / hospital
    path = folder / "site.yaml"
    if path.exists():
        raise SettingsError(f"{path}: exists already; edit it, or choose another name")
    if not hospital.replace("-", "").isalnum():
        raise SettingsError(f"site name: expected letters, digits and dashes, found {hospital!r}")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"site_name: {hospital}\nlayout: brats2021          # brats2018..brats2024, msd, flat\n"
        "label_scheme: brats2018    # what the label values mean: brats2018, brats2023, brats2024, msd\n"
        "dataset_dir: data          # relative to this folder, or absolute\n"
        "folds: 5                   # fold 0 is held out for your own evaluation\nfold: 0\n"
        "spacing: 4.0               # mm; the federation agrees on one value\nroi: 48\nbackbone: unet\n"
        "privacy_mode: none         # NOT PRIVATE; for private training delete this line and set epsilon: 8.0\n",
        encoding="utf-8",
    )
    typer.echo(f"Wrote {path}. Set dataset_dir, then: fediod site verify {hospital} --sites {sites}")


def verify(hospital: str, sites: SitesDir = Path("sites"), data_root: DataRoot = None) -> None:
    """Check a site file and read every scan and label map of the hospital; nothing is trained or written."""
    from fediod_med.data.nifti.reading import read_label, read_subject
    from fediod_med.labels import get_scheme
    from fediod_med.sites import load_site

    site = load_site(sites / hospital, data_root=data_root)
    train, test = site.subjects()
    broken = 0
    for subject in (*train, *test):
        try:
            read_subject(subject)
            read_label(subject, get_scheme(site.label_scheme))
        except FediodError as error:
            broken += 1
            typer.echo(f"{subject.subject_id}: {error}", err=True)
    typer.echo(
        f"{site.site_name}: {len(train)} scans to train on, {len(test)} held out (fold {site.fold} of {site.folds}), "
        f"{broken} defective; privacy mode {site.privacy_mode}"
        + (f", epsilon {site.epsilon:g} at delta {site.delta:g}" if site.private else ": NOT PRIVATE")
    )
    if broken:
        raise typer.Exit(1)


def train(
    hospital: str,
    sites: SitesDir = Path("sites"),
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the weights; <site>/models.")] = None,
    spacing: Spacing = None,
    roi: Roi = None,
    epochs: Epochs = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train the hospital's teacher through its bundle; the weights stay in the site's own folder."""
    from fediod_med.sites import load_site
    from fediod_med.teacher import train_teacher

    site = overridden(load_site(sites / hospital, data_root=data_root), spacing, roi, epochs)
    with progress_bars(quiet) as progress:
        path = train_teacher(
            site,
            output_dir=out or sites / hospital / "models",
            device=device,
            on_epoch=lambda done, total, loss: progress(f"teacher {hospital}", done, total, f"loss {loss:.3f}"),
            on_step=lambda done, total: progress(f"teacher {hospital}", done, total, "private steps"),
        )
    promise = f"Trained privately, epsilon {site.epsilon:g} in all" if site.privacy_mode == "dp-sgd" else "NOT PRIVATE"
    typer.echo(f"Wrote {path}. {promise}: these weights must not leave the hospital.")


def evaluate(
    hospital: str,
    sites: SitesDir = Path("sites"),
    data_root: DataRoot = None,
    weights: Annotated[Path | None, typer.Option(help="Weights; <site>/models/model.safetensors.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; <site>/eval.")] = None,
    device: Device = "auto",
) -> None:
    """Segment and score the hospital's held-out fold through its bundle."""
    from fediod_med.sites import load_site
    from fediod_med.teacher import evaluate_teacher

    site = load_site(sites / hospital, data_root=data_root)
    folder = evaluate_teacher(
        site,
        weights=weights or sites / hospital / "models" / "model.safetensors",
        output_dir=out or sites / hospital / "eval",
        device=device,
    )
    typer.echo(f"Wrote {folder}. {NOT_FOR_CLINICAL_USE}")
