"""Finds the rigid motion between two scans of one head, and resamples scans and masks along it.

The motion maximises Mattes' mutual information (Mattes et al., "PET-CT image registration in the chest using free-form
deformations", IEEE TMI 2003) from coarse to fine, as ITK implements it. It is found twice, from two starts and two
random samples of voxels: how far the two results lie apart says how well the images determine it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fediod_med.data.scans import Scan
from fediod_med.errors import InputError
from fediod_med.metrics import bounding_box


@dataclass(frozen=True)
class _Level:
    """One step from coarse to fine: Gaussian sigma, voxels sampled in the head, and sizes of the optimiser's steps."""

    smoothing_mm: float
    samples: int
    first_step_mm: float
    last_step_mm: float


# Positions are found on images of about this voxel size: finer ones cost time and change results by < 0.1 mm.
_WORKING_MM = 2.0
# Points around the head that take part: its outline is what two contrasts share best.
_RIM_MM = 8.0
_BINS = 40
_LEVELS = {
    "coarse": _Level(smoothing_mm=4.0, samples=6_000, first_step_mm=4.0, last_step_mm=0.1),
    "middle": _Level(smoothing_mm=2.0, samples=15_000, first_step_mm=1.0, last_step_mm=0.02),
    "fine": _Level(smoothing_mm=0.7, samples=15_000, first_step_mm=0.5, last_step_mm=0.01),
}
_MEASURED = 30_000
_CLOSE_MM = 4.0  # starts closer than this end in the same place
_POINTS = 4_000  # head points at which displacements are measured
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS (NIfTI) and LPS (ITK)


@dataclass(frozen=True, eq=False)
class Motion:
    """A rigid motion between two scans and how well it is known.

    Attributes:
        matrix: `(4, 4)` float64, a point of the fixed scan in mm RAS+ to the same tissue in the moving scan, mm RAS+.
        moved_mm: mean distance over the head between this and what the headers say.
        rotation_deg: angle of the rotation.
        information: mutual information of the two images at `matrix`, nats.
        information_before: the same where the headers put them; -inf where they do not overlap.
        residual_mm: mean distance over the head between two independent results.
        covered: share of the fixed head that lies inside the moving scan.
    """

    matrix: np.ndarray
    moved_mm: float
    rotation_deg: float
    information: float
    information_before: float
    residual_mm: float
    covered: float


def find_motion(fixed: Scan, moving: Scan, *, seed: int = 1) -> Motion:
    """The rigid motion that brings two scans of one head to match.

    Args:
        fixed: any grid; with or without skull.
        moving: any grid; with or without skull.
        seed: of the voxel sample; the result is the same for the same seed on the same machine.

    Raises:
        InputError: no start leads to overlapping images.
    """
    pair = _Pair(fixed, moving)
    starts = pair.starts()
    coarse = [found for start in starts if (found := pair.refine(start, ("coarse",), seed)) is not None]
    if not coarse:
        raise InputError(f"{moving.path}: expected a scan of the head in {fixed.path}, found no overlap of the two")
    best = max(coarse, key=lambda matrix: pair.information(matrix, seed)) if len(coarse) > 1 else coarse[0]
    nudge = _about(Rotation.from_euler("xyz", (1.0, -1.0, 1.0), degrees=True), pair.centre, np.array([1.0, 1.0, -1.0]))
    # Two results from different starts and different samples.
    results = [
        pair.refine(start, ("middle", "fine"), seed + i) for i, start in enumerate((best, best @ nudge), start=1)
    ]
    known = [matrix for matrix in results if matrix is not None] or [best]
    information, matrix = max(((pair.information(one, seed), one) for one in known), key=lambda found: found[0])
    residual = pair.distance(known[0], known[1]) if len(known) == 2 else float("inf")
    turn = Rotation.from_matrix(matrix[:3, :3]).magnitude()
    return Motion(
        matrix=matrix,
        moved_mm=pair.distance(matrix, np.eye(4)),
        rotation_deg=float(np.degrees(turn)),
        information=information,
        information_before=pair.information(np.eye(4), seed),
        residual_mm=residual,
        covered=pair.covered(matrix),
    )


