"""Commands on scans and label maps: segment, check, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fediod_med.cli.display import progress_bars
from fediod_med.cli.options import Device, Quiet
from fediod_med.errors import SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fediod_med.findings import Finding
    from fediod_med.segmentation.inputs import Case


def segment(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for <case>_seg.nii.gz and its companions.")],
    scan: Annotated[
        Path | None,
        typer.Option("--in", "-i", help="Case folder, folder of cases, DICOM study, or .csv, .json, .txt of cases."),
    ] = None,
    t1c: Annotated[Path | None, typer.Option(help="T1 with contrast: a file, or with -i STUDY a DICOM series.")] = None,
    t1: Annotated[Path | None, typer.Option(help="T1.")] = None,
    t2: Annotated[Path | None, typer.Option(help="T2.")] = None,
    flair: Annotated[Path | None, typer.Option(help="FLAIR.")] = None,
    model: Annotated[Path | None, typer.Option(help="Run folder, bundle or weights; else the prior.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Label values to write: brats2018, brats2023, msd.")] = None,
    output_type: Annotated[
        list[str] | None,
        typer.Option("--output-type", help="nifti, dicom-seg or dicom-labelmap; repeat for several. NIfTI always."),
    ] = None,
    device: Device = "auto",
    smallest_lesion: Annotated[
        float, typer.Option(help="Lesions below this many ml are taken out, but for the largest; 0 keeps all.")
    ] = 0.5,
    fast: Annotated[bool, typer.Option("--fast", help="On a coarser working grid.")] = False,
    coregister: Annotated[bool, typer.Option("--coregister", help="Register T1, T2 and FLAIR to T1c first.")] = False,
    native: Annotated[str, typer.Option(help="With --coregister: whose grid the label map lies on.")] = "T1c",
    preprocess_cmd: Annotated[
        str | None, typer.Option(help="Program run on each case first: 'hd-bet -i {input} -o {output}'.")
    ] = None,
    preview: Annotated[bool, typer.Option(help="Also write a tri-planar PNG.")] = True,
    statistics: Annotated[bool, typer.Option(help="Also write volumes, lesions and quality as JSON.")] = True,
    report: Annotated[bool, typer.Option("--report", help="Also write a page per case, HTML and PNG.")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write class probabilities.")] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also write the entropy, and the disagreement of the run's teachers.")
    ] = False,
    overlap: Annotated[float, typer.Option(help="Share of a window covered by its neighbour.")] = 0.25,
    window: Annotated[int | None, typer.Option(help="Edge of a window in voxels; the model's own.")] = None,
    batch: Annotated[int, typer.Option(help="Windows in one pass of the network.")] = 1,
    compile_network: Annotated[bool, typer.Option("--compile", help="Run the network through torch.compile.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings about the input forbid output too.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier call finished and verified.")] = False,
    num_parts: Annotated[int, typer.Option(help="Divide the cases among so many processes.")] = 1,
    part_id: Annotated[int, typer.Option(help="The part to do, from 0.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Segment one scan or many; every label map lies exactly on its scan's own grid and was read back."""
    from fediod_med.devices import pick_device
    from fediod_med.inference import privacy_banner
    from fediod_med.segmentation.cohort import CaseResult, segment_cohort, segment_one
    from fediod_med.segmentation.inputs import part_of
    from fediod_med.segmentation.options import SegmentOptions, load_model
    from fediod_med.segmentation.steps import CaseSegmenter

    options = SegmentOptions(
        scheme=scheme,
        output_types=tuple(output_type or ("nifti",)),
        statistics=statistics,
        preview=preview,
        report=report,
        probabilities=probabilities,
        uncertainty=uncertainty,
        smallest_lesion_ml=smallest_lesion,
        fast=fast,
        roi=window,
        overlap=overlap,
        batch=batch,
        strict=strict,
        coregister=coregister,
        native=native,
        preprocess=preprocess_cmd,
        compile_network=compile_network,
    )
    cases = part_of(_cases(scan, {"T1c": t1c, "T1": t1, "T2": t2, "FLAIR": flair}), parts=num_parts, part=part_id)
    where = pick_device(device)
    segmenter = CaseSegmenter(load_model(model, device=where, options=options), options=options, out=out, device=where)
    typer.echo(f"{privacy_banner(segmenter.model.provenance)}. {NOT_FOR_CLINICAL_USE}")
    single = len(cases) == 1
    if single and not resume:
        _, written = segment_one(cases[0], segmenter)
        _print_findings(written.findings)
        for note in written.notes:
            typer.echo(f"  {note}", err=True)
        typer.echo(_line(written.case_id, written.volumes_ml, written.quality, written.paths["segmentation"]))
        return

    def show(result: CaseResult) -> None:
        record = result.record
        if result.status == "failed":
            typer.echo(f"fediod: {result.case_id}: {record['reason']}", err=True)
        elif result.status == "kept":
            typer.echo(f"{result.case_id}: kept from an earlier call")
        else:
            written = out / record["kinds"]["segmentation"]
            typer.echo(_line(result.case_id, record["volumes_ml"], record["quality"], written))

    with progress_bars(quiet) as progress:
        results = segment_cohort(
            cases,
            segmenter,
            resume=resume,
            part="" if num_parts == 1 else f"-part-{part_id}-of-{num_parts}",
            on_result=show,
            progress=progress,
        )
    failed = sum(result.status == "failed" for result in results)
    typer.echo(f"{len(results) - failed} of {len(results)} done; tables and run record in {out}")
    if failed:
        typer.echo(f"{failed} of {len(results)} scans failed; see {out}/failures*.csv", err=True)
        raise typer.Exit(1)


