"""Frees the messages that the engine leaves in reference cycles, before they pile up.

Each message that the engine (2.9) sends ends in a cycle of its stream and its future, and so does its content. Python
looks for cycles among old objects only when there are a quarter more of them, which beside the million objects of torch
and MONAI takes thousands of messages of several MB.
"""

from __future__ import annotations

import gc


class Leftovers:
    """Sweeps a job's process; the objects that are there at the first sweep are not looked at again."""

    def __init__(self) -> None:
        self._begun = False

    def sweep(self) -> None:
        """Free what is held by cycles alone; some milliseconds, and a second for the first time."""
        gc.collect()
        if not self._begun:
            gc.freeze()
            self._begun = True
