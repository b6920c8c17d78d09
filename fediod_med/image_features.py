"""Features of volumes for measures of quality: the deepest layer of the public prior, pooled over the brain.

The network saw phantoms only, so its features hold nothing of a patient and are the same for everyone who installs it.
Inception features, which give the Frechet inception distance its name, are of photographs in two dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fediod_med.errors import InputError, SettingsError

PATCH_CELLS = 2  # cells of the deepest layer along the edge of a patch
_MOSTLY_BRAIN = 0.5  # share of brain from which a patch counts; the fullest one counts always
_CONSTANT = 1e-9


@dataclass(frozen=True)
class Features:
    """Features of N volumes.

    Attributes:
        volumes: `(N, F)`, the mean over the brain.
        patches: `(M, F)`, means over the patches that are mostly brain; patches of one volume are not independent.
        owners: `(M,)` the volume each patch is of.
    """

    volumes: NDArray[np.float64]
    patches: NDArray[np.float64]
    owners: NDArray[np.intp]

    def part(self, start: int, stop: int) -> Features:
        """The features of volumes `start` to `stop`, exclusive, counted anew from 0."""
        kept = (self.owners >= start) & (self.owners < stop)
        return Features(self.volumes[start:stop], self.patches[kept], self.owners[kept] - start)

    def standardised(self, by: Features) -> Features:
        """These features less the mean of `by`, over its standard deviation, each feature on its own.

        Raw channels differ in scale by orders of magnitude, and a distance would see the largest few alone. A channel
        that does not vary in `by` is only centred.
        """

        def scaled(rows: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
            spread = reference.std(axis=0)
            found: NDArray[np.float64] = (rows - reference.mean(axis=0)) / np.where(spread > _CONSTANT, spread, 1.0)
            return found

        return Features(scaled(self.volumes, by.volumes), scaled(self.patches, by.patches), self.owners)


def bottleneck_features(network: nn.Module, volumes: Iterable[Tensor], *, device: torch.device) -> Features:
    """Features of volumes `(4, D, H, W)`, z-scored with 0 outside the brain, one at a time.

    Args:
        network: a `unet` of `networks.build_segmenter`.
        volumes: edges must suit the network (multiples of 8 for the public prior).
        device: where the network runs.

    Raises:
        SettingsError: another kind of network.
        InputError: no volume, or one without any brain.
    """
    layers = _down_path(network.to(device).eval())
    rows, patches, owners = [], [], []
    for index, volume in enumerate(volumes):
        x = volume[None].float().to(device)
        with torch.no_grad():
            deep = x
            for layer in layers:
                deep = layer(deep)
            brain = (x != 0).any(dim=1, keepdim=True).float()
            depth, height, width = deep.shape[2:]
            share = functional.adaptive_avg_pool3d(brain, (depth, height, width))
            if not bool(share.any()):
                raise InputError(f"features: expected a brain in volume {index}, found zeros only")
            rows.append(((deep * share).sum(dim=(2, 3, 4)) / share.sum()).cpu())
            grid = (_patches(depth), _patches(height), _patches(width))
            covered = functional.adaptive_avg_pool3d(share, grid)
            pooled = functional.adaptive_avg_pool3d(deep * share, grid) / covered.clamp_min(1e-6)
            kept = (covered >= min(_MOSTLY_BRAIN, float(covered.max())))[0, 0]
            patches.append(pooled[0, :, kept].T.cpu())
            owners += [index] * len(patches[-1])
    if not rows:
        raise InputError("features: expected at least one volume, found none")
    return Features(torch.cat(rows).double().numpy(), torch.cat(patches).double().numpy(), np.array(owners, np.intp))


def _patches(cells: int) -> int:
    """Patches along an edge; they overlap where its cells are odd in number."""
    return -(-cells // PATCH_CELLS)


def _down_path(network: nn.Module) -> list[nn.Module]:
    """The layers of a MONAI U-Net from its input down to its deepest one: skip connections are nested in each other."""
    if not isinstance(network, UNet):
        raise SettingsError(f"features: expected a unet, found {type(network).__name__}; use the public prior")
    layers: list[nn.Module] = []
    level: nn.Module = network.model
    while isinstance(level, nn.Sequential) and len(level) == 3 and isinstance(level[1], SkipConnection):
        layers.append(level[0])
        level = level[1].submodule
    return [*layers, level]
