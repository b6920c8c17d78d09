"""Tiny distillations that one process runs alone, or two together; `python -m tests.parallel_parties FOLDER` is one.

Two processes find each other through the variables that `torchrun` sets, and leave what each of them saw in FOLDER. Two
threads may stand for them: they exchange over the same gloo, without the seconds that starting a process takes.
"""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.data.phantoms import Grid, load_anatomy
from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import PAPER_OBJECTIVE, GeneratorObjective, Schedule
from fediod_med.distillation.state import DistillationState
from fediod_med.errors import FediodError
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.networks import Generator, build_segmenter
from fediod_med.parallel import ALONE, Workers, joined
from fediod_med.privacy.gate import Gate
from fediod_med.protocol import Query, Reply, SiteFailure

CPU = torch.device("cpu")
SIZE = 16
SITES = ("north", "south")
HALF = 2  # the round after which a copy of a run's folder is what a killed run would have left

WHOLE = Schedule(
    rounds=4, batch=2, student_steps=2, student_batch=3, replay=6, phantom_share=0.25, checkpoint_every=2, candidates=2
)
ONE_STEP = replace(WHOLE, rounds=1, student_steps=1, phantom_share=0.0)
SCENARIOS: Mapping[str, Mapping[str, Any]] = {
    "whole": {"schedule": WHOLE},
    "one-step": {"schedule": ONE_STEP},
    # The generator's second step, with a student that stands still: its first moves the last layer alone.
    "two-generator-steps": {"schedule": replace(ONE_STEP, rounds=2, student_rate=0.0, generator_rate=1e-2, batch=3)},
    "idle": {"schedule": replace(ONE_STEP, batch=1, candidates=1)},
    "paper": {
        "schedule": replace(ONE_STEP, batch=3, candidates=1),
        "mode": "unconditional",
        "objective": PAPER_OBJECTIVE,
    },
    "phantoms": {"schedule": ONE_STEP, "mode": None},
    "chosen": {
        "schedule": replace(WHOLE, rounds=10, phantom_share=0.5, selection=True),
        "objective": replace(GeneratorObjective(), learned=1.0),
    },
}
"""What both one process and two run, by name."""
REFUSALS: Mapping[str, Mapping[str, Any]] = {
    "too-many": {"schedule": replace(WHOLE, student_batch=1, rehearsal=0.0)},
    "silent": {"silent": "south"},
}
_BUILDING = threading.Lock()  # networks draw from the random numbers of the whole process, which threads share


@dataclass
class Seen:
    """What a process saw of a run: queries that reached a hospital, calls of `on_round` and `on_snapshot`."""

    asked: list[tuple[str, str, int]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)


class Counting:
    """Real hospitals; notes each query, and lets `silent` fail."""

    def __init__(self, nodes: Mapping[str, SiteNode], seen: Seen, silent: str | None) -> None:
        self._inner, self._seen, self._silent = EmbeddedFederation(nodes), seen, silent

    @property
    def site_names(self) -> tuple[str, ...]:
        return self._inner.site_names

    def ask(self, queries: Mapping[str, Query], *, quorum: int, timeout_s: float) -> dict[str, Reply | SiteFailure]:
        self._seen.asked += [(site, query.kind, query.round) for site, query in queries.items()]
        replies = self._inner.ask(queries, quorum=quorum, timeout_s=timeout_s)
        if self._silent is not None:
            replies[self._silent] = SiteFailure(self._silent, 0, "timeout")
        return replies


def public_sampler() -> PublicSampler:
    """Four phantoms of 16 voxels."""
    return PublicSampler(spacing=12, roi=SIZE, count=4, seed=3, anatomy=load_anatomy(Grid((16, 16, 16), 12.0)))


def nodes(sampler: PublicSampler, folder: Path, device: torch.device) -> dict[str, SiteNode]:
    """Two hospitals with untrained teachers and a discriminator each, whose state lies below `folder`."""
    volumes = [image.float() for image, _ in sampler.volumes()]
    made = {}
    for index, name in enumerate(SITES):
        torch.manual_seed(index)
        made[name] = SiteNode(
            name,
            build_segmenter("unet", width=8, depth=2),
            (torch.arange(9)[:, None] < torch.tensor([9, 4, 5, 6]) - index).float(),
            critic=PlainCritic(
                name,
                volumes[2 * index : 2 * index + 2],
                state_dir=folder / name,
                seed=1,
                device=device,
                width=4,
                layers=1,
            ),
            gate=Gate.unprotected(name),
            device=device,
        )
    return made


