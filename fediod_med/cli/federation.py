"""Commands of a federation over machines: `fediod federation provision|server|site|submit|status|stop`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from fediod_med.cli.options import Out, Roi, Seed, Spacing
from fediod_med.errors import SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE

Kit = Annotated[Path, typer.Argument(help="Folder of your startup kit.")]
AdminKit = Annotated[Path, typer.Option("--kit", help="Startup kit of the administrator.")]
RunName = Annotated[str, typer.Option("--run", help="Id of the run: letters, digits and dashes.")]
Hospitals = Annotated[list[str], typer.Option("--site", help="Name of a hospital, as in its site.yaml; repeat it.")]


def provision(
    out: Out,
    server: Annotated[str, typer.Option(help="Host name under which the hospitals reach the server.")],
    site: Hospitals,
    port: Annotated[int, typer.Option(help="The only port that is opened, at the server.")] = 8002,
    roi: Annotated[int, typer.Option(help="Edge of a synthetic volume, voxels: the largest that may leave.")] = 48,
    batch: Annotated[int, typer.Option(help="Synthetic volumes a round: the most that may leave at once.")] = 2,
    floor: Annotated[str, typer.Option(help="Weakest privacy mode that may leave: none, gradient, dp-sgd.")] = "none",
    authority: Annotated[Path | None, typer.Option(help="Of an earlier call: makes kits of more hospitals.")] = None,
) -> None:
    """Make a startup kit with mutual TLS for the server, the administrator and each hospital."""
    _engine_at_hand()
    from fediod_med.federation.flare.egress import MODES, default_rules
    from fediod_med.federation.flare.provision import provision as make_kits

    if floor not in MODES:
        raise SettingsError(f"--floor: expected {', '.join(MODES)}, found {floor!r}")
    kits = make_kits(
        out,
        server=server,
        port=port,
        sites=site,
        egress=default_rules(batch=batch, size=roi),
        floor_mode=floor,
        authority=authority,
    )
    for name, kit in kits.items():
        typer.echo(f"{name}: {kit}")
    typer.echo(
        f"Hand each party its own folder over a channel you trust; keep {out}/authority offline. {NOT_FOR_CLINICAL_USE}"
    )


def server(kit: Kit) -> None:
    """Run the server's kit in the foreground, until it is stopped."""
    _engine_at_hand()
    from fediod_med.federation.flare.launch import run_server

    run_server(kit)


def site(kit: Kit) -> None:
    """Run a hospital's kit in the foreground, until it is stopped; opens no port to the outside."""
    _engine_at_hand()
    from fediod_med.federation.flare.launch import run_site

    run_site(kit)


def submit(
    kit: AdminKit,
    run: RunName,
    site: Hospitals,
    rounds: Annotated[int, typer.Option(help="Rounds of questions and answers.")] = 120,
    quorum: Annotated[int | None, typer.Option(help="Good replies that a round needs; all hospitals.")] = None,
    spacing: Spacing = None,
    roi: Roi = None,
    mode: Annotated[str, typer.Option(help="conditional, unconditional or phantoms.")] = "conditional",
    pool: Annotated[int, typer.Option(help="Public phantoms the centre draws from.")] = 240,
    encoding: Annotated[str, typer.Option(help="Of replies: fp16, or compact (about a fifth of the bytes).")] = "fp16",
    checkpoint_every: Annotated[int, typer.Option(help="Rounds between the centre's checkpoints.")] = 25,
    segment: Annotated[int, typer.Option(help="Rounds of one job at the engine; 0: no limit.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds a trip after which a hospital has failed.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds to wait for the rest once the quorum has answered.")] = 30.0,
    interval: Annotated[float, typer.Option(help="Seconds that a hospital rests after a task.")] = 0.2,
    data: Annotated[str, typer.Option(help="Whose scans: patients or phantoms; printed beside results.")] = "patients",
    seed: Seed = 0,
) -> None:
    """Start a run and watch it to its end; interrupted, the same command goes on watching."""
    _engine_at_hand()
    from fediod_med.federation.flare.settings import read_settings
    from fediod_med.federation.flare.supervisor import COMPLETED, Supervisor

    values: dict[str, Any] = {
        "run_id": run,
        "sites": site,
        "mode": mode,
        "seed": seed,
        "pool": pool,
        "schedule": {"rounds": rounds, "encoding": encoding, "checkpoint_every": checkpoint_every},
        "quorum": len(site) if quorum is None else quorum,
        "timeout_s": timeout,
        "grace_s": grace,
        "segment_rounds": segment,
        "fetch_interval_s": interval,
        "data_name": data,
    }
    values |= {} if spacing is None else {"spacing": spacing}
    values |= {} if roi is None else {"roi": roi}
    record = Supervisor(kit, read_settings(values), announce=lambda line: typer.echo(line, err=True)).run()
    _print(record)
    if record["state"] != COMPLETED:
        raise typer.Exit(1)


def status(kit: AdminKit, run: RunName) -> None:
    """How a run stands: rounds, hospitals, what was spent of their patients' privacy, bytes."""
    _engine_at_hand()
    from fediod_med.federation.flare.supervisor import read_record

    record = read_record(kit, run)
    if record is None:
        raise SettingsError(f"{kit}: expected a record of run {run!r}, found none; submit it first")
    _print(record)


def stop(kit: AdminKit, run: RunName) -> None:
    """End a run for good; what the centre has by then stays in its run folder."""
    _engine_at_hand()
    from fediod_med.federation.flare.supervisor import stop as end

    jobs = end(kit, run)
    typer.echo(f"run {run}: stopped; {jobs} jobs were ended at the server")


def _engine_at_hand() -> None:
    if importlib.util.find_spec("nvflare") is None:
        raise SettingsError(
            "federation: expected NVIDIA FLARE, found none; install it with `pip install 'fediod-med[federation]'`"
        )


def _print(record: dict[str, Any]) -> None:
    """A run's record as lines and one table."""
    from rich.console import Console
    from rich.table import Table

    found = record["status"]
    reason = f" ({record['reason']})" if record.get("reason") else ""
    typer.echo(
        f"run {record['run_id']}: {record['state']}{reason}; round {record.get('furthest', 0)} of "
        f"{found.get('rounds', '?')}, {len(record['segments'])} segments; as of {record.get('updated', 'now')}"
    )
    if found.get("seconds_per_round") is not None:
        typer.echo(f"{found['seconds_per_round']:.2f} s a round (median of the last 20)")
    table = Table("hospital", "state", "privacy", "MB down", "MB up")
    for site, down in (found.get("bytes") or {}).get("down", {}).items():
        spent = found.get("spent", {}).get(site, {})
        epsilon = spent.get("epsilon")
        promise = "NOT PRIVATE" if epsilon is None else f"{spent['mode']}, epsilon {epsilon:.4g} spent"
        missed = found.get("misses", {}).get(site, 0)
        present = "absent" if site in found.get("absent", []) else ("present" if not missed else f"missed {missed}")
        up = found["bytes"]["up"].get(site, 0)
        table.add_row(site, present, promise if spent else "", f"{down / 1e6:.1f}", f"{up / 1e6:.1f}")
    if table.row_count:
        Console().print(table)
    typer.echo(NOT_FOR_CLINICAL_USE)
