"""Measures what a label map holds: every lesion's volume, diameters, place and side.

A lesion is a 26-connected component of a region (TC, WT, ET). Lengths are taken on the surface of the lesion, at the
centres of the voxel faces that separate it from everything else: the vertices of the marching-cubes mesh at level one
half, so a rod of n voxels measures n voxel lengths and one voxel is not 0 mm long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from fediod_med.errors import GeometryError
from fediod_med.labels import REGIONS, region_masks
from fediod_med.metrics import bounding_box

SIDE_SHARE = 0.9
"""Share of a lesion's volume beyond the mid-sagittal plane from which it counts as one-sided."""
BILATERAL_REACH_MM = 15.0
"""Distance from the plane that a lesion must pass on both sides to count as bilateral rather than midline."""
SIDE_RULE = (
    "The mid-sagittal plane halves the box round the brain along the image axis nearest to left-right. A lesion with "
    f"at least {SIDE_SHARE:.0%} of its volume on one side is left or right; otherwise it is bilateral when it reaches "
    f"more than {BILATERAL_REACH_MM:g} mm beyond the plane on both sides, else midline. Geometry, not anatomy: a "
    "shifted midline or a turned head moves the plane."
)
# Sagittal slices with less brain than this share of the fullest one do not widen the box: stray voxels, eyes, noise.
_BOX_FLOOR = 0.01
_LISTED = 20

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Lesion:
    """One connected component of a region.

    Attributes:
        voxels: how many.
        volume_ml: their volume.
        diameter_mm: largest distance between two points of the surface.
        axial_diameter_mm: longest diameter within one axial slice, over all slices (RANO; Wen et al. 2010, J Clin Oncol
            28(11)). Axial: across the image axis nearest to head-feet.
        axial_perpendicular_mm: longest chord at right angles to it in the same slice, on the convex hull of the slice
            (notches are bridged).
        axial_slice: index of that slice along the axis nearest to head-feet.
        centroid_mm: centre of mass `(x, y, z)`, RAS+ world coordinates.
        box: first and last voxel index along each array axis, both inside.
        side: `left`, `right`, `midline` or `bilateral`, of the patient; see `SIDE_RULE`.
        touches_border: it reaches the border of the image, so part of it may lie outside.
    """

    voxels: int
    volume_ml: float
    diameter_mm: float
    axial_diameter_mm: float
    axial_perpendicular_mm: float
    axial_slice: int
    centroid_mm: tuple[float, float, float]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    side: str
    touches_border: bool


@dataclass(frozen=True)
class Midline:
    """The mid-sagittal plane, across one image axis.

    Attributes:
        axis: array axis nearest to left-right.
        index: position of the plane along it, in voxels (may lie between two).
        towards_right: whether the patient's right lies at larger indices.
        decided_by: `brain box` or, when no brain was given, `image box`.
    """

    axis: int
    index: float
    towards_right: bool
    decided_by: str


@dataclass(frozen=True)
class CaseLesions:
    """All lesions of one case, by region (TC, WT, ET), largest first, and the plane that their sides refer to."""

    regions: Mapping[str, tuple[Lesion, ...]]
    midline: Midline

    def as_dict(self, *, limit: int = _LISTED) -> dict[str, Any]:
        """Plain values for JSON: per region the count, the total of the rest, and the `limit` largest lesions."""
        return {
            "definition": "26-connected components of each region; lengths between the outer faces of voxels, mm",
            "side_rule": SIDE_RULE,
            "side_decided_by": self.midline.decided_by,
            "regions": {
                region: {
                    "count": len(found),
                    "listed": [_lesion_dict(lesion) for lesion in found[:limit]],
                    "not_listed_ml": round(sum(lesion.volume_ml for lesion in found[limit:]), 3),
                }
                for region, found in self.regions.items()
            },
        }


