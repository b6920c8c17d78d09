"""Labelled images for the classification experiments: scikit-learn's handwritten digits, CIFAR from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from fediod_med.errors import InputError, SettingsError

TEST_SHARE = 0.2
SPLIT_SEED = 0  # the test part is the same for every seed of every experiment
EDGE = 32  # pixels of a CIFAR image
_PIXELS = 3 * EDGE * EDGE
_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_FORMS = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin (CIFAR-10, binary version), train.bin and test.bin "
    "(CIFAR-100, binary version), train.npz and test.npz (arrays `images` (N, 32, 32, 3) uint8 and `labels` (N,)), or "
    "train/<class>/*.png and test/<class>/*.png"
)


@dataclass(frozen=True)
class ImageSet:
    """A classification task.

    Attributes:
        name: shown in tables.
        train_x: `(N, S, H, W)` float32.
        train_y: `(N,)` int64, 0 to `classes - 1`.
        test_x: as `train_x`, of images that are used for scoring alone.
        test_y: as `train_y`.
        classes: number of classes.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels and edges of an image, `(S, H, W)`."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width


def digits() -> ImageSet:
    """1797 real handwritten digits of 8 x 8 pixels, 0 to 2 (Alpaydin & Kaynak 1998, UCI; scikit-learn's `load_digits`).

    A stratified fifth is the test part. Writers are not told apart, so train and test share them.
    """
    found = load_digits()
    x, y = found.images.astype(np.float32)[:, None] / 8, found.target.astype(np.int64)
    split = train_test_split(x, y, test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=y)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return ImageSet("digits", train_x, train_y, test_x, test_y, 10)


def validation_of(images: ImageSet) -> ImageSet:
    """The training part alone, a stratified fifth of it in the place of the test part: what settings are tuned on."""
    index = np.arange(len(images.train_y))
    fit, held = train_test_split(index, test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=images.train_y.numpy())
    return replace(
        images,
        name=f"{images.name}, validation",
        train_x=images.train_x[fit],
        train_y=images.train_y[fit],
        test_x=images.train_x[held],
        test_y=images.train_y[held],
    )


def cifar(folder: Path) -> ImageSet:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) as the user has it on disk; nothing is downloaded.

    Channels are z-scored by the training part. CIFAR-100 is read with its 100 fine labels.

    Args:
        folder: the binary version, `.npz` arrays or a folder of PNG files by class.

    Raises:
        InputError: none of these; the python version (pickle) is never read, because reading a pickle runs its code.
    """
    if all((folder / name).is_file() for name in (*_BATCHES, "test_batch.bin")):
        train = _binary([folder / name for name in _BATCHES], labels=1)
        test = _binary([folder / "test_batch.bin"], labels=1)
        name = "CIFAR-10"
    elif all((folder / f"{part}.bin").is_file() for part in ("train", "test")):
        train, test = (_binary([folder / f"{part}.bin"], labels=2) for part in ("train", "test"))
        name = "CIFAR-100"
    elif all((folder / f"{part}.npz").is_file() for part in ("train", "test")):
        train, test = (_arrays(folder / f"{part}.npz") for part in ("train", "test"))
        name = folder.name
    elif all((folder / part).is_dir() for part in ("train", "test")):
        named = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
        train, test = (_pictures(folder / part, named) for part in ("train", "test"))
        name = folder.name
    else:
        pickled = any((folder / part).is_file() for part in ("data_batch_1", "batches.meta", "train", "meta"))
        found = "the python version, which is pickle and never read" if pickled else "none of these"
        raise InputError(f"{folder}: expected {_FORMS}; found {found}; see docs/experiments.md for where to get one")
    return _normalised(name, *train, *test)


def _normalised(
    name: str, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> ImageSet:
    classes = int(train_y.max()) + 1
    if classes < 2 or int(test_y.max()) >= classes:
        raise InputError(f"{name}: expected two classes or more, all of them in the training part, found {classes}")
    x, t = (torch.from_numpy(part).float() / 255 for part in (train_x, test_x))
    mean, spread = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)
    labels = (torch.from_numpy(part.astype(np.int64)) for part in (train_y, test_y))
    train_labels, test_labels = labels
    return ImageSet(name, (x - mean) / spread, train_labels, (t - mean) / spread, test_labels, classes)


def _binary(paths: Sequence[Path], *, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of `labels` bytes (the last one counts) and 3072 pixels, red, green, blue planes in row order."""
    record = labels + _PIXELS
    parts = []
    for path in paths:
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        if not len(data) or len(data) % record:
            raise InputError(f"{path}: expected records of {record} bytes, found {len(data)} bytes; get the file again")
        parts.append(data.reshape(-1, record))
    rows = np.concatenate(parts)
    return rows[:, labels:].reshape(-1, 3, EDGE, EDGE).copy(), rows[:, labels - 1].copy()


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["images"], arrays["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: expected arrays `images` and `labels`, could not read them ({error})") from error
    if x.ndim != 4 or x.shape[3] != 3 or x.dtype != np.uint8 or y.shape != x.shape[:1] or not len(y):
        raise InputError(f"{path}: expected images (N, H, W, 3) uint8 and labels (N,), found {x.shape} and {y.shape}")
    return np.moveaxis(x, 3, 1).copy(), y


def _pictures(folder: Path, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.png")):
            try:
                with Image.open(path) as picture:
                    images.append(np.asarray(picture.convert("RGB")))
            except (OSError, UnidentifiedImageError) as error:
                raise InputError(f"{path}: expected a PNG picture, could not read it ({error})") from error
            labels.append(label)
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InputError(f"{folder}: expected PNG pictures of one size in folders named by class, found {len(shapes)}")
    return np.moveaxis(np.stack(images), 3, 1).copy(), np.array(labels, dtype=np.int64)


def check_size(images: ImageSet, doublings: int) -> None:
    """Refuse images that the generator cannot make: not square, or edges that `2 ** doublings` does not divide.

    Raises:
        SettingsError: as said.
    """
    _, height, width = images.shape
    if height != width or height % 2**doublings:
        raise SettingsError(
            f"{images.name}: expected square images with edges divisible by {2**doublings}, found {height} x {width}"
        )
