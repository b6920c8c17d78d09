"""Frees the messages that the engine leaves in reference cycles, before they pile up.

Each message that the engine (2.9) sends ends in a cycle of its stream and its future, and so does its content. Python
looks for cycles among old objects only when there are a quarter more of them, which beside the million objects of torch
and MONAI takes thousands of messages of several MB.
"""

from __future__ import annotations

import gc

SETTLING = 4  # sweeps after which a job has loaded all that it needs: it has been asked in every way


class Leftovers:
    """Sweeps a job's process; what is there at the first few sweeps, libraries mostly, is not looked at again."""

    def __init__(self) -> None:
        self._settling = SETTLING

    def sweep(self) -> None:
        """Free what is held by cycles alone; some milliseconds, and up to a second for the first few times."""
        gc.collect()
        if self._settling:
            gc.freeze()
            self._settling -= 1