def measure_lesions(classes: np.ndarray, affine: np.ndarray, *, brain: np.ndarray | None = None) -> CaseLesions:
    """Find and measure the lesions of each region of a class map.

    Args:
        classes: `(X, Y, Z)`, 0 to 3.
        affine: voxel to world matrix (RAS+), mm, with axes at right angles.
        brain: `(X, Y, Z)` mask of the brain (for a skull-stripped scan: not zero); it decides where the middle is.

    Raises:
        GeometryError: `classes` is not a volume, or `brain` has another shape.
    """
    if classes.ndim != 3 or (brain is not None and brain.shape != classes.shape):
        found = classes.shape if brain is None else f"{classes.shape} and a brain mask of {brain.shape}"
        raise GeometryError(f"lesions: expected a class map (X, Y, Z) and a brain mask on its grid, found {found}")
    matrix = np.asarray(affine, dtype=np.float64)
    midline = find_midline(classes.shape, matrix, brain)
    box = bounding_box(classes != 0)
    if box is None:
        return CaseLesions(dict.fromkeys(REGIONS, ()), midline)
    masks = region_masks(classes[box])
    start = np.array([s.start for s in box])
    return CaseLesions(
        {region: _measure_region(masks[region], start, classes.shape, matrix, midline) for region in REGIONS}, midline
    )


def without_small_lesions(
    classes: np.ndarray, affine: np.ndarray, *, smallest_ml: float
) -> tuple[np.ndarray, int, float]:
    """A class map without the lesions (26-connected whole tumour) below a volume; the largest always stays.

    Args:
        classes: `(X, Y, Z)`, 0 to 3.
        affine: voxel to world matrix, mm.
        smallest_ml: lesions of at least this volume stay; 0 keeps all.

    Returns:
        The class map, the number of lesions taken out, and their volume in ml together.
    """
    box = bounding_box(classes != 0)
    if box is None or smallest_ml <= 0:
        return classes, 0, 0.0
    labelled, count = ndimage.label(classes[box] != 0, structure=np.ones((3, 3, 3)))
    voxel_ml = abs(float(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3]))) / 1000.0
    sizes = np.bincount(labelled.ravel(), minlength=count + 1)
    sizes[0] = 0
    small = sizes * voxel_ml < smallest_ml
    small[[0, int(sizes.argmax())]] = False
    if not small.any():
        return classes, 0, 0.0
    cleaned = classes.copy()
    cleaned[box][small[labelled]] = 0
    return cleaned, int(small.sum()), float(sizes[small].sum()) * voxel_ml


def find_midline(shape: tuple[int, ...], affine: np.ndarray, brain: np.ndarray | None = None) -> Midline:
    """The plane that halves the brain's box from left to right; the image's own box without a (non-empty) brain."""
    orientation = io_orientation(affine)
    axis = int(np.flatnonzero(orientation[:, 0] == 0)[0])
    towards_right = bool(orientation[axis, 1] > 0)
    if brain is not None and brain.any():
        profile = np.count_nonzero(brain, axis=tuple(a for a in range(3) if a != axis))
        inside = np.flatnonzero(profile >= max(1.0, _BOX_FLOOR * float(profile.max())))
        return Midline(axis, float(inside[0] + inside[-1]) / 2, towards_right, "brain box")
    return Midline(axis, (shape[axis] - 1) / 2, towards_right, "image box")


def largest_diameter(points: Points) -> float:
    """Largest distance between two of `(N, 3)` points; exact, through the convex hull."""
    corners = points[ConvexHull(points).vertices]
    # In blocks: the hull of a large ragged lesion has some thousand corners.
    return float(max(cdist(corners[i : i + 512], corners).max() for i in range(0, len(corners), 512)))


def planar_diameters(points: Points) -> tuple[float, float]:
    """Longest diameter of the convex hull of `(N, 2)` points and its longest chord at right angles to it.

    The length of that chord is a concave, piecewise linear function of its place along the diameter, with kinks at the
    corners of the hull, so its largest value lies at a corner.
    """
    corners = points[ConvexHull(points).vertices]  # counter-clockwise
    distances = cdist(corners, corners)
    first, last = divmod(int(distances.argmax()), len(corners))
    longest = float(distances[first, last])
    along = (corners[last] - corners[first]) / longest
    place = (corners - corners[first]) @ along
    height = (corners - corners[first]) @ np.array([-along[1], along[0]])
    first, last = sorted((first, last))
    one = np.arange(first, last + 1)
    other = np.r_[last : len(corners), 0 : first + 1]
    chords = []
    for chain, opposite in ((one, other), (other, one)):
        order = opposite[np.argsort(place[opposite], kind="stable")]
        chords.append(np.abs(height[chain] - np.interp(place[chain], place[order], height[order])))
    return longest, float(np.concatenate(chords).max())


