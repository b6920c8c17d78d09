"""Checks of one sequence's values and grid, beyond what makes it unreadable."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes

from fediod_med.data.scans import Scan
from fediod_med.findings import Finding, finding

BRATS_SHAPE = (240, 240, 155)
# A stripped head fills 14 to 20 % of a BraTS volume; tightly cropped it fills up to about half.
_FILLED = 0.7
# Share of the outermost voxels that are not zero: a stripped head hardly touches the border, a whole one does.
_BORDER = 0.25
_LITTLE = 0.005
# Litres of brain: below, this is not a head.
_SMALLEST_BRAIN_L = 0.25
_FINEST_MM, _COARSEST_MM, _ANISOTROPY = 0.4, 2.5, 2.5
_LARGE_VOXELS = 40_000_000
# Working copies of four float32 sequences while a scan is segmented.
_COPIES = 3.0


def grid_findings(scan: Scan, *, case: str) -> Iterator[Finding]:
    """Notes and warnings on the grid that the label map will lie on.

    Args:
        scan: the T1c sequence.
        case: id of the case.
    """
    spacing = voxel_sizes(scan.affine)
    shape, ratio = scan.array.shape, float(spacing.max() / spacing.min())
    if ratio > _ANISOTROPY or spacing.max() > _COARSEST_MM or spacing.min() < _FINEST_MM:
        edges = " x ".join(f"{edge:.2f}" for edge in spacing)
        message = f"expected about 1 mm isotropic, found {edges} mm (anisotropy {ratio:.1f})"
        yield finding("W170", case=case, where=scan.path, message=message, value=round(ratio, 2))
    if sorted(shape) != sorted(BRATS_SHAPE):
        message = f"found {' x '.join(map(str, shape))} voxels, BraTS has {' x '.join(map(str, BRATS_SHAPE))}"
        yield finding("N171", case=case, where=scan.path, message=message)
    codes = "".join(aff2axcodes(scan.affine))
    if codes not in ("RAS", "LPS"):
        yield finding("N172", case=case, where=scan.path, message=f"found orientation {codes}", value=codes)
    if math.prod(shape) > _LARGE_VOXELS:
        needed = math.prod(shape) * 4 * 4 * _COPIES / 2**30
        message = f"found {math.prod(shape) / 1e6:.0f} million voxels; about {needed:.1f} GiB of memory are needed"
        yield finding("N180", case=case, where=scan.path, message=message, value=round(needed, 1))


def value_findings(scan: Scan, name: str, *, case: str) -> Iterator[Finding]:
    """Warnings on the intensities of one sequence.

    Args:
        scan: the sequence, finite and not constant.
        name: of the sequence.
        case: id of the case.
    """
    values = scan.array
    step = max(1, round((values.size / 500_000) ** (1 / 3)))
    sample = values[::step, ::step, ::step]
    filled = float(np.count_nonzero(sample)) / sample.size
    border = float(np.mean([int(np.count_nonzero(face)) / face.size for face in _faces(values)]))
    if filled > _FILLED or border > _BORDER:
        message = (
            f"expected zeros outside the brain in {name}, found {filled:.0%} of all voxels and {border:.0%} of the "
            "border filled"
        )
        yield finding("W160", case=case, where=scan.path, message=message, value=round(filled, 3))
    litres = filled * values.size * abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1e6
    if filled < _LITTLE or litres < _SMALLEST_BRAIN_L:
        message = f"expected a whole brain in {name}, found {litres:.2f} litres of voxels that are not zero"
        yield finding("W162", case=case, where=scan.path, message=message, value=round(litres, 3))
    negative = float(np.count_nonzero(sample < 0)) / max(1, int(np.count_nonzero(sample)))
    if negative > 0:
        message = f"expected intensities of 0 and above in {name}, found {negative:.1%} of the filled voxels below"
        yield finding("W173", case=case, where=scan.path, message=message, value=round(negative, 4))
    elif len(np.unique(sample)) < 16:
        message = f"expected the intensities of a scan in {name}, found {len(np.unique(sample))} different values"
        yield finding("W173", case=case, where=scan.path, message=message, value=len(np.unique(sample)))


def _faces(values: np.ndarray) -> Iterator[np.ndarray]:
    for axis in range(3):
        for index in (0, -1):
            yield np.take(values, index, axis=axis)
