"""Cells of the comparison: one fold of the patients and one seed; all rows of a cell share patients and teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fediod_med.data.layouts import Subject
from fediod_med.sites import Site


@dataclass(frozen=True, order=True)
class Cell:
    """One train and test split with one seed.

    Attributes:
        seed: of everything random in the cell.
        fold: held out at every hospital, 0 to `folds - 1`.
        folds: number of folds.
    """

    seed: int
    fold: int
    folds: int

    @property
    def name(self) -> str:
        """`fold-0-seed-0`, the name of its folder."""
        return f"fold-{self.fold}-seed-{self.seed}"

    def folder(self, out: Path) -> Path:
        """Where its rows lie below the run folder."""
        return out / "cells" / self.name

    def sites(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The hospitals with this cell's held-out fold and seed."""
        return tuple(
            dataclasses.replace(site, folds=self.folds, fold=self.fold, seed=site.seed + self.seed) for site in sites
        )


def cells_of(folds: int, seeds: Sequence[int]) -> tuple[Cell, ...]:
    """All cells, one seed after the other, so that a run that is cut short has whole cross-validations."""
    return tuple(Cell(seed, fold, folds) for seed in dict.fromkeys(seeds) for fold in range(folds))


def held_out(cells: Sequence[Cell], sites: Sequence[Site]) -> dict[int, list[tuple[str, Subject]]]:
    """Held-out (hospital, subject) pairs by seed, over all folds of that seed."""
    found: dict[int, list[tuple[str, Subject]]] = {cell.seed: [] for cell in cells}
    for cell in cells:
        for site in cell.sites(sites):
            found[cell.seed] += [(site.site_name, subject) for subject in site.subjects()[1]]
    return found
