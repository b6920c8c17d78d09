"""A hospital's patients keep one budget, however its settings, folders and patients change."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from fediod_med.data.phantoms import Grid, hospital_profiles, write_cohort
from fediod_med.errors import PrivacyError
from fediod_med.privacy.gate import Gate
from fediod_med.site_gate import open_gate
from fediod_med.sites import Site, load_site

pytest.importorskip("opacus")
SETTINGS = {
    "epsilon": "8.0",
    "private_steps": "2",
    "subspace": "2",
    "discriminator_steps": "2",
    "crops": "1",
    "folds": "2",
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantom patients."""
    folder = tmp_path_factory.mktemp("cohort")
    profile = hospital_profiles()[0]
    write_cohort(folder, count=6, seed=0, grid=Grid((16, 16, 16), 12.0), profile=profile, prefix="H0")
    return folder


@pytest.fixture
def folders(tmp_path: Path, cohort: Path) -> list[Path]:
    """Folders of the six patients in a data folder of this test's own, `tmp_path / "data"`."""
    shutil.copytree(cohort, tmp_path / "data")
    found = sorted({path.parent for path in (tmp_path / "data").rglob("*_t1.nii*")})
    assert len(found) == 6
    return found


def site_of(root: Path, **settings: str) -> Site:
    folder = root / "site"
    folder.mkdir(exist_ok=True)
    (folder / "site.yaml").write_text(
        f"site_name: h0\nlayout: brats2018\nlabel_scheme: brats2018\ndataset_dir: {root / 'data'}\nbackbone: unet\n"
        "width: 16\nspacing: 12.0\nroi: 16\n" + "".join(f"{k}: {v}\n" for k, v in (SETTINGS | settings).items())
    )
    return load_site(folder)


def count(gate: Gate, query: str = "q") -> None:
    gate.release(
        "counts", query_id=query, query_digest="d", compute=lambda: np.zeros((1, 4)), seal=lambda v: v.tobytes()
    )  # fmt: skip


def spend(root: Path) -> float:
    """Spend nearly everything; what was spent."""
    gate = open_gate(site_of(root))
    count(gate)
    for kind in ("teacher", "discriminator"):
        gate.begin_training(kind, run_id="r", settings_digest="s")
    spent = gate.spent_epsilon()
    assert spent is not None and 7.9 < spent <= 8
    return spent


@pytest.mark.parametrize("change", ["joins", "leaves", "both"])
def test_a_patient_who_joins_or_leaves_starts_no_budget_anew(tmp_path: Path, folders: list[Path], change: str) -> None:
    away = tmp_path / "away"
    if change != "leaves":
        shutil.move(folders[0], away)
    spent = spend(tmp_path)
    if change != "leaves":
        shutil.move(away, folders[0])
    if change != "joins":
        shutil.rmtree(folders[1])
    gate = open_gate(site_of(tmp_path))
    assert gate.spent_epsilon() == spent and gate.remaining() == 8 - spent
    with pytest.raises(PrivacyError):
        gate.begin_training("teacher", run_id="another", settings_digest="s")
    first = tmp_path / "site" / "privacy"
    with pytest.raises(PrivacyError, match=f"spent before, in the ledger at {first}"):
        open_gate(site_of(tmp_path, ledger_dir="elsewhere"))


def test_another_ledger_folder_is_refused_for_the_same_patients(tmp_path: Path, folders: list[Path]) -> None:
    spend(tmp_path)
    with pytest.raises(PrivacyError, match="spent before, in the ledger at"):
        open_gate(site_of(tmp_path, ledger_dir="elsewhere"))


def test_a_lost_key_is_not_replaced(tmp_path: Path, folders: list[Path]) -> None:
    spend(tmp_path)
    (tmp_path / "site" / "keys" / "ledger.key").unlink()
    for settings in ({}, {"ledger_dir": "elsewhere"}, {"privacy_mode": "none", "epsilon": "0.0"}):
        with pytest.raises(PrivacyError, match="the key is missing"):
            open_gate(site_of(tmp_path, **settings))


def test_a_promise_cannot_be_left_for_mode_none(tmp_path: Path, folders: list[Path]) -> None:
    none = {"privacy_mode": "none", "epsilon": "0.0"}
    assert open_gate(site_of(tmp_path, **none)).mode == "none"  # nothing was promised yet
    assert not (tmp_path / "site" / "keys").exists() and not (tmp_path / "site" / "privacy").exists()
    spend(tmp_path)
    for settings in (none, none | {"ledger_dir": "elsewhere"}):
        with pytest.raises(PrivacyError, match=f"some whom the ledger at {tmp_path / 'site' / 'privacy'} covers"):
            open_gate(site_of(tmp_path, **settings))
    shutil.rmtree(folders[0])  # the others keep their promise
    with pytest.raises(PrivacyError, match="some whom the ledger"):
        open_gate(site_of(tmp_path, **none))
    with pytest.raises(PrivacyError, match="no witness of whom it covers"):
        open_gate(dataclasses.replace(site_of(tmp_path, **none), key_dir="elsewhere"))


def test_updates_outlive_a_change_of_patients(tmp_path: Path, folders: list[Path]) -> None:
    gate = open_gate(site_of(tmp_path))
    permit = gate.begin_training("discriminator", run_id="r", settings_digest="s").permit_id
    gate.advance(permit, 2)
    shutil.rmtree(folders[0])
    again = open_gate(site_of(tmp_path))
    assert again.progress(permit) == 2 and again.head != gate.head
