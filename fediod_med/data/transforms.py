"""Between a subject's files and a network: loading, the working grid and back, normalisation, augmentation.

The working grid is isotropic, in RAS orientation, cropped to the brain. All steps are MONAI transforms or thin
dictionary transforms over them, so bundles can name them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CastToTyped,
    Compose,
    CropForeground,
    MapTransform,
    NormalizeIntensity,
    Orientation,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    Randomizable,
    Spacing,
    SpatialPadd,
    SpatialResample,
    Transform,
)
from scipy import ndimage
from torch import Tensor

from fediod_med.data.layouts import Subject
from fediod_med.data.nifti.reading import read_label, read_subject
from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import CLASSES, get_scheme

DIVISOR = 8  # every backbone of depth up to 4 accepts multiples of 8 voxels
_SPACING_TOLERANCE = 1e-3


class LoadSubjectd(Transform):
    """Read the files of `data["subject"]` (a `layouts.Subject`) into tensors.

    Adds `image` `(4, X, Y, Z)` float32, with `data["scheme"]` also `label` `(1, X, Y, Z)` uint8 classes, and plain
    values that survive collation: `subject_id`, `reference` (file whose geometry counts), `native_affine`,
    `native_shape`. The subject itself is dropped.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load one subject; errors as in `nifti.reading.read_subject` and `read_label`."""
        subject: Subject = data["subject"]
        volume = read_subject(subject)
        affine = torch.as_tensor(volume.affine)
        loaded: dict[Hashable, Any] = {
            "subject_id": subject.subject_id,
            "reference": str(volume.path),
            "native_affine": affine.clone(),
            "native_shape": torch.tensor(volume.array.shape[1:]),
            "image": MetaTensor(torch.as_tensor(volume.array), affine=affine),
        }
        if data.get("scheme") is not None:
            classes = read_label(subject, get_scheme(data["scheme"]))
            loaded["label"] = MetaTensor(torch.as_tensor(classes)[None], affine=affine)
        return loaded


class WorkingGridd(Transform):
    """`to_working_grid` over the keys `image` and, if present, `label`; then z-scores the image."""

    def __init__(self, spacing: float) -> None:
        """`spacing` of the isotropic working grid, mm."""
        self.spacing = spacing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Move one loaded subject to the working grid."""
        image, label = to_working_grid(data["image"], spacing=self.spacing, label=data.get("label"))
        moved = {**data, "image": normalise(image)}
        return moved if label is None else {**moved, "label": label}


class Jitterd(MapTransform, Randomizable):
    """Random contrast (`jitter`) of z-scored volumes `(S, D, H, W)`; the background stays zero."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the contrast of each key."""
        changed = dict(data)
        generator = torch.Generator().manual_seed(int(self.R.randint(2**31)))
        for key in self.key_iterator(changed):
            changed[key] = jitter(changed[key][None], generator)[0]
        return changed


class CropPlacesd(Transform):
    """Adds where a crop may be centred, by flat index: `tumour`, the voxels of any tumour class, and `anywhere`.

    MONAI's crops take such lists and otherwise make both anew for each crop, the second as long as the head is large.
    They are the lists that it makes itself: of a uint8 label (MONAI 1.6) its background is every voxel, because
    it inverts the bits of what it finds.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Look at `data["label"]` `(1, D, H, W)`."""
        label = torch.as_tensor(data["label"]).numpy()
        return {**data, "tumour": np.flatnonzero(label), "anywhere": Anywhere(label.size)}


@dataclass(frozen=True)
class Anywhere:
    """All flat indices of a volume, without a list of them; not a `Sequence`, which MONAI would turn into an array.

    Attributes:
        count: voxels of the volume.
    """

    count: int

    def __len__(self) -> int:
        """How many they are."""
        return self.count

    def __getitem__(self, place: int) -> int:
        """The index at a place: the place itself."""
        return place


