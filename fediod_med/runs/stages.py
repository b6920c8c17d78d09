"""What a run shows while it works: the stage it is in, and the seconds that each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from fediod_med.progress import Progress


class Clock:
    """Seconds by stage; `with clock("phantoms"):` adds to that stage's.

    Attributes:
        seconds: by stage, in the order in which they were first left.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside, also where it ends in an error."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0) + time.perf_counter() - began, 2)


def on_count(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """A receiver of (done, total) that shows a stage without words."""
    return partial(_show, progress, stage, "")


def on_step(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """A receiver of (done, total) that shows the steps of a private training."""
    return partial(_show, progress, stage, "private steps")


def on_epoch(progress: Progress, stage: str, *, private: bool) -> Callable[[int, int, float], None]:
    """Shows the loss of a training, unless the hospital promised privacy: a loss is a statistic of its patients."""
    return lambda done, total, loss: progress(stage, done, total, "" if private else f"loss {loss:.3f}")


def _show(progress: Progress, stage: str, detail: str, done: int, total: int) -> None:
    progress(stage, done, total, detail)
