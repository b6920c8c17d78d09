"""The command line: reads settings, calls one procedure, prints. The only place that prints or exits.

Exit codes: 0 done, 1 some cases failed, 2 wrong use or input. Heavy packages are imported inside the commands, so that
`fediod --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fediod_med import __version__
from fediod_med.errors import FediodError, SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE

if TYPE_CHECKING:
    from fediod_med.data.layouts import Subject
    from fediod_med.progress import Progress
    from fediod_med.sites import Site

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=f"One 3D brain-tumour segmenter from hospitals that share neither scans nor weights. {NOT_FOR_CLINICAL_USE}",
)
site_app = typer.Typer(no_args_is_help=True, help="One hospital: its settings, its teacher, its own evaluation.")
app.add_typer(site_app, name="site")
privacy_app = typer.Typer(no_args_is_help=True, help="What a run or a hospital promises, checked and attacked.")
app.add_typer(privacy_app, name="privacy")

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; new or empty unless --resume.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same folder.")]
SitesDir = Annotated[Path, typer.Option("--sites", help="Folder with one folder per hospital.")]
DataRoot = Annotated[Path | None, typer.Option(help="Root of the scans; overrides dataset_dir of the site files.")]
Spacing = Annotated[float | None, typer.Option(help="Working grid in mm; overrides the site files.")]
Roi = Annotated[int | None, typer.Option(help="Crop in voxels a side, a multiple of 8; overrides the site files.")]
Canaries = Annotated[
    int, typer.Option(min=0, help="Mislabelled phantoms for a throw-away private teacher of each dp-sgd site; 0: off.")
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of a teacher; overrides the site files.")]


def main() -> None:
    """Entry point `fediod`: a known error becomes one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except FediodError as error:
        typer.echo(f"fediod: {error}", err=True)
        sys.exit(2)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    epsilon: Annotated[float, typer.Option(help="Privacy budget of each hospital; 0: NOT PRIVATE.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Three phantom hospitals from nothing to a segmented scan: teachers, distillation, comparison, bundle, figures."""
    from fediod_med.runs import run_demo

    with _progress(quiet) as progress:
        result = run_demo(
            out=out,
            epsilon=epsilon,
            seed=seed,
            device=device,
            resume=resume,
            progress=progress,
            announce=_announce,
        )
    _print_result(result)
    typer.echo(
        "Next, with your own data: `fediod segment -i CASE_FOLDER -o out`; "
        "to join as a hospital, read sites/template/README.md"
    )


@app.command()
def phantoms(
    out: Out, cases: Annotated[int, typer.Option(help="Cases per hospital.")] = 12, seed: Seed = 0, quiet: Quiet = False
) -> None:
    """Write the phantom hospitals alone: scans in a BraTS layout and their site files. No patient is in them."""
    from fediod_med.runs import write_phantom_sites

    if out.is_dir() and any(out.iterdir()):
        raise SettingsError(f"{out}: expected a new or empty folder; choose another --out")
    with _progress(quiet) as progress:
        write_phantom_sites(out, seed=seed, cases=cases, progress=progress)
    typer.echo(f"Wrote {out}/hospitals and {out}/sites. Next: fediod distill --sites {out}/sites --out runs/phantoms")


@app.command()
def prior(
    out: Annotated[Path, typer.Option("--out", "-o", help="Weights file to write (.safetensors).")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2400,
    pool: Annotated[int, typer.Option(help="Phantoms per working grid.")] = 200,
    seed: Seed = 1,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train the public prior: the student's network on public phantoms only, on no patient."""
    from fediod_med.runs import run_prior

    with _progress(quiet) as progress:
        path = run_prior(out=out, steps=steps, pool=pool, seed=seed, device=device, progress=progress)
    typer.echo(f"Wrote {path}. {NOT_FOR_CLINICAL_USE}")


@app.command()
def distill(
    sites: SitesDir,
    out: Out,
    data_root: DataRoot = None,
    spacing: Spacing = None,
    roi: Roi = None,
    epochs: Epochs = None,
    rounds: Annotated[int, typer.Option(help="Rounds of questions and answers.")] = 120,
    mode: Annotated[str, typer.Option(help="conditional (label maps) or unconditional (paper).")] = "conditional",
    js_weight: Annotated[
        float | None, typer.Option(help="Weight of teacher divergence: > 0 seeks it, < 0 avoids it (published code).")
    ] = None,
    divergence: Annotated[str, typer.Option(help="jensen_shannon, or released (published code).")] = "jensen_shannon",
    teachers: Annotated[Path | None, typer.Option(help="Folder of trained teachers; else trained here.")] = None,
    compare: Annotated[bool, typer.Option(help="Also train the rows kd_phantoms and pooled.")] = True,
    pool: Annotated[int, typer.Option(help="Public phantoms the centre draws from.")] = 240,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Distil one central student from the hospitals' teachers; missing teachers are trained first."""
    import dataclasses

    from fediod_med.distillation import PAPER_OBJECTIVE, GeneratorObjective, Schedule
    from fediod_med.runs import run_distillation
    from fediod_med.sites import load_sites

    hospitals = [_changed(site, spacing, roi, epochs) for site in load_sites(sites, data_root=data_root)]
    objective = GeneratorObjective() if mode == "conditional" else PAPER_OBJECTIVE
    js_weight = objective.unique if js_weight is None else js_weight
    objective = dataclasses.replace(objective, divergence=divergence, unique=js_weight)
    with _progress(quiet) as progress:
        result = run_distillation(
            hospitals,
            out=out,
            seed=seed,
            device=device,
            schedule=Schedule(rounds=rounds),
            mode=mode,
            objective=objective,
            pool=pool,
            teachers=teachers,
            compare=compare,
            resume=resume,
            progress=progress,
            announce=_announce,
        )
    _print_result(result)
    typer.echo(f"Next: fediod segment -i CASE_FOLDER -o out --model {out}")


@app.command()
def segment(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for <case>_seg.nii.gz and its companions.")],
    scan: Annotated[Path | None, typer.Option("--in", "-i", help="One case folder, or a folder of cases.")] = None,
    t1c: Annotated[Path | None, typer.Option(help="T1 with contrast, if names cannot tell.")] = None,
    t1: Annotated[Path | None, typer.Option(help="T1.")] = None,
    t2: Annotated[Path | None, typer.Option(help="T2.")] = None,
    flair: Annotated[Path | None, typer.Option(help="FLAIR.")] = None,
    model: Annotated[Path | None, typer.Option(help="Run folder, bundle or weights; else the prior.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Label values to write: brats2018, brats2023, msd.")] = None,
    device: Device = "auto",
    preview: Annotated[bool, typer.Option(help="Also write a tri-planar PNG.")] = True,
    statistics: Annotated[bool, typer.Option(help="Also write volumes in ml as JSON.")] = True,
    quiet: Quiet = False,
) -> None:
    """Segment one scan or a folder of scans; the label map lies exactly on the scan's own grid."""
    from fediod_med.checkpoints import load_segmenter
    from fediod_med.devices import pick_device
    from fediod_med.inference import privacy_banner, segment_subject, write_case
    from fediod_med.labels import get_scheme
    from fediod_med.reporting import preview as write_preview
    from fediod_med.runs import find_weights

    subjects = _subjects(scan, {"T1c": t1c, "T1": t1, "T2": t2, "FLAIR": flair})
    compute_on = pick_device(device)
    network, provenance = load_segmenter(find_weights(model), compute_on)
    label_scheme = get_scheme(scheme or provenance.label_scheme)
    banner = f"{privacy_banner(provenance)}. {NOT_FOR_CLINICAL_USE}"
    typer.echo(banner)
    failed = 0
    with _progress(quiet) as progress:
        for number, subject in enumerate(subjects):
            progress("segment", number, len(subjects), subject.subject_id)
            try:
                done = segment_subject(subject, network, provenance, device=compute_on)
                paths = write_case(done, out, scheme=label_scheme, provenance=provenance, statistics=statistics)
                if preview:
                    write_preview(out / f"{subject.subject_id}_preview.png", done, banner=banner)
            except FediodError as error:
                if len(subjects) == 1:
                    raise
                failed += 1
                typer.echo(f"fediod: {subject.subject_id}: {error}", err=True)
                continue
            volumes = "  ".join(f"{name} {done.volumes_ml[name]:.1f} ml" for name in ("WT", "TC", "ET"))
            typer.echo(f"{subject.subject_id}: {volumes}  -> {paths['segmentation']}")
        progress("segment", len(subjects), len(subjects), "")
    if failed:
        typer.echo(f"{failed} of {len(subjects)} scans failed", err=True)
        raise typer.Exit(1)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Option("--pred", "-p", help="Folder with <case>_seg.nii.gz.")],
    references: Annotated[Path, typer.Option("--ref", "-r", help="Expert label maps: case folders or one folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Table to write (.csv); a .json goes beside it.")],
    scheme: Annotated[str, typer.Option(help="What the label values of the references mean.")],
    pred_scheme: Annotated[str | None, typer.Option(help="The same for the predictions, if it differs.")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of the references; any case folders if omitted.")] = None,
) -> None:
    """Dice and HD95 per region, with the policy for absent regions stated, and bootstrap intervals."""
    from fediod_med.evaluation import evaluate_folder, summarise, write_scores
    from fediod_med.labels import get_scheme

    found = evaluate_folder(
        predictions,
        references,
        get_scheme(scheme),
        pred_scheme=None if pred_scheme is None else get_scheme(pred_scheme),
        layout=layout,
    )
    for case in found.missing_predictions:
        typer.echo(f"no prediction for {case}", err=True)
    for case in found.missing_references:
        typer.echo(f"no reference for {case}", err=True)
    for case, reason in found.failures.items():
        typer.echo(f"{case}: {reason}", err=True)
    if found.scores:
        write_scores(out, found.scores, findings=found.findings())
        row = summarise(found.scores)
        typer.echo("  ".join(f"{name} {row[name]:.3f}" for name in ("TC", "WT", "ET", "mean")) + f"  -> {out}")
    if found.missing_predictions or found.failures or not found.scores:
        raise typer.Exit(1)


@app.command()
def info(json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Versions and what this installation can do."""
    import importlib.metadata
    import json

    names = ("torch", "monai", "nibabel", "numpy", "scipy", "SimpleITK", "nilearn", "safetensors")
    versions = {"fediod-med": __version__} | {name: importlib.metadata.version(name) for name in names}
    if json_:
        typer.echo(json.dumps({"notice": NOT_FOR_CLINICAL_USE, "versions": versions}, indent=2))
        return
    for name, version in versions.items():
        typer.echo(f"{name} {version}")
    typer.echo(NOT_FOR_CLINICAL_USE)


@site_app.command("init")
def site_init(hospital: str, sites: SitesDir = Path("sites")) -> None:
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


@site_app.command("verify")
def site_verify(hospital: str, sites: SitesDir = Path("sites"), data_root: DataRoot = None) -> None:
    """Check a site file and read every scan and label map of the hospital; nothing is trained or written."""
    from fediod_med.data.nifti import read_label, read_subject
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


@site_app.command("train")
def site_train(
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

    site = _changed(load_site(sites / hospital, data_root=data_root), spacing, roi, epochs)
    with _progress(quiet) as progress:
        path = train_teacher(
            site,
            output_dir=out or sites / hospital / "models",
            device=device,
            on_epoch=lambda done, total, loss: progress(f"teacher {hospital}", done, total, f"loss {loss:.3f}"),
            on_step=lambda done, total: progress(f"teacher {hospital}", done, total, "private steps"),
        )
    promise = f"Trained privately, epsilon {site.epsilon:g} in all" if site.privacy_mode == "dp-sgd" else "NOT PRIVATE"
    typer.echo(f"Wrote {path}. {promise}: these weights must not leave the hospital.")


@site_app.command("evaluate")
def site_evaluate(
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


@privacy_app.command("report")
def privacy_report(target: Annotated[Path, typer.Argument(help="Run folder or site folder.")]) -> None:
    """State what each hospital's patients are promised, recomputed from the ledgers."""
    from fediod_med.auditing import AUDIT_FILE
    from fediod_med.claims import check_claim, find_claims, stated_with_audit

    for claim in find_claims(target):
        found = check_claim(claim)
        typer.echo(f"{claim.site}: {stated_with_audit(found, target / 'audit' / AUDIT_FILE)}")
        for kind, spent in found.by_kind.items():
            typer.echo(
                f"  {kind}: {spent.charges} charged, {spent.finished} finished, epsilon {spent.epsilon:.4g} on its own"
            )
    typer.echo(NOT_FOR_CLINICAL_USE)


@privacy_app.command("verify")
def privacy_verify(target: Annotated[Path, typer.Argument(help="Run folder or site folder.")]) -> None:
    """Check ledgers, policies and claimed epsilons; exit code 1 if anything is wrong or nothing is promised."""
    from fediod_med.claims import check_claim, find_claims

    failed = False
    for claim in find_claims(target):
        found = check_claim(claim)
        failed |= not found.ok
        if found.ok and found.epsilon is not None:
            report = found.epsilon
            others = {"PRV": report.prv, "exact": report.exact, "dp-accounting": report.dp_accounting}
            more = "".join(f", {name} {value:.4g}" for name, value in others.items() if value is not None)
            signed = "signatures checked" if found.signed else "no key at hand: hashes checked, signatures not"
            typer.echo(f"{claim.site}: verified, epsilon {report.rdp:.4g} by RDP{more}; {signed}")
        for problem in found.problems:
            typer.echo(f"{claim.site}: {problem}", err=True)
    if failed:
        raise typer.Exit(1)


@privacy_app.command("audit")
def privacy_audit(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    sites: SitesDir,
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for audit.json; <run>/audit.")] = None,
    spacing: Spacing = None,
    roi: Roi = None,
    canaries: Canaries = 0,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Attack a run as an insider would: lower bounds on what its networks and volumes reveal about patients."""
    from fediod_med.audit_figures import write_audit_figures
    from fediod_med.auditing import audit_run, discriminator_score, run_files
    from fediod_med.canaries import canary_audits
    from fediod_med.devices import pick_device
    from fediod_med.federation.critic_state import stored_discriminators
    from fediod_med.resources import public_prior
    from fediod_med.sites import load_sites

    hospitals = [_changed(site, spacing, roi, None) for site in load_sites(sites, data_root=data_root)]
    names = [site.site_name for site in hospitals]
    files = run_files(run, names)
    judges, absent = stored_discriminators(run, names)
    with _progress(quiet) as progress:
        planted, unplanted = canary_audits(
            hospitals, run=run, canaries=canaries, seed=seed, device=device, progress=progress
        )
        result = audit_run(
            hospitals,
            files=files,
            out=out or run / "audit",
            reference=public_prior(),
            discriminators={
                name: discriminator_score(judge, device=pick_device(device)) for name, judge in judges.items()
            },
            one_run=planted,
            unavailable=[*absent, *unplanted],
            figures=write_audit_figures,
            seed=seed,
            device=device,
            progress=progress,
        )
    for line in result["statements"]:
        typer.echo(line)
    for line in result["skipped"]:
        typer.echo(f"Skipped: {line}")
    for line in result["alarms"]:
        typer.echo(f"ALARM: {line}", err=True)
    typer.echo(f"Wrote {out or run / 'audit'}. {NOT_FOR_CLINICAL_USE}")
    if result["alarms"]:
        raise typer.Exit(1)


def _changed(site: Site, spacing: float | None, roi: int | None, epochs: int | None) -> Site:
    """The site with what the command line overrides."""
    import dataclasses

    return dataclasses.replace(
        site,
        spacing=site.spacing if spacing is None else spacing,
        roi=site.roi if roi is None else roi,
        epochs=site.epochs if epochs is None else epochs,
    )


def _subjects(scan: Path | None, files: dict[str, Path | None]) -> tuple[Subject, ...]:
    """Cases of `-i`, or the one case that `--t1c --t1 --t2 --flair` name."""
    from fediod_med.data.layouts import Subject, find_cases

    given = {name: path for name, path in files.items() if path is not None}
    if given and len(given) < len(files):
        raise SettingsError(f"expected all of --t1c --t1 --t2 --flair, found only {', '.join(given)}")
    if given:
        if scan is not None:
            raise SettingsError("expected either --in or the four files, found both")
        name = given["T1c"].name.split(".")[0]
        return (Subject(subject_id=name, images=given, channels=None, label=None, group=None),)
    if scan is None:
        raise SettingsError("expected a scan: -i CASE_FOLDER, or --t1c FILE --t1 FILE --t2 FILE --flair FILE")
    return find_cases(scan)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """One rich bar per stage on standard error."""
    if quiet:
        yield lambda _stage, _done, _total, _detail: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, detail: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, detail=detail)
            bars.update(tasks[stage], completed=done, total=total, detail=detail)

        yield show


def _announce(line: str) -> None:
    typer.echo(f"privacy, {line}", err=True)


def _print_result(result: Any) -> None:
    from rich.console import Console

    from fediod_med.reporting import results_table

    console = Console()
    console.print(results_table(result.summary))
    console.print(result.summary["privacy_statement"], style="bold red")
    console.print(f"{NOT_FOR_CLINICAL_USE} Scores: mean Dice on held-out {result.summary['data']}.")
    console.print(f"Run folder: {result.out} (summary.json, figures/, synthetic/, bundle/)")


if __name__ == "__main__":
    main()