def resample_scan(scan: Scan, matrix: np.ndarray, *, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """A scan on another grid, linearly interpolated; where the new voxels are larger, averaged over them first.

    Args:
        scan: to resample.
        matrix: `(4, 4)`, point of the new grid's world to point of the scan's world, both mm RAS+.
        shape: `(X, Y, Z)` of the new grid.
        affine: `(4, 4)` of the new grid.

    Returns:
        `(X, Y, Z)` float32; 0, the background of a scan, outside its field of view.
    """
    import SimpleITK

    values = ndimage.gaussian_filter(scan.array, _blur(scan.affine, matrix @ affine))
    # A motion only moves the grid: it is the new grid, as seen from the scan's world, that is asked for.
    target = _itk_image(np.zeros((1, 1, 1), np.float32), matrix @ affine)
    resample = SimpleITK.ResampleImageFilter()
    resample.SetReferenceImage(target)
    resample.SetSize([int(n) for n in shape])
    resample.SetInterpolator(SimpleITK.sitkLinear)
    resample.SetDefaultPixelValue(0.0)
    moved = resample.Execute(_itk_image(values, scan.affine))
    return np.ascontiguousarray(np.transpose(SimpleITK.GetArrayViewFromImage(moved)))


def resample_classes(
    classes: np.ndarray, matrix: np.ndarray, *, affine: np.ndarray, shape: Sequence[int], grid: np.ndarray
) -> np.ndarray:
    """A label map on another grid: the share of each class interpolated linearly, then the largest.

    Nearest neighbour would shift borders by up to half a voxel; this keeps them to a fraction of one. Only the part of
    the grid that the tumour reaches is computed.

    Args:
        classes: `(X, Y, Z)` integers, 0 the background.
        matrix: `(4, 4)`, point of the world of `classes` to point of the other world, mm RAS+.
        affine: `(4, 4)` of `classes`.
        shape: of the other grid.
        grid: `(4, 4)` affine of the other grid.

    Returns:
        Array of `shape`, of the type of `classes`; 0 outside the grid of `classes`.
    """
    out = np.zeros(tuple(shape), dtype=classes.dtype)
    box = bounding_box(classes != 0, margin=1)
    if box is None:
        return out
    index = np.linalg.inv(matrix @ affine) @ grid
    corners = np.array([(*corner, 1.0) for corner in product(*((s.start - 1, s.stop) for s in box))])
    reached = (np.linalg.inv(index) @ corners.T)[:3]
    start = np.clip(np.floor(reached.min(axis=1)).astype(int), 0, shape)
    stop = np.clip(np.ceil(reached.max(axis=1)).astype(int) + 1, 0, shape)
    if (stop <= start).any():
        return out
    origin = np.array([s.start for s in box])
    offset = index[:3, :3] @ start + index[:3, 3] - origin
    size = tuple(int(n) for n in stop - start)
    best = np.zeros(size, dtype=np.float32)
    winner = np.zeros(size, dtype=classes.dtype)
    cropped = classes[box]
    # The background comes first: it is what remains of the share outside the cropped part.
    for value in np.unique(cropped):
        member = (cropped == value).astype(np.float32)
        share = ndimage.affine_transform(
            member, index[:3, :3], offset, size, order=1, mode="grid-constant", cval=float(value == 0)
        )
        winner = np.where(share > best, value, winner)
        best = np.maximum(share, best)
    out[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = winner
    return out


def head_of(scan: Scan) -> np.ndarray:
    """Where the head is, `(X, Y, Z)` bool: voxels that are not 0 in a stripped scan, else those above Otsu's threshold.

    A scan counts as stripped when at least a fifth of it is exactly 0.
    """
    import SimpleITK

    inside: np.ndarray = scan.array != 0
    if inside.mean() > 0.8:
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(scan.array))
        inside = SimpleITK.GetArrayFromImage(SimpleITK.OtsuThreshold(image, 0, 1)).astype(bool)
    return inside


class _Pair:
    """Two scans prepared for matching: working images, mask and points of the fixed head."""

    def __init__(self, fixed: Scan, moving: Scan) -> None:
        self.fixed, self.moving = _working_image(fixed), _working_image(moving)
        head = _scan_of(self.fixed, fixed)
        inside = head_of(head)
        spacing = np.linalg.norm(head.affine[:3, :3], axis=0)
        near = ndimage.distance_transform_edt(~inside, sampling=spacing) <= _RIM_MM
        self.mask = _itk_image(near.astype(np.uint8), head.affine)
        self.voxels = int(near.sum())
        chosen = np.argwhere(inside)
        chosen = chosen[:: max(1, len(chosen) // _POINTS)]
        self.points = np.c_[chosen, np.ones(len(chosen))] @ head.affine.T
        self.centre = self.points[:, :3].mean(axis=0)
        self.radius = float(np.linalg.norm(self.points[:, :3] - self.centre, axis=1).mean())
        self._other = moving
        self._blurred: dict[str, tuple[Any, ...]] = {}
        self._bright = _scan_of(self.moving, moving)

    def starts(self) -> list[np.ndarray]:
        """Motions to begin from: the headers', and head on head and box on box where those differ from it."""
        bright = head_of(self._bright)
        other = np.argwhere(bright).mean(axis=0) if bright.any() else (np.array(bright.shape) - 1) / 2
        head = (self._bright.affine @ np.append(other, 1))[:3]
        half = (np.array(self._other.array.shape) - 1) / 2
        box = (self._other.affine @ np.append(half, 1))[:3]
        found = [np.eye(4)]
        for target in (head, box):
            shift = np.eye(4)
            shift[:3, 3] = target - self.centre
            if all(np.linalg.norm(shift[:3, 3] - start[:3, 3]) > _CLOSE_MM for start in found):
                found.append(shift)
        return found

    def refine(self, start: np.ndarray, levels: Sequence[str], seed: int) -> np.ndarray | None:
        """The motion at the nearest optimum, level by level, or `None` where the images do not overlap."""
        import SimpleITK

        transform = SimpleITK.Euler3DTransform()
        _set_motion(transform, start, self.centre)
        for level in levels:
            method = self._method(_LEVELS[level].samples, seed)
            method.SetInitialTransform(transform, inPlace=True)
            method.SetOptimizerAsRegularStepGradientDescent(
                learningRate=_LEVELS[level].first_step_mm,
                minStep=_LEVELS[level].last_step_mm,
                numberOfIterations=100,
                relaxationFactor=0.6,
                gradientMagnitudeTolerance=1e-6,
            )
            # One radian moves the head by its radius, as that many mm do; ITK's own scales measure at the far corners.
            method.SetOptimizerScales([self.radius**2] * 3 + [1.0] * 3)
            try:
                method.Execute(*self._images(level))
            except RuntimeError:  # ITK's word for too few points inside the moving image
                return None
        return _motion_of(transform)

    def information(self, matrix: np.ndarray, seed: int) -> float:
        """Mutual information in nats at a motion; -inf where the images do not overlap."""
        import SimpleITK

        transform = SimpleITK.Euler3DTransform()
        _set_motion(transform, matrix, self.centre)
        method = self._method(_MEASURED, seed)
        method.SetInitialTransform(transform, inPlace=False)
        try:
            return -float(method.MetricEvaluate(*self._images("fine")))
        except RuntimeError:
            return float("-inf")

    def distance(self, one: np.ndarray, other: np.ndarray) -> float:
        """Mean distance in mm over the head between two motions."""
        return float(np.linalg.norm((self.points @ (one - other).T)[:, :3], axis=1).mean())

    def covered(self, matrix: np.ndarray) -> float:
        """Share of the head that a motion puts inside the moving scan."""
        index = (self.points @ (np.linalg.inv(self._other.affine) @ matrix).T)[:, :3]
        return float(((index >= -0.5) & (index <= np.array(self._other.array.shape) - 0.5)).all(axis=1).mean())

    def _images(self, level: str) -> tuple[Any, Any]:
        """Fixed and moving image as blurred as a level wants them."""
        import SimpleITK

        if level not in self._blurred:
            sigma = _LEVELS[level].smoothing_mm
            self._blurred[level] = tuple(
                SimpleITK.SmoothingRecursiveGaussian(image, sigma) for image in (self.fixed, self.moving)
            )
        fixed, moving = self._blurred[level]
        return fixed, moving

    def _method(self, samples: int, seed: int) -> Any:
        """ITK's registration, set up but for start and optimiser."""
        import SimpleITK

        method = SimpleITK.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=_BINS)
        method.SetMetricFixedMask(self.mask)
        method.SetMetricSamplingStrategy(method.RANDOM)
        # The percentage is of the whole grid; the mask then drops what lies outside it.
        method.SetMetricSamplingPercentage(min(1.0, samples / self.voxels), seed)
        method.SetInterpolator(SimpleITK.sitkLinear)
        method.SetNumberOfWorkUnits(1)  # sums of several would depend on their order
        return method


def _about(rotation: Rotation, centre: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Motion (4, 4) that turns about a centre (mm) and then shifts (mm)."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation.as_matrix()
    matrix[:3, 3] = centre + shift - matrix[:3, :3] @ centre
    return matrix


def _set_motion(transform: Any, matrix: np.ndarray, centre: np.ndarray) -> None:
    """Put a motion in RAS into an ITK transform, turning about a centre given in RAS."""
    lps = _FLIP @ matrix @ _FLIP
    middle = _FLIP[:3, :3] @ centre
    transform.SetCenter(middle.tolist())
    transform.SetMatrix(lps[:3, :3].ravel().tolist(), 1e-6)
    transform.SetTranslation((lps[:3, :3] @ middle + lps[:3, 3] - middle).tolist())


def _motion_of(transform: Any) -> np.ndarray:
    """The motion (4, 4) in RAS of an ITK transform."""
    turn, middle = np.array(transform.GetMatrix()).reshape(3, 3), np.array(transform.GetCenter())
    lps = np.eye(4)
    lps[:3, :3] = turn
    lps[:3, 3] = middle + np.array(transform.GetTranslation()) - turn @ middle
    return np.asarray(_FLIP @ lps @ _FLIP)


def _itk_image(array: np.ndarray, affine: np.ndarray) -> Any:
    """An ITK image of an array (X, Y, Z) with an affine (4, 4) in RAS."""
    import SimpleITK

    lps = _FLIP @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def _working_image(scan: Scan) -> Any:
    """An ITK image of about `_WORKING_MM`, by averaging whole voxels; coarse axes stay as they are."""
    import SimpleITK

    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
    factors = np.clip(np.round(_WORKING_MM / spacing), 1, np.maximum(1, np.array(scan.array.shape) // 8)).astype(int)
    return SimpleITK.BinShrink(_itk_image(scan.array, scan.affine), factors.tolist())


def _scan_of(image: Any, source: Scan) -> Scan:
    """An ITK image as a scan again."""
    import SimpleITK

    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    return Scan(np.transpose(SimpleITK.GetArrayFromImage(image)), np.asarray(_FLIP @ lps), source.path)


def _blur(affine: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Gaussian sigma in voxels per axis of `affine` that widens its voxels to those of `target` (full widths)."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    wanted = np.linalg.norm((affine[:3, :3] / spacing).T @ target[:3, :3], axis=1)
    return np.asarray(np.sqrt(np.maximum(wanted**2 - spacing**2, 0.0)) / 2.355 / spacing)
