"""Several processes that train one network: each computes its share of a batch, and all hold the same weights.

Data parallelism as `torchrun` starts it. `DistributedDataParallel` (Li et al. 2020, arXiv 2006.15704) averages the
gradients of losses that each process took of its own share, which is right for means over volumes only. Here volumes
are dealt out and losses are not: what the networks made of every share is gathered, each process takes the loss of the
whole batch, pulls its gradient back through its own share, and the gradients are summed. So soft Dice over a batch
keeps its value, and N processes take the step of one, up to the rounding of sums. That needs networks that treat
volumes apart, without batch norm.

The first process leads: it alone talks to hospitals, reads and writes files and prints; `Workers.led` passes on what it
found. A process on its own takes the same way, where every exchange does nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fediod_med.devices import pick_device
from fediod_med.errors import SettingsError, WorkerError

T = TypeVar("T")

WAIT_FOR_LEAD = timedelta(days=7)  # the others wait while the first trains teachers and asks hospitals
WAIT_FOR_PEERS = timedelta(minutes=30)  # within a step, where all have the same to do
PIECE = 2**28  # bytes of one broadcast
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Workers:
    """One process among those of a run.

    Every process must call `gather`, `sum_gradients` and `led` in the same order. Where a process has ended, the others
    raise `WorkerError`; on GPUs it may be `torchrun` that ends them.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        group: through which shares and gradients travel; none for a process on its own.
        waiting: through which the first process passes on what it found; it may take days.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    waiting: dist.ProcessGroup | None = None

    @property
    def lead(self) -> bool:
        """Whether this is the process that talks to hospitals, reads and writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` volumes are this process's; the first processes have one more where it does not divide."""
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    def require(self, count: int, *, option: str) -> None:
        """Refuse more processes than a batch has volumes: some would never have anything to do.

        Raises:
            SettingsError: `count` volumes cannot be shared by so many.
        """
        if self.size > count:
            raise SettingsError(
                f"processes: expected at most {count}, one for each volume of a batch, found {self.size}; start fewer "
                f"(`--nproc-per-node`), or raise {option}, which changes the result"
            )

    def gather(self, part: Tensor | None, count: int, device: torch.device) -> Tensor:
        """The whole batch from the shares of it, in order and without gradient.

        Args:
            part: `(share, ...)` float32 on `device`; `None` where `share(count)` is empty.
            count: volumes of the whole batch, at least 1.
            device: of this process.

        Returns:
            `(count, ...)`, the same on every process.
        """
        if self.group is None:
            assert part is not None  # a process on its own has every share
            return part.detach()
        whole = torch.zeros((count, *self._shape(part, count)), device=device)
        if part is not None:
            whole[self.share(count)] = part.detach()
        self._sum(whole)
        return whole

    def sum_gradients(self, module: nn.Module) -> None:
        """Add up the gradients that all processes hold for a module; no gradient counts as zero.

        A parameter without a gradient on every process keeps none, so that optimisers leave it alone.
        """
        if self.group is None:
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found = torch.tensor([p.grad is not None for p in parameters]).to(gradients[0])
        flat = torch.cat([*[g.reshape(-1) for g in gradients], found])
        self._sum(flat)
        *summed, found = flat.split([*[p.numel() for p in parameters], len(parameters)])
        for parameter, gradient, used in zip(parameters, summed, found.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if used else None

    def led(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first process, on every process; the others do not call it.

        Args:
            work: gives tensors and plain values, nested; the first process gets back the very object.

        Raises:
            WorkerError: on the others, when `work` failed or the first process ended; on it the error is the work's.
        """
        if self.group is None:
            return work()
        if not self.lead:
            message = self._receive()
            if "stopped" in message:
                raise WorkerError(f"process {self.rank + 1} of {self.size}: the first stopped: {message['stopped']}")
            found: T = message["found"]
            return found
        try:
            value = work()
        except Exception as error:
            with contextlib.suppress(WorkerError):
                self._send({"stopped": str(error)})
            raise
        self._send({"found": value})
        return value

    def leave(self) -> None:
        """End the exchanges; the first process may go on alone. Called by all at the same point, or at the end."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group()

    def _shape(self, part: Tensor | None, count: int) -> tuple[int, ...]:
        """Of one volume; a process without any learns it from the first, which always has one."""
        if count >= self.size:
            assert part is not None
            return tuple(part.shape[1:])
        edges = torch.zeros(8, dtype=torch.int64)
        if self.lead:
            assert part is not None
            edges[: part.dim()] = torch.tensor([part.dim() - 1, *part.shape[1:]])
        self._broadcast(edges)
        return tuple(edges[1 : 1 + int(edges[0])].tolist())

    def _send(self, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(data)]))
        for piece in data.split(PIECE):
            self._broadcast(piece)

    def _receive(self) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        for piece in data.split(PIECE):
            self._broadcast(piece)
        message: dict[str, Any] = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
        return message

    def _broadcast(self, tensor: Tensor) -> None:
        with self._ended():
            dist.broadcast(tensor, group=self.waiting, group_src=0)

    def _sum(self, tensor: Tensor) -> None:
        with self._ended():
            dist.all_reduce(tensor, group=self.group)

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch raises when a connection ends or its time is over
            raise WorkerError(
                f"process {self.rank + 1} of {self.size}: another process of this run ended, or did not answer in "
                "time; see its own message, then resume the run"
            ) from error


ALONE = Workers()
"""A process on its own."""


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[Workers, str]]:
    """The processes that `torchrun` started with this one, and the device of this one; otherwise `ALONE` and `device`.

    Tensors on a GPU travel by NCCL, all others by gloo. Processes on one machine talk over loopback; over several
    machines they meet at the address that `torchrun` was told, unencrypted, so that belongs on a network of your own.

    Args:
        device: `auto`, `cuda` (each process takes the GPU of its own number) or `cpu`; without `torchrun`, any.

    Raises:
        SettingsError: another device, or more processes than GPUs.
    """
    if not all(name in os.environ for name in _LAUNCHED):
        yield ALONE, device
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    where = own_device(device, local)
    if int(os.environ["LOCAL_WORLD_SIZE"]) == size and "lo" in (name for _, name in socket.if_nameindex()):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=WAIT_FOR_PEERS)
        waiting = dist.new_group(backend="gloo", timeout=WAIT_FOR_LEAD)
        workers = Workers(rank, size, dist.group.WORLD, waiting)
        yield workers, str(where)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_device(name: str, local_rank: int) -> torch.device:
    """The device of one process among several on a machine.

    Args:
        name: `auto`, `cuda` or `cpu`.
        local_rank: number of the process on its machine, from 0.

    Raises:
        SettingsError: another name, or no GPU left for this process.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise SettingsError(f"device: expected auto, cuda or cpu for processes of torchrun, found {name!r}")
    device = pick_device(name)
    if device.type != "cuda":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"device: process {local_rank + 1} of this machine found only {torch.cuda.device_count()} CUDA device(s); "
            "start at most one process for each (`--nproc-per-node`), or use --device cpu"
        )
    return torch.device("cuda", local_rank)
