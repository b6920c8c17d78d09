"""Random changes of volumes before a discriminator sees them, differentiable and fixed by a seed.

DiffAugment (Zhao et al. 2020, arXiv 2006.10738) for z-scored brain volumes: colour becomes brightness and contrast of
each sequence inside the brain, translation and cutout get a third axis. Real and synthetic volumes go through the same
kind of change, so a discriminator cannot learn few scans by heart, and what it says holds for volumes as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BRIGHTNESS = 0.5  # largest shift, z-score units
CONTRAST = 0.5  # largest change of the factor, from 1
REACH = 8  # a volume moves by at most this part of its edge
CUT = 4  # edge of what is cut out, as this part of the volume's


@dataclass(frozen=True)
class Augmentation:
    """One change for each volume of a batch.

    Attributes:
        brightness: `(B, S)`, added inside the brain, z-score units.
        contrast: `(B, S)`, factor of the distance from the mean inside the brain.
        shifts: by volume, voxels along each axis; what enters is background.
        corners: by volume, lowest corner of the cut box.
    """

    brightness: Tensor
    contrast: Tensor
    shifts: tuple[tuple[int, ...], ...]
    corners: tuple[tuple[int, ...], ...]

    def apply(self, x: Tensor) -> Tensor:
        """Change volumes or images `(B, S, ...)`; voxels that are 0 in all sequences stay exactly 0."""
        size = x.shape[2:]
        axes = tuple(range(2, x.dim()))
        brain = (x != 0).any(dim=1, keepdim=True)
        mean = x.sum(axes, keepdim=True) / brain.sum(axes, keepdim=True).clamp_min(1)
        by_volume = (*x.shape[:2], *[1] * len(size))
        brightness, contrast = (part.to(x).view(by_volume) for part in (self.brightness, self.contrast))
        x = torch.where(brain, (x - mean) * contrast + mean + brightness, 0.0)
        x = torch.stack([_shifted(volume, shift) for volume, shift in zip(x, self.shifts, strict=True)])
        kept = torch.ones_like(x[:, :1])
        for volume, corner in zip(kept, self.corners, strict=True):
            volume[:, *(slice(low, low + _cut(edge)) for low, edge in zip(corner, size, strict=True))] = 0
        return x * kept


def draw_augmentation(shape: Sequence[int], *, seed: int) -> Augmentation:
    """Draw a change for volumes or images of shape `(B, S, ...)`; equal seeds give equal draws.

    Brightness within .5 z-scores and contrast within .5 to 1.5, each per volume and sequence; a shift of up to an
    eighth of the edge along each axis; a box of a quarter of each edge, anywhere inside, set to 0.
    """
    batch, sequences, *size = shape
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((2, batch, sequences), generator=generator) * 2 - 1

    def whole_numbers(highest: int) -> list[int]:
        drawn: list[int] = torch.randint(highest + 1, (batch,), generator=generator).tolist()
        return drawn

    shifts = [[step - edge // REACH for step in whole_numbers(2 * (edge // REACH))] for edge in size]
    corners = [whole_numbers(edge - _cut(edge)) for edge in size]
    return Augmentation(
        brightness=BRIGHTNESS * uniform[0],
        contrast=1 + CONTRAST * uniform[1],
        shifts=tuple(zip(*shifts, strict=True)),
        corners=tuple(zip(*corners, strict=True)),
    )


def _cut(edge: int) -> int:
    return max(1, edge // CUT)


def _shifted(volume: Tensor, shift: Sequence[int]) -> Tensor:
    """`(S, ...)` moved by whole voxels; what leaves is lost."""
    margins = [margin for step in reversed(shift) for margin in (step, -step)]  # a negative margin crops
    return pad(volume, margins)
