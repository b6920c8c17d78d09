"""Cells: every patient is tested exactly once per seed, and never trained on in the cell that tests it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fediod_med.comparison.cells import Cell, cells_of, held_out
from fediod_med.data.partitions import patient_id
from fediod_med.sites import Site, load_sites


@pytest.fixture
def sites(tmp_path: Path) -> tuple[Site, ...]:
    """Two hospitals of seven and four subjects; one patient came twice. Only names matter, the files are empty."""
    ids = {"north": ["A_1", "A_2", "B_1", "C_1", "D_1", "E_1", "F_1"], "south": ["G_1", "H_1", "I_1", "J_1"]}
    for site, subjects in ids.items():
        for subject in subjects:
            name = f"Brats18_{site.upper()}_{subject}"
            folder = tmp_path / "data" / site / name
            folder.mkdir(parents=True)
            for ending in ("t1ce", "t1", "t2", "flair", "seg"):
                (folder / f"{name}_{ending}.nii.gz").touch()
        (tmp_path / "sites" / site).mkdir(parents=True)
        (tmp_path / "sites" / site / "site.yaml").write_text(
            f"site_name: {site}\nlayout: brats2018\nlabel_scheme: brats2018\ndataset_dir: ../../data/{site}\nseed: 3\n"
        )
    return load_sites(tmp_path / "sites")


def test_every_patient_is_tested_once_per_seed(sites) -> None:
    cells = cells_of(3, [0, 1])
    everyone = {(site.site_name, s.subject_id) for site in sites for s in site.subjects()[0]}
    for found in held_out(cells, sites).values():
        counts = Counter((site, subject.subject_id) for site, subject in found)
        assert set(counts) == everyone and set(counts.values()) == {1}


def test_no_patient_is_trained_and_tested_in_one_cell(sites) -> None:
    for cell in cells_of(3, [0]):
        for site in cell.sites(sites):
            train, test = site.subjects()
            assert not {patient_id(s.subject_id) for s in train} & {patient_id(s.subject_id) for s in test}


def test_cells_come_seed_by_seed_and_change_nothing_but_fold_and_seed(sites) -> None:
    cells = cells_of(2, [4, 0, 4])
    assert cells == (Cell(4, 0, 2), Cell(4, 1, 2), Cell(0, 0, 2), Cell(0, 1, 2))
    site = cells[1].sites(sites)[0]
    assert (site.fold, site.folds, site.seed, site.site_name) == (1, 2, 7, "north")
    assert cells[1].folder(Path("run")) == Path("run/cells/fold-1-seed-4")
