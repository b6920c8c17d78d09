"""Commands on scans and label maps: segment, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fediod_med.cli.display import progress_bars
from fediod_med.cli.options import Device, Quiet
from fediod_med.errors import FediodError, SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE

if TYPE_CHECKING:
    from fediod_med.data.layouts import Subject


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
    from fediod_med.export import find_weights
    from fediod_med.inference import privacy_banner, segment_subject, write_case
    from fediod_med.labels import get_scheme
    from fediod_med.reporting import preview as write_preview

    subjects = _subjects(scan, {"T1c": t1c, "T1": t1, "T2": t2, "FLAIR": flair})
    compute_on = pick_device(device)
    network, provenance = load_segmenter(find_weights(model), compute_on)
    label_scheme = get_scheme(scheme or provenance.label_scheme)
    banner = f"{privacy_banner(provenance)}. {NOT_FOR_CLINICAL_USE}"
    typer.echo(banner)
    failed = 0
    with progress_bars(quiet) as progress:
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
