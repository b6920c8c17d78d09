"""Commands about promises to patients: `fediod privacy report|verify|audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fediod_med.cli.display import progress_bars
from fediod_med.cli.options import Canaries, DataRoot, Device, Quiet, Roi, Seed, SitesDir, Spacing, overridden
from fediod_med.resources import NOT_FOR_CLINICAL_USE


def report(target: Annotated[Path, typer.Argument(help="Run folder or site folder.")]) -> None:
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


def verify(target: Annotated[Path, typer.Argument(help="Run folder or site folder.")]) -> None:
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


def audit(
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

    hospitals = [overridden(site, spacing, roi, None) for site in load_sites(sites, data_root=data_root)]
    names = [site.site_name for site in hospitals]
    files = run_files(run, names)
    judges, absent = stored_discriminators(run, names)
    with progress_bars(quiet) as progress:
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
