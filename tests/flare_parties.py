"""Phantom hospitals, kits and processes for tests of the engine; every process that it starts, it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fediod_med.checkpoints import Provenance, save_weights
from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.networks import build_segmenter

SPACING, ROI = 4.0, 16
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "north": {"backbone": "unet", "width": 4, "depth": 2},
    "south": {"backbone": "segresnet", "width": 8, "depth": 2},
    "west": {"backbone": "dynunet", "width": 4, "depth": 3},
}
LAYOUTS = {"north": ("brats2018", "brats2018"), "south": ("brats2023", "brats2023"), "west": ("brats2018", "brats2018")}


def write_hospitals(
    root: Path, names: Sequence[str], *, privacy: Mapping[str, str] | None = None, cases: int = 2, roi: int = ROI
) -> None:
    """Phantom scans, site files, untrained teachers; hospitals differ in backbone, layout, label scheme and scanner."""
    profiles = [profile for _, profile in zip(range(9), hospital_profiles(), strict=False)]
    for number, name in enumerate(names):
        kind = sorted(NETWORKS)[number % 3]
        layout, scheme = LAYOUTS[kind]
        write_cohort(
            root / "scans" / name,
            count=cases,
            seed=number,
            grid=Grid((24, 24, 24), SPACING),
            profile=profiles[number % len(profiles)],
            prefix=name.replace("-", "").upper(),
            layout=layout,
        )
        terms = (privacy or {}).get(name, "privacy_mode: none\n")
        folder = root / "sites" / name
        folder.mkdir(parents=True)
        (folder / "site.yaml").write_text(
            f"site_name: {name}\nlayout: {layout}\nlabel_scheme: {scheme}\ndataset_dir: {root}/scans/{name}\n"
            f"spacing: {SPACING}\nroi: {roi}\n{terms}",
            encoding="utf-8",
        )
        write_teacher(folder / "models" / "model.safetensors", kind, seed=number)


def write_teacher(path: Path, kind: str, *, seed: int) -> dict[str, torch.Tensor]:
    """An untrained teacher: what it says is arbitrary, and the same every time."""
    torch.manual_seed(seed)
    network = {**NETWORKS[kind], "in_channels": 4, "out_channels": 4}
    weights = build_segmenter(**network).state_dict()
    provenance = Provenance("teacher", network, SPACING, "brats2018", (kind,), {}, "phantoms", seed)
    save_weights(path, weights, provenance)
    return weights


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Parties:
    """Processes of one test, each leading its own group."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str]) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def kill(self, name: str) -> None:
        """End a party and its children at once, as a power failure would."""
        process = self._running.pop(name)
        everybody = family(process.pid)
        for pid in everybody:
            _signal(pid, signal.SIGKILL)
        process.wait(timeout=10)
        wait_for(f"{name} to be gone", lambda: not any(map(alive, everybody)), timeout_s=10)

    def job_process(self, name: str) -> int:
        """The child of a party that runs its job, started by the engine in a session of its own."""
        children = [pid for pid in family(self.pid(name)) if pid != self.pid(name)]
        assert len(children) == 1, f"{name}: expected one job process, found {children}"
        return children[0]

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        everybody = [pid for process in self._running.values() for pid in family(process.pid)]
        for number, patience_s in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
            for pid in everybody:
                _signal(pid, number)
            until = time.monotonic() + patience_s
            while time.monotonic() < until and any(map(alive, everybody)):
                for process in self._running.values():
                    process.poll()  # reaps it
                time.sleep(0.1)
        for process in self._running.values():
            process.wait(timeout=10)
        self._running.clear()
        left = [pid for pid in everybody if alive(pid)]
        assert not left, f"processes left behind: {left}"


def processes() -> dict[int, tuple[int, str]]:
    """Parent and state of every process of this machine."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            found[int(entry.name)] = (int(parent), state)
    return found


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    table, members = processes(), [root]
    for pid in members:
        members += [child for child, (parent, _) in table.items() if parent == pid]
    return members


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return processes().get(pid, (0, "Z"))[1] != "Z"


def wait_for(what: str, check: Callable[[], bool], *, timeout_s: float, every_s: float = 0.2) -> None:
    until = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until, f"waited {timeout_s:g} s for {what}"
        time.sleep(every_s)


@contextmanager
def parties(logs: Path) -> Iterator[Parties]:
    started = Parties(logs)
    try:
        yield started
    finally:
        started.stop()


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