def check(
    paths: Annotated[list[Path], typer.Argument(help="Case folders, folders of cases, DICOM studies, tables.")],
    scheme: Annotated[str | None, typer.Option(help="Also check label maps, by this scheme.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
) -> None:
    """Say what is wrong with scans before they are segmented: every finding of every case, in one pass."""
    from fediod_med.findings import as_json, fatal
    from fediod_med.labels import get_scheme
    from fediod_med.segmentation.checking import check_cases
    from fediod_med.segmentation.inputs import find_inputs

    cases = [case for path in paths for case in find_inputs(path)]
    findings = check_cases(cases, label_scheme=None if scheme is None else get_scheme(scheme))
    if json_:
        typer.echo(as_json(findings), nl=False)
    else:
        _print_findings(findings, table=True)
        bad = len({found.case for found in fatal(findings, strict=strict)})
        typer.echo(f"{len(cases)} cases, {bad} cannot be segmented, {len(findings)} findings. {NOT_FOR_CLINICAL_USE}")
    if fatal(findings, strict=strict):
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
        if "lesionwise" in row:
            lesions = row["lesionwise"]["dice"]
            shown = "  ".join(f"{name} {lesions[name]:.3f}" for name in ("TC", "WT", "ET", "mean"))
            typer.echo(f"lesion by lesion (BraTS 2023): {shown}")
    if found.missing_predictions or found.failures or not found.scores:
        raise typer.Exit(1)


def _cases(scan: Path | None, files: dict[str, Path | None]) -> tuple[Case, ...]:
    """Cases of `-i`, the one case that `--t1c --t1 --t2 --flair` name, or a DICOM study with chosen series."""
    import dataclasses

    from fediod_med.segmentation.inputs import case_of_files, find_inputs

    given = {name: path for name, path in files.items() if path is not None}
    if scan is None:
        if not given:
            raise SettingsError("expected a scan: -i CASE_FOLDER, or --t1c FILE --t1 FILE --t2 FILE --flair FILE")
        if len(given) < len(files):
            raise SettingsError(f"expected all of --t1c --t1 --t2 --flair, found only {', '.join(given)}")
        return (case_of_files(given),)
    cases = find_inputs(scan)
    if not given:
        return cases
    if len(cases) != 1 or cases[0].study is None:
        raise SettingsError("expected --in or the four files, found both; only a DICOM study takes chosen series")
    return (dataclasses.replace(cases[0], chosen={name: str(path) for name, path in given.items()}),)


def _line(case_id: str, volumes_ml: Mapping[str, float], quality: Mapping[str, Any], written: Path) -> str:
    volumes = "  ".join(f"{name} {volumes_ml[name]:.1f} ml" for name in ("WT", "TC", "ET"))
    return f"{case_id}: {volumes}  quality {quality['value']:.2f}  -> {written}"


def _print_findings(findings: Sequence[Finding], *, table: bool = False) -> None:
    """One line per finding on standard error, or a table on standard output."""
    if not table:
        for found in findings:
            if found.severity.value in ("warning", "privacy"):
                typer.echo(f"{found.code} {found.where}: {found.message}; {found.fix}", err=True)
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table("case", "code", "where", "found", "what to do")
    for found in findings:
        shown.add_row(found.case, found.code, Path(found.where).name, found.message, found.fix)
    if findings:
        Console().print(shown)
