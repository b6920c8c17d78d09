"""Where voxels lie in the patient: whether a grid can be used, and whether two are one; for readers of any format."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from fediod_med.errors import GeometryError

# Grids whose corners lie closer than this are one grid: float32 headers of different tools differ by about 1e-4 mm.
GEOMETRY_TOLERANCE_MM = 0.05
# Cosine between two voxel axes above which a grid counts as sheared (0.06 degrees).
SHEAR_TOLERANCE = 1e-3


def corner_distance(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> float:
    """Largest distance in mm between the same corner voxel of a grid of `shape` (X, Y, Z) under two affines."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape[:3]))], dtype=float)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())


def require_usable(affine: np.ndarray, path: Path) -> None:
    """Refuse an affine (4, 4) that is not finite, singular or sheared; `GeometryError`."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise GeometryError(
            f"{path}: expected a finite 4x4 affine, found {affine.tolist()}; correct the header", code="E121"
        )
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise GeometryError(
            f"{path}: expected positive voxel sizes, found {spacing.tolist()}; correct the header", code="E121"
        )
    axes = affine[:3, :3] / spacing
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if not shear <= SHEAR_TOLERANCE:
        raise GeometryError(
            f"{path}: expected voxel axes at right angles, found a sheared grid (cosine {shear:.4f}); resample the "
            f"scan to a rectangular grid",
            code="E122",
        )


def require_same_grid(
    path: Path,
    shape: tuple[int, ...],
    affine: np.ndarray,
    reference: Path,
    reference_shape: tuple[int, ...],
    reference_affine: np.ndarray,
) -> None:
    """Refuse two files whose voxels do not coincide; shapes are (X, Y, Z), affines (4, 4); `GeometryError`."""
    if shape != reference_shape:
        raise GeometryError(
            f"{path}: expected shape {reference_shape} of {reference}, found {shape}; co-register and resample the "
            f"files to one grid",
            code="E150",
        )
    distance = corner_distance(shape, affine, reference_affine)
    if not distance <= GEOMETRY_TOLERANCE_MM:
        raise GeometryError(
            f"{path}: expected the grid of {reference}, found corners up to {distance:.2f} mm apart (tolerance "
            f"{GEOMETRY_TOLERANCE_MM} mm); co-register and resample the files to one grid",
            code="E150",
        )
