"""Messages in reference cycles, as the engine leaves them."""

from __future__ import annotations

import gc
import weakref

from fediod_med.federation.flare.leftovers import SETTLING, Leftovers


class Stream:
    """Holds itself through its future, as the engine's does."""

    def __init__(self) -> None:
        self.future = {"of": self, "content": bytearray(10)}


def test_a_sweep_frees_what_only_a_cycle_holds_and_nothing_else() -> None:
    leftovers, kept = Leftovers(), Stream()
    automatic = gc.isenabled()
    gc.disable()
    try:
        for _ in range(SETTLING + 1):  # the first sweeps also set the present objects aside
            left = weakref.ref(Stream())
            assert left() is not None
            leftovers.sweep()
            assert left() is None and kept.future["of"] is kept
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        if automatic:
            gc.enable()
