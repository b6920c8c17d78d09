"""Builds the discriminator of a design, and reads its patch logits, of one scale or of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, avg_pool3d, pad
from torch.nn.utils.parametrizations import spectral_norm

from fediod_med.federation.critic_design import CriticDesign
from fediod_med.networks import PatchDiscriminator


class ScaledDiscriminator(nn.Module):
    """Patch discriminators of equal shape, each on the volume at its scale (Wang et al. 2018, arXiv 1711.11585).

    `(B, channels, ...)` to one tensor of patch logits `(B, 1, ...)` per scale, finest first. Scale s averages blocks of
    2^s voxels along each axis; a coarse volume too small for the network is set in background.

    MONAI's `MultiScalePatchDiscriminator` is not taken: it pools nothing, but gives each further discriminator more
    strided layers on the same volume (with 2 layers here the second would have 4 and eight times the channels, and of
    48 voxels leave patches that see more than all of it).

    Args:
        scales: how many.
        channels: of what is judged.
        width: of each, as in `PatchDiscriminator`.
        layers: of each.
        norm: of each.
        spatial_dims: axes, 2 or 3.
    """

    def __init__(self, scales: int, *, channels: int, width: int, layers: int, norm: str, spatial_dims: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(sequences=channels, width=width, layers=layers, norm=norm, spatial_dims=spatial_dims)
            for _ in range(scales)
        )
        self._smallest = 3 * 2**layers  # leaves 2 voxels a side for the last norm and one patch for the logit

    def forward(self, x: Tensor) -> list[Tensor]:
        """Patch logits by scale."""
        pool = avg_pool2d if x.dim() == 4 else avg_pool3d
        coarse = [x, *(self._filled(pool(x, 2**scale)) for scale in range(1, len(self.scales)))]
        return [judge(volume) for judge, volume in zip(self.scales, coarse, strict=True)]

    def _filled(self, x: Tensor) -> Tensor:
        missing = [max(0, self._smallest - edge) for edge in reversed(x.shape[2:])]
        return pad(x, [margin for edge in missing for margin in (edge // 2, edge - edge // 2)])


def build_discriminator(
    design: CriticDesign, *, channels: int, width: int, layers: int, norm: str, spatial_dims: int
) -> nn.Module:
    """The discriminator of a design, `(B, channels, ...)` to patch logits; see `patch_logits`.

    Args:
        design: its `scales` and `spectral`.
        channels: of what is judged: sequences, and classes where the teacher's answer is judged with them.
        width: of the first layer.
        layers: strided layers.
        norm: `INSTANCE` or `GROUP`.
        spatial_dims: axes, 2 or 3.
    """
    network: nn.Module
    if design.scales == 1:
        network = PatchDiscriminator(
            sequences=channels, width=width, layers=layers, norm=norm, spatial_dims=spatial_dims
        )
    else:
        network = ScaledDiscriminator(
            design.scales, channels=channels, width=width, layers=layers, norm=norm, spatial_dims=spatial_dims
        )
    if design.spectral:
        for layer in list(network.modules()):
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                spectral_norm(layer)
    return network


def patch_logits(discriminator: nn.Module, x: Tensor) -> list[Tensor]:
    """Patch logits `(B, 1, ...)` of each scale, in float32."""
    found = discriminator(x)
    return [logits.float() for logits in (found if isinstance(found, list) else [found])]


def mean_logit(logits: Sequence[Tensor]) -> Tensor:
    """Realism `(B,)`: the mean over scales of the mean over patches."""
    return torch.stack([scale.flatten(1).mean(dim=1) for scale in logits]).mean(dim=0)
