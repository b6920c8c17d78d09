"""Files of a snapshot: what they hold, their types, and that left is left."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fediod_med.data.phantoms import Grid, load_anatomy
from fediod_med.data.sampler import PublicSampler
from fediod_med.snapshots import read_rounds, take_snapshot, write_snapshot


@pytest.fixture(scope="module")
def sampler() -> PublicSampler:
    return PublicSampler(spacing=12, roi=16, count=3, seed=3, anatomy=load_anatomy(Grid((16, 16, 16), 12.0)))


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_every_file_of_a_round(sampler: PublicSampler, tmp_path: Path) -> None:
    public = sampler.draw(1, 2)
    probs = {name: torch.rand(2, 4, 16, 16, 16) for name in ("north", "st-south", "ensemble", "student")}
    snapshot = take_snapshot(
        30,
        public.base + 1,
        {"north": probs["north"], "st-south": probs["st-south"]},
        probs["ensemble"],
        probs["student"],
        public,
    )
    home = write_snapshot(tmp_path / "synthetic", snapshot, spacing=12.0)
    assert home == tmp_path / "synthetic" / "round-000030"
    parts = ("", "_phantom", "_labels", "_teacher-north", "_teacher-st-south", "_ensemble", "_student")
    assert {p.name for p in home.iterdir()} == {f"synthetic-{i:02d}{part}.nii.gz" for i in (0, 1) for part in parts}
    for index in (0, 1):
        stem = home / f"synthetic-{index:02d}"
        assert read(stem.with_name(f"{stem.name}.nii.gz")).shape == (16, 16, 16, 4)
        image = nib.load(stem.with_name(f"{stem.name}_teacher-north.nii.gz"))
        assert image.get_data_dtype() == np.uint8 and nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms()[:3] == (12.0, 12.0, 12.0)
        assert np.array_equal(np.asarray(image.dataobj), snapshot.answers["north"][index].argmax(0).numpy())
        assert not np.array_equal(read(stem.with_name(f"{stem.name}_student.nii.gz")), np.asarray(image.dataobj))


def test_written_rounds_are_read_back_in_order(sampler: PublicSampler, tmp_path: Path) -> None:
    for number in (20, 3):
        public = sampler.draw(number, 1)
        probs = torch.rand(1, 4, 16, 16, 16)
        snapshot = take_snapshot(number, public.base + number, {}, probs, probs.flip(1), public)
        write_snapshot(tmp_path, snapshot, spacing=12.0)
    flat = torch.full((1, 4, 16, 16, 16), 0.25)
    write_snapshot(tmp_path, take_snapshot(7, torch.randn(1, 4, 16, 16, 16), {}, flat, flat, None), spacing=12.0)
    first, last = read_rounds(tmp_path)  # round 7 has no phantom
    assert (first.round, last.round) == (3, 20)
    expected = sampler.draw(20, 1).upright()
    assert np.array_equal(last.phantom, expected.base[0].numpy()) and last.x.shape == (4, 16, 16, 16)
    assert np.allclose(last.x, last.phantom + 20) and np.array_equal(last.labels, expected.classes[0].numpy())
    assert np.array_equal(last.ensemble, snapshot_classes(tmp_path, 20))
    assert nib.aff2axcodes(last.affine) == ("R", "A", "S")
    assert read_rounds(tmp_path / "nowhere") == ()


def snapshot_classes(folder: Path, number: int) -> np.ndarray:
    return read(folder / f"round-{number:06d}" / "synthetic-00_ensemble.nii.gz")


def test_left_is_left(sampler: PublicSampler, tmp_path: Path) -> None:
    """Written phantoms are parts of the pool as it was simulated, although the draws were mirrored."""
    images, tissues = sampler.pool()
    mirrored = 0
    for number in range(1, 5):
        public = sampler.draw(number, 2)
        mirrored += int(public.mirrored[:, 0].sum())
        flat = torch.full((2, 4, 16, 16, 16), 0.25)
        snapshot = take_snapshot(number, public.base, {}, flat, flat, public)
        home = write_snapshot(tmp_path, snapshot, spacing=12.0)
        for index, phantom in enumerate(public.phantoms.tolist()):
            expected = np.moveaxis(images[phantom].float().numpy(), 0, -1)
            for name in (f"synthetic-{index:02d}.nii.gz", f"synthetic-{index:02d}_phantom.nii.gz"):
                assert np.array_equal(read(home / name), expected)
            labels = read(home / f"synthetic-{index:02d}_labels.nii.gz")
            assert np.array_equal(labels > 0, tissues[phantom].numpy() >= 4)
    assert mirrored > 0


def test_without_phantoms_nothing_is_turned_and_no_map_is_invented(tmp_path: Path) -> None:
    x, flat = torch.randn(1, 4, 8, 8, 8), torch.full((1, 4, 8, 8, 8), 0.25)
    home = write_snapshot(tmp_path, take_snapshot(1, x, {}, flat, flat, None), spacing=4.0)
    assert {p.name for p in home.iterdir()} == {
        "synthetic-00.nii.gz",
        "synthetic-00_ensemble.nii.gz",
        "synthetic-00_student.nii.gz",
    }
    assert np.array_equal(read(home / "synthetic-00.nii.gz"), np.moveaxis(x[0].numpy(), 0, -1))
