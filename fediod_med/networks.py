"""Builders of the networks: segmenters (teacher and student backbones), classifier, generator, patch discriminator.

All are thin settings over MONAI. Sizes and channel counts are arguments; nothing here knows a site or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.blocks import UpSample
from monai.networks.layers import Norm
from monai.networks.nets import Classifier, DynUNet, SegResNet, UNet
from monai.networks.nets import Generator as LatentGenerator
from monai.networks.nets import PatchDiscriminator as MonaiPatchDiscriminator
from monai.networks.nets.spade_network import SPADENetResBlock
from torch import Tensor, nn

from fediod_med.errors import SettingsError

BACKBONES = ("unet", "segresnet", "dynunet")
NORMS = ("INSTANCE", "GROUP")
STUDENT: Mapping[str, Any] = {"backbone": "unet", "width": 16, "depth": 4, "in_channels": 4, "out_channels": 4}
"""Keywords of `build_segmenter` for the central student and the public prior."""
MAX_CORRECTION = 0.5  # z-score units a conditional generator may move a voxel of a rendered phantom


def build_segmenter(
    backbone: str, *, width: int = 16, depth: int = 4, in_channels: int = 4, out_channels: int = 4
) -> nn.Module:
    """Build a segmentation network, `(B, in_channels, D, H, W)` to logits `(B, out_channels, D, H, W)`.

    Args:
        backbone: `unet` (residual U-Net, instance norm), `segresnet` (Myronenko 2018, group norm) or `dynunet`
            (nnU-Net's residual U-Net, instance norm). No network uses batch norm: it mixes patients.
        width: channels at full resolution; they double at each level.
        depth: number of resolution levels; D, H, W must be divisible by `2 ** (depth - 1)`.
        in_channels: sequences.
        out_channels: exclusive classes.

    Raises:
        SettingsError: unknown backbone, or sizes that the backbone cannot have.
    """
    if depth < 2 or width < 4:
        raise SettingsError(f"network: expected depth >= 2 and width >= 4, found depth {depth}, width {width}")
    channels = [width * 2**level for level in range(depth)]
    if backbone == "unet":
        return UNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            strides=[2] * (depth - 1),
            num_res_units=2,
            norm=Norm.INSTANCE,
        )
    if backbone == "segresnet":
        if width % 8:
            raise SettingsError(f"network: segresnet normalises groups of 8 channels, found width {width}")
        return SegResNet(
            spatial_dims=3,
            init_filters=width,
            in_channels=in_channels,
            out_channels=out_channels,
            blocks_down=(1, *[2] * (depth - 2), 4),
            blocks_up=(1,) * (depth - 1),
        )
    if backbone == "dynunet":
        if depth < 3:
            raise SettingsError(f"network: dynunet needs depth >= 3, found {depth}")
        return DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=[3] * depth,
            strides=[1, *[2] * (depth - 1)],
            upsample_kernel_size=[2] * (depth - 1),
            filters=channels,
            norm_name="INSTANCE",
            res_block=True,
        )
    raise SettingsError(f"network: expected backbone {', '.join(BACKBONES)}, found {backbone!r}")


def build_classifier(in_shape: Sequence[int], classes: int, *, width: int = 16, levels: int = 3) -> nn.Module:
    """Build a small convolutional classifier, `(B, *in_shape)` to logits `(B, classes)`; any number of spatial axes.

    Args:
        in_shape: channels and edges of an image, `(S, H, W)` or `(S, D, H, W)`.
        classes: exclusive classes.
        width: channels at full resolution, a multiple of 4; they double at each level.
        levels: convolutional layers; each but the first halves the edges. Group norm: batch norm would mix patients.

    Raises:
        SettingsError: sizes that the network cannot have.
    """
    smallest = min(in_shape[1:], default=0)
    if width < 4 or width % 4 or levels < 1 or smallest < 2 ** (levels - 1) or classes < 2:
        raise SettingsError(
            f"classifier: expected a width divisible by 4, 2 classes or more and edges of at least 2^(levels - 1), "
            f"found width {width}, {classes} classes, {levels} levels, images {tuple(in_shape)}"
        )
    return Classifier(
        in_shape=tuple(in_shape),
        classes=classes,
        channels=[width * 2**level for level in range(levels)],
        strides=[1, *[2] * (levels - 1)],
        num_res_units=0,
        norm=("GROUP", {"num_groups": 4}),
    )


class Generator(nn.Module):
    """Volumetric generator `x = G(z, m)`: synthetic four-sequence MRI from noise and, unless unconditional, labels.

    `conditional`: a two-level residual network whose normalisation is modulated by the label map (SPADE, Park et al.
    2019, arXiv 1903.07291). It predicts a correction of a rendered phantom (`base`); the last layer starts at zero, so
    an untrained generator returns the phantom; the correction is bounded to `MAX_CORRECTION`, so training cannot leave
    its neighbourhood. With `base` omitted the volume comes from labels and noise alone, unbounded. Voxels outside the
    brain stay exactly zero.

    `unconditional`: the paper's setting, noise alone. Brain extent is a learned soft gate. Images as well as volumes.

    Args:
        mode: `conditional` or `unconditional`.
        size: edge of the cube (voxels); the unconditional generator needs a multiple of `2 ** doublings`.
        width: channels at full resolution.
        latent: length of the noise vector.
        labels: number of label channels (conditional).
        sequences: output channels.
        spatial_dims: axes of what it makes, 2 or 3 (unconditional; a conditional one makes volumes).
        doublings: how often the unconditional generator doubles its edges, from `size / 2 ** doublings`.
    """

    def __init__(
        self,
        mode: str,
        *,
        size: int,
        width: int = 8,
        latent: int = 32,
        labels: int = 7,
        sequences: int = 4,
        spatial_dims: int = 3,
        doublings: int = 3,
    ) -> None:
        super().__init__()
        if mode not in ("conditional", "unconditional"):
            raise SettingsError(f"generator: expected mode conditional or unconditional, found {mode!r}")
        if spatial_dims not in (2, 3) or (mode == "conditional" and spatial_dims != 3):
            raise SettingsError(f"generator: expected 3 axes, or 2 when unconditional, found {spatial_dims} ({mode})")
        self.mode = mode
        self.latent = latent
        self.sequences = sequences
        if mode == "unconditional":
            factor = 2**doublings
            if doublings < 1 or size % factor:
                raise SettingsError(
                    f"generator: the unconditional mode needs a size divisible by {factor}, found {size}"
                )
            self.body = LatentGenerator(
                latent_shape=(latent,),
                start_shape=(factor * width, *[size // factor] * spatial_dims),
                channels=(*[width * 2**level for level in reversed(range(doublings))], sequences + 1),
                strides=(*[2] * doublings, 1),
                num_res_units=1,
            )
            return
        self.stem = nn.Conv3d(sequences + 1, width, kernel_size=3, padding=1)
        self.style = nn.Linear(latent, 2 * width)
        self.fine = _spade_block(width, width, labels)
        self.down = nn.Conv3d(width, 2 * width, kernel_size=2, stride=2)
        self.coarse = _spade_block(2 * width, 2 * width, labels)
        # Interpolated, not transposed: a strided transposed convolution writes a checkerboard into the correction.
        self.up = UpSample(
            spatial_dims=3, in_channels=2 * width, out_channels=width, scale_factor=2, mode="nontrainable"
        )
        self.merge = _spade_block(width, width, labels)
        self.head = nn.Conv3d(width, sequences, kernel_size=1)
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(
        self, z: Tensor, labels: Tensor | None = None, base: Tensor | None = None, texture: Tensor | None = None
    ) -> Tensor:
        """Generate a batch.

        Args:
            z: `(B, latent)` standard normal.
            labels: `(B, L, D, H, W)` one-hot label map, channel 0 background; conditional mode only, even sizes.
            base: `(B, sequences, D, H, W)` rendered phantom, z-scored; zeros when omitted.
            texture: `(B, 1, D, H, W)` standard normal noise volume; zeros when omitted.

        Returns:
            `(B, sequences, D, H, W)`, z-score units inside the brain.
        """
        if self.mode == "unconditional":
            raw = self.body(z)
            return torch.sigmoid(raw[:, -1:]) * 3 * torch.tanh(raw[:, :-1] / 3)
        if labels is None:
            raise SettingsError("generator: the conditional mode needs a label map, found none")
        shape = (z.shape[0], 1, *labels.shape[2:])
        rendered = base is not None
        base = z.new_zeros((shape[0], self.sequences, *shape[2:])) if base is None else base
        texture = z.new_zeros(shape) if texture is None else texture
        features = self.fine(self.stem(torch.cat([base, texture], dim=1)), labels)
        style = self.style(z)[:, :, None, None, None]
        deep = self.coarse(self.down(features) + style, labels)
        correction = self.head(self.merge(features + self.up(deep), labels))
        if rendered:
            correction = MAX_CORRECTION * torch.tanh(correction / MAX_CORRECTION)
        x: Tensor = (base + correction) * (1 - labels[:, :1])
        return x


def _spade_block(in_channels: int, out_channels: int, labels: int) -> nn.Module:
    return SPADENetResBlock(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        label_nc=labels,
        spade_intermediate_channels=8,
        norm="INSTANCE",
        kernel_size=3,
        act=("LEAKYRELU", {"negative_slope": 0.2}),
    )


class PatchDiscriminator(nn.Module):
    """One hospital's judge of realism: `(B, sequences, D, H, W)` to patch logits `(B, 1, d, h, w)`; images likewise.

    MONAI's patch discriminator (Isola et al. 2017) with instance or group norm; batch norm would mix patients.

    Args:
        sequences: input channels.
        width: channels of the first layer.
        layers: strided layers; the field of view is 16, 34 or 70 voxels for 1, 2 or 3.
        norm: `INSTANCE` or `GROUP` (one group).
        spatial_dims: axes of what it judges, 2 or 3.
    """

    def __init__(
        self, *, sequences: int = 4, width: int = 16, layers: int = 2, norm: str = "INSTANCE", spatial_dims: int = 3
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise SettingsError(f"discriminator: expected norm {' or '.join(NORMS)}, found {norm!r}")
        named: str | tuple[str, dict[str, int]] = norm if norm == "INSTANCE" else ("GROUP", {"num_groups": 1})
        self.body = MonaiPatchDiscriminator(
            spatial_dims=spatial_dims, channels=width, in_channels=sequences, num_layers_d=layers, norm=named
        )

    def forward(self, x: Tensor) -> Tensor:
        """Patch logits; larger means more like this hospital's scans."""
        logits: Tensor = self.body(x)[-1]
        return logits


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """One-hot `(B, classes, ...)` float from integers `(B, ...)`; `RuntimeError` for one of `classes` or more.

    Torch's own makes 64-bit integers first, which for a volume takes several times as long.
    """
    index = labels.long().unsqueeze(-1)
    found = torch.zeros((*labels.shape, classes), device=labels.device)
    return found.scatter_(-1, index, 1.0).movedim(-1, 1)


def count_parameters(networks: Sequence[nn.Module]) -> int:
    """Trainable parameters of several networks together."""
    return sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad)
