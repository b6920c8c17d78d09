"""Draws training volumes from the public simulator: normalised phantoms with their label maps, and cheap augmentation.

Everything is fixed by seeds, so that an interrupted run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import numpy as np
import torch
from monai.transforms import NormalizeIntensity
from monai.utils import convert_to_tensor
from torch import Tensor

from fediod_med.data.phantoms import (
    NCR,
    PUBLIC_PRIOR,
    Anatomy,
    Grid,
    Profile,
    grow,
    load_anatomy,
    render,
    tumour_classes,
)
from fediod_med.errors import SettingsError

TUMOUR_CENTRED = 0.5  # share of crops centred on a tumour voxel, where the crop is smaller than the volume


@dataclass(frozen=True)
class PublicBatch:
    """Public volumes with their truth.

    Attributes:
        base: `(B, 4, D, H, W)` rendered phantoms, z-scored inside the brain, 0 outside.
        tissues: `(B, D, H, W)` integers, indices of `phantoms.TISSUES`.
        classes: `(B, D, H, W)` integers 0 to 3, the tumour classes of `tissues`.
        mirrored: `(B, 3)` bool, the axes along which each volume was mirrored; `upright` undoes it.
        phantoms: `(B,)` integers, the phantom of the pool each volume was cut from.
    """

    base: Tensor
    tissues: Tensor
    classes: Tensor
    mirrored: Tensor
    phantoms: Tensor

    def upright(self) -> PublicBatch:
        """The batch as the heads lie: axes right, anterior, superior."""
        return PublicBatch(
            upright(self.base, self.mirrored),
            upright(self.tissues, self.mirrored),
            upright(self.classes, self.mirrored),
            torch.zeros_like(self.mirrored),
            self.phantoms,
        )

    def only(self, index: int) -> PublicBatch:
        """A batch of one: volume number `index`."""
        return self.some([index])

    def some(self, index: Sequence[int]) -> PublicBatch:
        """A batch of the volumes with these numbers, in this order."""
        return PublicBatch(**{f.name: getattr(self, f.name)[list(index)] for f in fields(self)})

    @classmethod
    def of(cls, batches: Sequence[PublicBatch]) -> PublicBatch:
        """Several batches as one."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in names})


def upright(volumes: Tensor, mirrored: Tensor) -> Tensor:
    """Undo the mirroring of `(B, ..., D, H, W)`, made from a batch whose `mirrored` is `(B, 3)`."""
    axes = [[int(axis) - 3 for axis in row.nonzero()] for row in mirrored]
    return torch.stack([volume.flip(found) for volume, found in zip(volumes, axes, strict=True)])


def training_grid(spacing: float) -> Grid:
    """The phantom grid that holds the whole head at a working spacing (mm), every edge a multiple of 8 voxels."""
    extent_mm = (192.0, 224.0, 192.0) if spacing < 4 else (192.0, 192.0, 192.0)
    edges = [8 * int(np.ceil(mm / spacing / 8)) for mm in extent_mm]
    return Grid((edges[0], edges[1], edges[2]), spacing)