def to_working_grid(
    image: MetaTensor, *, spacing: float, label: MetaTensor | None = None, crop: bool = True
) -> tuple[MetaTensor, MetaTensor | None]:
    """Reorient to RAS, resample to isotropic voxels and crop to the brain.

    Coarsening is anti-aliased by a Gaussian whose variance equals that of the block mean of the same factor. Voxels
    less than half inside the brain become background, so that the border stays sharp. Labels are resampled per class
    and the largest share wins.

    Args:
        image: `(4, X, Y, Z)` with its affine; zero outside the brain.
        spacing: mm.
        label: `(1, X, Y, Z)` classes on the same grid.
        crop: to the brain; without, the grid covers the whole scan (for comparison: it costs time, and networks that
            were trained on crops answer differently, because instance norm sees the empty voxels).

    Returns:
        Image `(4, x, y, z)` and label `(1, x, y, z)`, edges multiples of 8 voxels, affines kept.

    Raises:
        SettingsError: the spacing is not positive, or coarser than the brain.
        InputError: the image holds zeros only.
    """
    if spacing <= 0:
        raise SettingsError(f"spacing: expected a positive number of mm, found {spacing}")
    if not bool((image != 0).any()):
        raise InputError("working grid: expected a scan with brain in it, found zeros only; check the files")
    reorient = Orientation(axcodes="RAS", labels=None)
    image = _meta(reorient(image))
    margin = int(np.ceil(2 * spacing / min(image.pixdim.tolist())))
    around = CropForeground(
        select_fn=_not_zero if crop else _everywhere, margin=margin if crop else 0, allow_smaller=True
    )
    near = around.compute_bounding_box(image)
    image = _meta(around.crop_pad(image, *near))
    inside = _like((image != 0).any(dim=0, keepdim=True).float(), image)
    moved = _resample(image, spacing)
    if moved.shape != image.shape or not torch.equal(moved.affine, image.affine):
        kept = _resample(inside, spacing).as_tensor() >= 0.5
        moved = _like(moved.as_tensor() * kept, moved)
        if not bool(kept.any()):
            raise SettingsError(f"spacing: expected voxels smaller than the brain, found {spacing:g} mm; choose less")
    select = _not_zero if crop else _everywhere
    to_brain = CropForeground(select_fn=select, k_divisible=DIVISOR, allow_smaller=False)
    lower, upper = to_brain.compute_bounding_box(moved)
    cropped = _meta(to_brain.crop_pad(moved, lower, upper))
    if label is None:
        return cropped, None
    native = _meta(around.crop_pad(reorient(label), *near)).as_tensor()[0].long()
    shares = torch.nn.functional.one_hot(native, len(CLASSES)).movedim(-1, 0).float()
    resampled = _resample(_like(shares, image), spacing)
    classes = _like(resampled.as_tensor().argmax(dim=0, keepdim=True).to(torch.uint8), resampled)
    return cropped, _meta(to_brain.crop_pad(classes, lower, upper))


def normalise(image: MetaTensor) -> MetaTensor:
    """z-score of the non-zero voxels of each sequence; zeros stay exactly zero. Nothing is shared between patients."""
    return _meta(NormalizeIntensity(nonzero=True, channel_wise=True)(image))


def preprocessing(*, spacing: float, with_label: bool) -> Compose:
    """From `{"subject": Subject, "scheme": name}` to `image` and `label` on the working grid, without randomness."""
    steps: list[Transform] = [LoadSubjectd(), WorkingGridd(spacing)]
    return Compose(steps if with_label else [_WithoutScheme(), *steps])


class _WithoutScheme(Transform):
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, "scheme": None}