def face_centres(mask: np.ndarray) -> tuple[Points, NDArray[np.intp]]:
    """Centres of the faces between inside and outside, in voxel coordinates.

    Args:
        mask: boolean, any number of axes; what lies beyond the array is outside.

    Returns:
        `(N, ndim)` points, and for each point the axis that its face is normal to.
    """
    padded = np.pad(mask, 1)
    centres, normals = [], []
    for axis in range(mask.ndim):
        steps = np.diff(padded.view(np.int8), axis=axis) != 0
        found = np.argwhere(steps).astype(np.float64) - 1
        found[:, axis] += 0.5
        centres.append(found)
        normals.append(np.full(len(found), axis))
    return np.concatenate(centres), np.concatenate(normals)


def _measure_region(
    mask: np.ndarray, start: np.ndarray, shape: tuple[int, ...], affine: np.ndarray, midline: Midline
) -> tuple[Lesion, ...]:
    labelled, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    found = [
        _measure(labelled[place] == number, start + [s.start for s in place], shape, affine, midline)
        for number, place in enumerate(ndimage.find_objects(labelled), start=1)
    ]
    return tuple(sorted(found, key=lambda lesion: (-lesion.voxels, lesion.box)))


def _measure(
    mask: np.ndarray, start: np.ndarray, shape: tuple[int, ...], affine: np.ndarray, midline: Midline
) -> Lesion:
    """Measure one component given on its own box, whose first voxel is `start` in the image of `shape`."""
    spacing = voxel_sizes(affine)
    voxels = int(np.count_nonzero(mask))
    points, normals = face_centres(mask)
    vertical = int(np.flatnonzero(io_orientation(affine)[:, 0] == 2)[0])
    longest, across, level = _axial_diameters(points * spacing, points[:, vertical], normals, vertical)
    counts = [np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    centre = np.array([counts[axis] @ (start[axis] + np.arange(mask.shape[axis])) / voxels for axis in range(3)])
    world = affine[:3, :3] @ centre + affine[:3, 3]
    stop = start + mask.shape
    return Lesion(
        voxels=voxels,
        volume_ml=voxels * abs(float(np.linalg.det(affine[:3, :3]))) / 1000,
        diameter_mm=largest_diameter(points * spacing),
        axial_diameter_mm=longest,
        axial_perpendicular_mm=across,
        axial_slice=int(start[vertical]) + level,
        centroid_mm=(float(world[0]), float(world[1]), float(world[2])),
        box=tuple((int(a), int(b) - 1) for a, b in zip(start, stop, strict=True)),  # type: ignore[arg-type]
        side=_side(counts[midline.axis], start[midline.axis] - midline.index, spacing[midline.axis], midline),
        touches_border=bool((start == 0).any() or (stop == shape).any()),
    )


def _axial_diameters(points: Points, levels: Points, normals: np.ndarray, vertical: int) -> tuple[float, float, int]:
    """Longest diameter over axial slices, its perpendicular, and the slice; `points` in mm, `levels` in voxels."""
    side_faces = normals != vertical
    flat = np.delete(points[side_faces], vertical, axis=1)
    slices = levels[side_faces].astype(int)
    best = (0.0, 0.0, 0)
    for level in np.unique(slices):
        longest, across = planar_diameters(flat[slices == level])
        if (longest, across) > best[:2]:
            best = (longest, across, int(level))
    return best


def _side(counts: np.ndarray, first: float, spacing: float, midline: Midline) -> str:
    """Side of a lesion with `counts` voxels per sagittal slice, the first of them `first` slices from the plane."""
    place = first + np.arange(len(counts))
    beyond = float(counts[place > 0].sum() + 0.5 * counts[place == 0].sum()) / float(counts.sum())
    if max(beyond, 1 - beyond) >= SIDE_SHARE:
        return "right" if (beyond >= SIDE_SHARE) == midline.towards_right else "left"
    reach = min(place[-1] + 0.5, 0.5 - place[0]) * spacing
    return "bilateral" if reach > BILATERAL_REACH_MM else "midline"


def _lesion_dict(lesion: Lesion) -> dict[str, Any]:
    return {
        "volume_ml": round(lesion.volume_ml, 4),
        "voxels": lesion.voxels,
        "diameter_mm": round(lesion.diameter_mm, 2),
        "axial_diameter_mm": round(lesion.axial_diameter_mm, 2),
        "axial_perpendicular_mm": round(lesion.axial_perpendicular_mm, 2),
        "axial_slice": lesion.axial_slice,
        "centroid_mm_ras": [round(x, 2) for x in lesion.centroid_mm],
        "box_voxels": [list(pair) for pair in lesion.box],
        "side": lesion.side,
        "touches_border": lesion.touches_border,
    }