class PublicSampler:
    """A pool of phantoms, and batches of crops from it.

    Args:
        spacing: working grid, mm.
        roi: edge of a crop, voxels.
        count: phantoms in the pool; their seeds are `seed * 100000 + i`.
        seed: of the pool and of every draw.
        first: i of the first phantom; parts of a pool made apart are the phantoms of the whole.
        profile: of the simulator.
        anatomy: on the grid of the phantoms; `training_grid(spacing)` when omitted.
        progress: called after each phantom with (done, count).

    Raises:
        SettingsError: no phantom or no crop.
    """

    def __init__(
        self,
        *,
        spacing: float,
        roi: int,
        count: int,
        seed: int,
        first: int = 0,
        profile: Profile = PUBLIC_PRIOR,
        anatomy: Anatomy | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if count < 1 or roi < 1:
            raise SettingsError(f"sampler: expected at least one phantom and a crop edge above 0, found {count}, {roi}")
        self._hold([], [], roi=roi, seed=seed)
        anatomy = load_anatomy(training_grid(spacing)) if anatomy is None else anatomy
        normalise = NormalizeIntensity(nonzero=True, channel_wise=True)
        for i in range(count):
            number = seed * 100_000 + first + i
            tissue_map = grow(anatomy, number, profile)
            # A plain tensor: a MetaTensor would slow every later step and could not be read back from a checkpoint.
            image = convert_to_tensor(normalise(render(tissue_map, number, profile)), track_meta=False)
            self._images.append(pad_to(image.half(), roi))
            self._tissues.append(pad_to(torch.from_numpy(tissue_map.tissues.astype(np.uint8))[None], roi)[0])
            if progress is not None:
                progress(i + 1, count)

    @classmethod
    def of_pool(
        cls, images: Tensor | Sequence[Tensor], tissues: Tensor | Sequence[Tensor], *, roi: int, seed: int
    ) -> Self:
        """A sampler over volumes made before, as `pool` gives them; draws as the sampler that made them.

        Args:
            images: `(N, 4, D, H, W)` z-scored, at least `roi` a side; or as many volumes `(4, D, H, W)`. Those in
                float16 are not copied.
            tissues: `(N, D, H, W)` integers, or as many `(D, H, W)`.
            roi: as in the constructor.
            seed: as in the constructor.
        """
        sampler = cls.__new__(cls)
        sampler._hold([image.half() for image in images], [t.to(torch.uint8) for t in tissues], roi=roi, seed=seed)
        return sampler

    def pool(self) -> tuple[Tensor, Tensor]:
        """All phantoms: images `(N, 4, D, H, W)` float16 and tissues `(N, D, H, W)` uint8."""
        return torch.stack(self._images), torch.stack(self._tissues)

    def _hold(self, images: list[Tensor], tissues: list[Tensor], *, roi: int, seed: int) -> None:
        self._images, self._tissues, self._roi, self._seed = images, tissues, roi, seed

    def reseeded(self, offset: int) -> PublicSampler:
        """The same pool and other draws: their seed moves by `offset`; 0 draws the same."""
        other = copy.copy(self)
        other._seed = self._seed + offset
        return other

    def __len__(self) -> int:
        """Phantoms in the pool."""
        return len(self._images)

    def volumes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every phantom of the pool: image `(4, D, H, W)` float16 z-scored, classes `(D, H, W)` uint8."""
        for image, tissues in zip(self._images, self._tissues, strict=True):
            yield image, torch.from_numpy(tumour_classes(tissues.numpy()))

    def draw(self, step: int, batch: int) -> PublicBatch:
        """Batch number `step`: random phantoms, crops and flips; the same step always gives the same batch."""
        rng = np.random.default_rng([self._seed, step])
        return _batch([self._crop(rng) for _ in range(batch)])

    def batches(self, steps: int, batch: int) -> Iterator[PublicBatch]:
        """Batches 1 to `steps`."""
        return (self.draw(step, batch) for step in range(1, steps + 1))

    def _crop(self, rng: np.random.Generator) -> _Crop:
        index = int(rng.integers(len(self._images)))
        image, tissues = self._images[index], self._tissues[index]
        limits = np.array(tissues.shape) - self._roi
        start = rng.integers(0, limits + 1)
        if limits.any() and rng.random() < TUMOUR_CENTRED:
            tumour = np.flatnonzero(tissues.numpy() >= NCR)
            if len(tumour):
                centre = np.array(np.unravel_index(tumour[rng.integers(len(tumour))], tissues.shape))
                start = np.clip(centre - self._roi // 2, 0, limits)
        window = tuple(slice(int(s), int(s) + self._roi) for s in start)
        image, tissues = image[(slice(None), *window)], tissues[window]
        axes = tuple(axis for axis in range(3) if rng.random() < 0.5)
        return _Crop(image.flip([a + 1 for a in axes]), tissues.flip(axes), axes, index)


class _Crop(NamedTuple):
    """One crop: image `(4, D, H, W)`, tissues `(D, H, W)`, mirrored axes, number of the phantom."""

    image: Tensor
    tissues: Tensor
    axes: tuple[int, ...]
    phantom: int


def _batch(crops: Sequence[_Crop]) -> PublicBatch:
    tissues = torch.stack([crop.tissues for crop in crops])
    return PublicBatch(
        torch.stack([crop.image for crop in crops]).float(),
        tissues.long(),
        torch.from_numpy(tumour_classes(tissues.numpy())).long(),
        torch.tensor([[axis in crop.axes for axis in range(3)] for crop in crops]),
        torch.tensor([crop.phantom for crop in crops]),
    )


def centre_window(image: Tensor, roi: int) -> tuple[slice, slice, slice]:
    """Cube of edge `roi` about the middle of what is not 0 in `(4, D, H, W)`, inside the volume; edges >= `roi`."""
    inside = (image != 0).any(dim=0)
    starts = []
    for axis, edge in enumerate(inside.shape):
        found = inside.any(dim=tuple(a for a in range(3) if a != axis)).nonzero()
        middle = int(found.min() + found.max() + 1) // 2 if len(found) else edge // 2
        starts.append(min(max(middle - roi // 2, 0), edge - roi))
    first, second, third = (slice(start, start + roi) for start in starts)
    return first, second, third


def pad_to(volume: Tensor, roi: int) -> Tensor:
    """Zero-pad `(S, D, H, W)` symmetrically to at least `roi` along each spatial axis."""
    pads: list[int] = []
    for edge in reversed(volume.shape[1:]):
        missing = max(roi - edge, 0)
        pads += [missing // 2, missing - missing // 2]
    return torch.nn.functional.pad(volume, pads)
