"""A slow, lossy line on one machine: packets between two network namespaces are held back, and some are dropped.

The line is a pair of Linux TUN devices and a loop between them, so that TCP meets what it would meet between cities:
its windows, its retransmissions, its patience. `tc netem` does the same in kernels that have it. Needs root.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NEAR, FAR = "10.213.7.1", "10.213.7.2"  # addresses of the two ends
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_LARGEST = 65536


@dataclass
class Line:
    """A line while it is up.

    Attributes:
        near: address of this side.
        there: words to put before a command that is to run at the far side.
        passed: packets that came through.
        lost: packets that were dropped.
    """

    near: str
    there: list[str]
    passed: int = field(default=0)
    lost: int = field(default=0)


@contextmanager
def slow_line(*, delay_s: float, loss: float, seed: int = 0) -> Iterator[Line]:
    """Put up a line, and take it down.

    Args:
        delay_s: of every packet, in each direction.
        loss: share of packets that are dropped, in each direction.
        seed: of the choice.
    """
    if os.geteuid() != 0:
        raise SystemExit("a line with lost packets needs root; without it, give --delay-ms and --stall")
    there = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    devices: list[int] = []
    ended = threading.Event()
    try:
        _await_namespace(there.pid)
        line = Line(NEAR, ["nsenter", "--target", str(there.pid), "--net"])
        near, far = f"slow{os.getpid() % 100000}a", f"slow{os.getpid() % 100000}b"
        devices = [_device(near), _device(far)]
        _ip([], "link", "set", far, "netns", str(there.pid))
        for prefix, name, own, other in (([], near, NEAR, FAR), (line.there, far, FAR, NEAR)):
            _ip(prefix, "address", "add", own, "peer", other, "dev", name)
            _ip(prefix, "link", "set", name, "up")
        _ip(line.there, "link", "set", "lo", "up")
        carrying = threading.Thread(target=_carry, args=(line, devices, delay_s, loss, random.Random(seed), ended))
        carrying.start()
        try:
            yield line
        finally:
            ended.set()
            carrying.join()
    finally:
        for device in devices:
            os.close(device)  # the device goes with it
        there.kill()
        there.wait()


def _carry(
    line: Line, devices: list[int], delay_s: float, loss: float, choice: random.Random, ended: threading.Event
) -> None:
    """Move packets until `ended`; each direction keeps its order."""
    under_way: deque[tuple[float, int, bytes]] = deque()  # due in the order of arrival, for all wait alike
    other = dict(zip(devices, reversed(devices), strict=True))
    while not ended.is_set():
        wait = min(0.2, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.2
        for device in select.select(devices, [], [], wait)[0]:
            packet = os.read(device, _LARGEST)
            if choice.random() < loss:
                line.lost += 1
            else:
                under_way.append((time.monotonic() + delay_s, other[device], packet))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, device, packet = under_way.popleft()
            line.passed += 1
            try:
                os.write(device, packet)
            except OSError:  # the device is not up yet, or has no room: lost like any other
                line.lost += 1


def _device(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _await_namespace(pid: int) -> None:
    mine, until = Path("/proc/self/ns/net").readlink(), time.monotonic() + 10
    while Path(f"/proc/{pid}/ns/net").readlink() == mine:
        if time.monotonic() > until:
            raise SystemExit("no network namespace could be made")
        time.sleep(0.01)


def _ip(prefix: list[str], *words: str) -> None:
    subprocess.run([*prefix, "ip", *words], check=True)
