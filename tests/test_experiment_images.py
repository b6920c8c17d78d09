"""Images of the classification experiments: a fixed split, every accepted form of CIFAR, and no pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fediod_med.errors import InputError
from fediod_med.experiments.images import cifar, digits, validation_of


def tiny(count: int, *, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`(N, 32, 32, 3)` uint8 noise with every class in it."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count, dtype=np.uint8) % classes


def write_binary(path: Path, x: np.ndarray, *labels: np.ndarray) -> None:
    path.write_bytes(
        np.concatenate([*[y[:, None] for y in labels], np.moveaxis(x, 3, 1).reshape(len(x), -1)], 1).tobytes()
    )


def write_cifar10(folder: Path) -> None:
    x, y = tiny(20, classes=4, seed=0)
    for i in range(5):
        write_binary(folder / f"data_batch_{i + 1}.bin", x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
    write_binary(folder / "test_batch.bin", *tiny(8, classes=4, seed=1))


def write_arrays(folder: Path) -> None:
    for part, count, seed in (("train", 20, 0), ("test", 8, 1)):
        x, y = tiny(count, classes=4, seed=seed)
        np.savez(folder / f"{part}.npz", images=x, labels=y)


def write_pictures(folder: Path) -> None:
    for part, count, seed in (("train", 20, 0), ("test", 8, 1)):
        for i, (image, label) in enumerate(zip(*tiny(count, classes=4, seed=seed), strict=True)):
            home = folder / part / f"kind-{label}"
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(home / f"{i:03d}.png")


def test_digits_are_split_once_and_evenly() -> None:
    images = digits()
    assert (len(images.train_y), len(images.test_y), images.shape) == (1437, 360, (1, 8, 8))
    assert images.train_x.min() == 0 and images.train_x.max() == 2
    shares = torch.bincount(images.test_y) / torch.bincount(torch.cat([images.train_y, images.test_y]))
    assert ((shares - 0.2).abs() < 0.01).all()
    assert torch.equal(images.test_x, digits().test_x)


def test_validation_never_touches_the_test_part() -> None:
    images, part = digits(), validation_of(digits())
    assert len(part.train_y) + len(part.test_y) == len(images.train_y)
    rows = {tuple(x.flatten().tolist()) for x in torch.cat([part.train_x, part.test_x])}
    assert rows == {tuple(x.flatten().tolist()) for x in images.train_x}


@pytest.mark.parametrize("write", [write_cifar10, write_arrays, write_pictures])
def test_every_form_of_cifar_10_gives_the_same_images(write, tmp_path: Path) -> None:
    write(tmp_path)
    images = cifar(tmp_path)
    x, y = tiny(20, classes=4, seed=0)
    order = np.argsort(y, kind="stable") if write is write_pictures else np.arange(20)
    assert images.train_y.tolist() == y[order].tolist() and images.classes == 4
    expected = torch.from_numpy(np.moveaxis(x[order], 3, 1)).float() / 255
    expected = (expected - expected.mean((0, 2, 3), keepdim=True)) / expected.std((0, 2, 3), keepdim=True)
    assert torch.allclose(images.train_x, expected, atol=1e-4)
    assert len(images.test_y) == 8


def test_cifar_100_is_read_with_its_fine_labels(tmp_path: Path) -> None:
    for part, count in (("train", 12), ("test", 6)):
        x, fine = tiny(count, classes=6, seed=count)
        write_binary(tmp_path / f"{part}.bin", x, fine // 2, fine)
    assert cifar(tmp_path).train_y.tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_the_python_version_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match="pickle and never read"):
        cifar(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "test_batch.bin").write_bytes(b"short"), "records of 3073 bytes"),
        (lambda folder: (folder / "test_batch.bin").unlink(), "found none of these"),
    ],
)
def test_damaged_folders_are_refused(damage, message: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        cifar(tmp_path)


def test_arrays_that_hide_objects_are_refused(tmp_path: Path) -> None:
    write_arrays(tmp_path)
    np.savez(tmp_path / "test.npz", images=np.array([{"a": 1}], dtype=object), labels=np.zeros(1))
    with pytest.raises(InputError, match="could not read them"):
        cifar(tmp_path)