def run(
    sampler: PublicSampler,
    folder: Path,
    *,
    workers: Workers = ALONE,
    device: torch.device = CPU,
    resume: bool = False,
    silent: str | None = None,
    mode: str | None = "conditional",
    objective: GeneratorObjective | None = None,
    schedule: Schedule = WHOLE,
) -> tuple[DistillationState, Seen]:
    """One distillation with its folder; a copy of that, as of round `HALF`, lies beside it.

    Networks of each process start from other weights: a run must take those of the first.
    """
    seen = Seen()

    def on_round(record: Mapping[str, float]) -> None:
        seen.rounds.append(int(record["round"]))
        if record["round"] == HALF and not resume:
            shutil.copytree(folder, folder.with_name(f"{folder.name}-half"))

    with _BUILDING:
        federation = Counting(nodes(sampler, folder, device), seen, silent) if workers.lead else None
        torch.manual_seed(7 + workers.rank)
        student = build_segmenter("unet", width=8, depth=2)
        generator = None if mode is None else Generator(mode, size=SIZE, width=4)
    state = distill(
        federation,
        student=student,
        generator=generator,
        sampler=None if mode == "unconditional" else sampler,
        objective=GeneratorObjective() if objective is None else objective,
        schedule=schedule,
        size=SIZE,
        seed=2,
        run_id="run-1",
        device=device,
        checkpoint=folder / "centre.pt" if workers.lead else folder / "never.pt",
        resume=resume,
        on_round=on_round,
        on_snapshot=lambda snapshot: seen.snapshots.append(snapshot.round),
        workers=workers,
    )
    return state, seen


def gradient(network: nn.Module | None) -> Tensor:
    """The gradients that the last step left, as one vector."""
    return torch.cat(
        [p.grad.flatten() for p in (network.parameters() if network is not None else ()) if p.grad is not None]
        or [torch.zeros(0)]
    )


def findings(state: DistillationState, seen: Seen) -> dict[str, Any]:
    """What a test compares."""
    return {
        "state": copy.deepcopy(state.state_dict()),
        "student_gradient": gradient(state.student),
        "generator_gradient": gradient(state.generator),
        "asked": seen.asked,
        "rounds": seen.rounds,
        "snapshots": seen.snapshots,
    }


def take_part(workers: Workers, sampler: PublicSampler, folder: Path) -> None:
    """The part of one of two in all of it: every scenario, a resumed run, refusals."""
    found: dict[str, Any] = {}
    for name, settings in SCENARIOS.items():
        found[name] = findings(*run(sampler, folder / name, workers=workers, **settings))
    found["resumed"] = findings(*run(sampler, folder / "of-one", workers=workers, resume=True))
    for name, settings in REFUSALS.items():
        try:
            run(sampler, folder / name, workers=workers, **settings)
        except FediodError as error:
            found[name] = [type(error).__name__, str(error)]
    found["after"] = workers.led(lambda: "still together")
    save_state(folder / f"found-{workers.rank}.pt", found)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two of `take_part` left."""
    first, second = (load_state(folder / f"found-{rank}.pt") for rank in range(2))
    return first, second


def together(size: int, work: Callable[[Workers], Any]) -> list[Any]:
    """What `work` gives, or raises, in each of `size` threads that exchange over gloo."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch offers them without types
    prefixed = dist.PrefixStore  # type: ignore[attr-defined]
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            group, waiting = (
                dist.ProcessGroupGloo(prefixed(name, store), rank, size, timedelta(seconds=60))
                for name in ("group", "waiting")
            )
            results[rank] = work(Workers(rank, size, group, waiting))
        except Exception as error:  # handed to the test
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def launch_variables(size: int) -> list[dict[str, str]]:
    """What `torchrun` tells each of so many processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": f"{size}",
        "LOCAL_WORLD_SIZE": f"{size}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }
    return [{**shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(size)]


def start_two(folder: Path, *, timeout_s: float = 200.0) -> list[str]:
    """Run `main` in two processes and wait for them; what each printed."""
    shared = launch_variables(2)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_parties", str(folder)],
            env={**os.environ, **shared[rank], "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=timeout_s)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def main(folder: Path) -> None:
    """One of two processes: takes part, then the first ends without a word."""
    torch.set_num_threads(1)
    with joined("cpu") as (workers, device):
        take_part(workers, public_sampler(), folder)
        if workers.lead:
            os._exit(0)  # as a killed process ends
        try:
            workers.led(dict)
        except FediodError as error:
            save_state(folder / "ended.pt", {"error": [type(error).__name__, str(error)], "device": device})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
