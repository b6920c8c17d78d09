"""What the engine costs a round: hospitals as processes with mutual TLS on loopback, against the same ones embedded.

    python benchmarks/federation.py [--rounds 30] [--size 64] [--sites 3] [--delay-ms 0] [--loss 0 | --stall 0]

Both ways run the same rounds on the same phantom hospitals with small untrained teachers and without student steps, so
that little but messages is left; a round's cost over the engine is its mean time less the embedded one's. Every second
round has two trips, hence a mean. Hospitals of the engine compute side by side where there are cores for it, embedded
ones in turn. Also printed: bytes; processor seconds a round of each process, which another load on the machine disturbs
less; and their resident memory after a tenth of the rounds and at the end, which shows growth (--rounds 500).

With --loss, hospitals reach the server over a line that drops this share of the packets in each direction, and holds
each packet back for --delay-ms (tests/slow_line.py; needs root). Without root, --delay-ms alone or with --stall puts a
relay between them: every byte is held back so long in each direction, and a share of the pieces waits another 200 ms,
as a lost packet would make them (Linux's shortest TCP timeout).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fediod_med.federation.flare.centre import run_rounds
from fediod_med.federation.flare.egress import default_rules
from fediod_med.federation.flare.launch import server_command, site_command
from fediod_med.federation.flare.provision import provision
from fediod_med.federation.flare.settings import RunSettings, read_settings
from fediod_med.federation.flare.supervisor import COMPLETED, Supervisor
from fediod_med.hospitals import open_federation, open_hospital
from fediod_med.site_gate import open_gate
from fediod_med.sites import load_site
from tests.flare_parties import SPACING, Parties, family, free_port, parties, write_hospitals
from tests.slow_line import slow_line

STALL_S = 0.2
PIECE = 1 << 16
LOOK_S = 0.5
CLIENT_FILE, SERVER_FILE = "startup/fed_client.json", "startup/fed_server.json"


def settings_for(names: list[str], rounds: int, size: int) -> RunSettings:
    return read_settings(
        {
            "run_id": f"benchmark-{rounds}",
            "sites": names,
            "spacing": SPACING,
            "roi": size,
            "pool": 2,
            "quorum": len(names),
            "schedule": {"rounds": rounds, "batch": 1, "student_steps": 0, "replay": 2, "checkpoint_every": rounds},
            "objective": {"transfer": 0.0, "unique": 0.0},  # leaves the student out of the generator's rounds
            "fetch_interval_s": 0.05,
            "data_name": "phantoms",
        }
    )


def embedded(root: Path, settings: RunSettings) -> dict[str, float]:
    """Mean seconds and processor seconds of a round, all hospitals in this process."""
    opened = []
    for name in settings.sites:
        site = load_site(root / "sites" / name)
        opened.append(
            open_hospital(
                site,
                open_gate(site),
                out=root / "embedded",
                seed=0,
                device="cpu",
                teachers=root / "sites",
                sampler=None,
                on_epoch=lambda _a, _b, _c: None,
                on_step=lambda _a, _b: None,
            )
        )
    federation = open_federation(
        opened,
        out=root / "embedded",
        seed=0,
        run_id=settings.run_id,
        device=torch.device("cpu"),
        adversarial=True,
    )
    walls, began, used = [], time.perf_counter(), time.process_time()

    def on_round(record: Mapping[str, float]) -> None:
        nonlocal began, used
        walls.append(time.perf_counter() - began)
        began = time.perf_counter()
        if record["round"] == 1:
            used = time.process_time()

    run_rounds(federation, settings, folder=root / "embedded", device="cpu", on_round=on_round)
    processor = (time.process_time() - used) / max(1, len(walls) - 1)
    return {"wall": statistics.mean(walls[1:]), "processor": processor, "bytes": sum(federation.bytes_up.values())}


def engine(root: Path, settings: RunSettings, *, delay_s: float, stall: float, loss: float) -> dict[str, Any]:
    """The same over the engine."""
    names = list(settings.sites)
    kits = provision(
        root / "kits",
        server="localhost",
        port=free_port(),
        sites=names,
        egress=default_rules(batch=1, size=settings.roi),
    )
    for name in names:
        text = f"site: {root}/sites/{name}\ndevice: cpu\n"
        (kits[name] / "local" / "fediod.yaml").write_text(text, encoding="utf-8")
    (kits["server"] / "local" / "fediod.yaml").write_text("device: cpu\n", encoding="utf-8")
    if not loss and (delay_s or stall):
        for name in names:
            port = free_port()
            service = _service(kits[name] / CLIENT_FILE, address=f"localhost:{port}")
            relay = _relay(port, int(service.rpartition(":")[2]), delay_s, stall)
            threading.Thread(target=asyncio.run, args=(relay,), daemon=True).start()
    seen: dict[int, Sight] = {}
    with slow_line(delay_s=delay_s, loss=loss) if loss else nullcontext() as line, parties(root / "logs") as started:
        if line is not None:
            for path in (kits["server"] / SERVER_FILE, *(kits[name] / CLIENT_FILE for name in names)):
                _service(path, host=line.near)
        started.start("server", server_command(kits["server"]))
        for name in names:
            started.start(name, [*(line.there if line is not None else ()), *site_command(kits[name])])
        announce = partial(print, file=sys.stderr)
        supervisor = Supervisor(kits["admin"], settings, poll_s=LOOK_S, announce=announce)
        watcher = threading.Thread(target=_watch, args=(started, names, supervisor, seen), daemon=True)
        watcher.start()
        record = supervisor.run()
        if line is not None:
            print(f"line: {line.lost} of {line.passed + line.lost} packets were lost", file=sys.stderr)
    if record["state"] != COMPLETED:
        raise SystemExit(f"the run ended {record['state']}: {record['reason']}")
    first = min((number for number in seen if number >= settings.full_schedule().rounds / 10), default=max(seen))
    return {"status": record["status"], "first": seen[first], "last": seen[max(seen)]}


@dataclass(frozen=True)
class Sight:
    """The processes of a run as they were when a round was first seen to be over."""

    round: int
    time: float
    memory: Mapping[str, float]  # MB, by party and its job
    processor: Mapping[str, float]  # seconds so far


def _watch(started: Parties, names: list[str], supervisor: Supervisor, seen: dict[int, Sight]) -> None:
    while True:
        number = int(supervisor._record["status"].get("round", 0))
        if number and number not in seen:
            try:
                uses: dict[str, tuple[float, float]] = {}
                for name in ("server", *names):
                    party, *jobs = family(started.pid(name))
                    uses |= {name: _use([party]), f"{name} job": _use(jobs)}
            except (KeyError, OSError):
                return
            memory, processor = ({name: use[place] for name, use in uses.items()} for place in (0, 1))
            seen[number] = Sight(number, time.monotonic(), memory, processor)
        time.sleep(0.05)


def _use(pids: list[int]) -> tuple[float, float]:
    memory = processor = 0.0
    for pid in pids:
        memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        processor += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return memory, processor


def _service(path: Path, *, address: str = "", host: str = "") -> str:
    """Point a kit at another address of the server, or at another host with the same port; returns what it was."""
    config = json.loads(path.read_text(encoding="utf-8"))
    service = config["servers"][0]["service"]
    before = str(service["target"])
    service["target"] = address or f"{host}:{before.rpartition(':')[2]}"
    path.write_text(json.dumps(config), encoding="utf-8")
    return before


async def _relay(port: int, to: int, delay_s: float, stall: float) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            _hold_back(reader, far_writer, delay_s, stall), _hold_back(far_reader, writer, delay_s, stall)
        )

    async with await asyncio.start_server(accept, "127.0.0.1", port) as server:
        await server.serve_forever()


async def _hold_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float, stall: float) -> None:
    """Pass pieces on in order, each `delay_s` after it came, some of them later."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

    async def send() -> None:
        while True:
            due, piece = await queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            writer.write(piece)
            await writer.drain()
            if not piece:
                writer.close()
                return

    sending = asyncio.create_task(send())
    try:
        while piece := await reader.read(PIECE):
            late = STALL_S if random.random() < stall else 0.0
            await queue.put((time.monotonic() + delay_s + late, piece))
    except ConnectionError:
        pass
    await queue.put((time.monotonic(), b""))
    await asyncio.gather(sending, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--stall", type=float, default=0.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [f"site-{number}" for number in range(1, given.sites + 1)]
    settings = settings_for(names, given.rounds, given.size)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_hospitals(root, names, roi=given.size)
        plain = embedded(root, settings)
        found = engine(root, settings, delay_s=given.delay_ms / 1000, stall=given.stall, loss=given.loss)
    first, last = found["first"], found["last"]
    count = max(1, last.round - first.round)
    wall = (last.time - first.time) / count
    used = {name: (last.processor[name] - before) / count for name, before in first.processor.items()}
    print(f"{given.sites} sites, 1 x 4 x {given.size}^3, {given.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"embedded {plain['wall']:.3f} s a round, {plain['processor']:.3f} processor s")
    print(f"engine   {wall:.3f} s a round (rounds {first.round} to {last.round}), {sum(used.values()):.3f} processor s")
    print(f"overhead {wall - plain['wall']:.3f} s a round, ratio {wall / plain['wall']:.2f}")
    print(f"bytes up {plain['bytes'] / 1e6 / given.rounds:.2f} MB a round")
    for name, before in first.memory.items():
        memory = f"{before:.0f} MB at round {first.round}, {last.memory[name] - before:+.0f} MB by round {last.round}"
        print(f"{name:12} {used[name]:.3f} processor s a round, {memory}")


if __name__ == "__main__":
    main()