def augmentation(*, roi: int) -> Compose:
    """Random crops of `roi` voxels, half of them centred on tumour, with rotation, scale, flips and contrast.

    Works on `image` `(4, D, H, W)`, float16 or float32, and `label` `(1, D, H, W)`, and gives `(4, roi, roi, roi)`
    float32. Nothing but the crop looks at the whole head. For a patient without tumour, MONAI warns and crops anywhere.
    """
    keys = ("image", "label")
    return Compose(
        [
            SpatialPadd(keys, roi),
            CropPlacesd(),
            RandCropByPosNegLabeld(
                keys,
                label_key="label",
                spatial_size=roi,
                pos=1,
                neg=1,
                num_samples=1,
                fg_indices_key="tumour",
                bg_indices_key="anywhere",
            ),
            CastToTyped("image", torch.float32),
            RandAffined(
                keys,
                prob=0.7,
                rotate_range=[0.25] * 3,
                scale_range=[0.12] * 3,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            *[RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
            Jitterd("image"),
        ]
    )


def jitter(x: Tensor, generator: torch.Generator, *, strength: float = 1.0) -> Tensor:
    """Random contrast of z-scored volumes: per sequence a scale, a shift, a gamma-like bend and noise.

    Args:
        x: `(B, S, D, H, W)`; zeros (outside the brain) stay zero.
        generator: on the CPU.
        strength: 0 none, 1 the default ranges (scale 0.85-1.15, shift 0.1, bend 0.15, noise up to 0.1).
    """
    shape = (*x.shape[:2], 1, 1, 1)

    def uniform(half_width: float) -> Tensor:
        return ((torch.rand(shape, generator=generator) * 2 - 1) * half_width * strength).to(x)

    bent = x + uniform(0.15) * (x * x.abs()).clamp(-4, 4) / 2
    noise = torch.randn(x.shape, generator=generator).to(x) * uniform(0.1).abs()
    jittered = bent * (1 + uniform(0.15)) + uniform(0.1) + noise
    return torch.where(x == 0, x, jittered)


def flip_together(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Flip tensors `(B, ..., D, H, W)` along the same random subset of the three last axes."""
    axes = [axis for axis in (-3, -2, -1) if torch.rand((), generator=generator) < 0.5]
    return [tensor.flip(axes) for tensor in tensors]


def mix_pairs(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Each volume of a batch mixed with the one before it, `l v_i + (1 - l) v_(i-1)`, one l for all, uniform in (0, 1).

    Mixup (Zhang et al. 2018, arXiv 1710.09412, equation 1) with alpha 1; `(B, ...)` each, images and their targets.
    """
    share = float(torch.rand((), generator=generator))
    return [share * tensor + (1 - share) * tensor.roll(1, dims=0) for tensor in tensors]


def to_native(probs: MetaTensor, *, affine: np.ndarray | Tensor, shape: Sequence[int]) -> Tensor:
    """Bring class probabilities from the working grid back to the scan's own grid.

    Linear interpolation in world coordinates; outside the working grid everything is background.

    Args:
        probs: `(C, x, y, z)` with its affine, summing to 1.
        affine: `(4, 4)` of the scan.
        shape: `(X, Y, Z)` of the scan.

    Returns:
        `(C, X, Y, Z)` float32 on the device of `probs`, summing to 1.
    """
    foreground = _like(probs.as_tensor()[1:].float(), probs)
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", align_corners=False, dtype=np.float32)
    target = torch.as_tensor(affine, dtype=torch.float64)
    back = _meta(resample(foreground, dst_affine=target, spatial_size=[int(s) for s in shape])).as_tensor()
    return torch.cat([(1 - back.sum(dim=0, keepdim=True)).clamp(0, 1), back])


def _resample(image: MetaTensor, spacing: float) -> MetaTensor:
    native = image.pixdim.tolist()
    factors = [spacing / edge for edge in native]
    if all(abs(factor - 1) < _SPACING_TOLERANCE for factor in factors):
        return image
    sigmas = [float(np.sqrt(max(factor**2 - 1, 0) / 12)) for factor in factors]
    smooth = image.as_tensor()
    if any(sigmas):
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # scipy's filters let other threads run
            channels = threads.map(
                partial(ndimage.gaussian_filter, sigma=sigmas, mode="nearest", truncate=3.0), smooth.numpy()
            )
            smooth = torch.as_tensor(np.stack(list(channels)))
    resample = Spacing(
        pixdim=[spacing] * 3, mode="bilinear", padding_mode="border", align_corners=False, dtype=np.float32
    )
    return _meta(resample(_like(smooth, image)))


def _not_zero(image: Tensor) -> Tensor:
    # MONAI's own choice is what is positive, but intensities may be negative (scans that were z-scored before).
    return image != 0


def _everywhere(image: Tensor) -> Tensor:
    return torch.ones_like(image, dtype=torch.bool)


def _meta(result: Tensor | np.ndarray) -> MetaTensor:
    """What a MONAI transform returns for a `MetaTensor`, under its true type."""
    if not isinstance(result, MetaTensor):
        raise TypeError(f"expected a MetaTensor, found {type(result).__name__}")
    return result


def _like(values: Tensor, geometry: MetaTensor) -> MetaTensor:
    plain = values.as_tensor() if isinstance(values, MetaTensor) else values
    return MetaTensor(plain, affine=geometry.affine)
