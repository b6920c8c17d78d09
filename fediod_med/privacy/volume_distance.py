"""How near one volume comes to another, wherever it lies and however it is mirrored: for finding copied patients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy import fft

from fediod_med.errors import PrivacyError

_AXES = (1, 2, 3)


class VolumeMatcher:
    """Distances of real volumes to fixed synthetic ones: one minus the best correlation over shifts and mirror images.

    Bounding boxes of non-zero voxels are laid centre on centre, then shifted by up to `max_shift` voxels along each
    axis; the correlation `<a, b> / (|a| |b|)` over all sequences is taken at the best shift, by Fourier transform. A
    volume has distance 0 to itself, 1 to an unrelated one, at most 2.

    Args:
        volumes: `(C, x, y, z)` each, z-scored, zero outside the brain.
        max_shift: voxels.
        mirror: also try the eight mirror images, because training volumes are flipped.

    Raises:
        PrivacyError: no volume, or one without signal.
    """

    def __init__(self, volumes: Sequence[np.ndarray], *, max_shift: int = 4, mirror: bool = True) -> None:
        if not volumes or max_shift < 0:
            raise PrivacyError(f"volume distance: expected volumes and a shift >= 0, found {len(volumes)}, {max_shift}")
        self._boxes = [_unit_box(volume) for volume in volumes]
        self._max_shift = max_shift
        self._flips = list(itertools.product((False, True), repeat=3)) if mirror else [(False, False, False)]
        self._grid = tuple(max(box.shape[axis] for box in self._boxes) for axis in _AXES)
        self._spectra: list[np.ndarray] = []

    def __len__(self) -> int:
        """Number of synthetic volumes S."""
        return len(self._boxes)

    def distances(self, volume: np.ndarray) -> np.ndarray:
        """`(S,)` distances of one volume `(C, x, y, z)`; `PrivacyError` when it has no signal or other sequences."""
        box = _unit_box(volume)
        if box.shape[0] != self._boxes[0].shape[0]:
            raise PrivacyError(f"volume distance: expected {self._boxes[0].shape[0]} sequences, found {box.shape[0]}")
        self._grow(box.shape[1:])
        best = np.full(len(self), -1.0)
        for flips in self._flips:
            mirrored = tuple(axis for axis, flip in zip(_AXES, flips, strict=True) if flip)
            spectrum = self._spectrum(np.flip(box, mirrored))
            for index, other in enumerate(self._spectra):
                best[index] = max(best[index], self._best_correlation(spectrum, other))
        return np.asarray(1 - np.minimum(best, 1.0))

    def _grow(self, edges: Sequence[int]) -> None:
        """Make room for a box of these edges; spectra are made anew only when the grid grows."""
        grid = tuple(max(have, need) for have, need in zip(self._grid, edges, strict=True))
        if grid != self._grid or not self._spectra:
            self._grid = grid
            self._spectra = [self._spectrum(box) for box in self._boxes]

    def _spectrum(self, box: np.ndarray) -> np.ndarray:
        shape = [edge + self._max_shift for edge in self._grid]  # room, so that shifts do not wrap around
        fast = [fft.next_fast_len(edge, real=True) for edge in shape]
        placed = np.zeros((box.shape[0], *fast), dtype=np.float32)
        starts = [(have - need) // 2 for have, need in zip(self._grid, box.shape[1:], strict=True)]
        window = tuple(slice(start, start + need) for start, need in zip(starts, box.shape[1:], strict=True))
        placed[(slice(None), *window)] = box
        return np.asarray(fft.rfftn(placed, axes=_AXES))

    def _best_correlation(self, a: np.ndarray, b: np.ndarray) -> float:
        shape = [fft.next_fast_len(edge + self._max_shift, real=True) for edge in self._grid]
        correlation = fft.irfftn((a * b.conj()).sum(axis=0), s=shape)
        near = np.arange(-self._max_shift, self._max_shift + 1)
        return float(correlation[np.ix_(near, near, near)].max())


def _unit_box(volume: np.ndarray) -> np.ndarray:
    """The bounding box of non-zero voxels, `(C, x, y, z)` float32 of unit norm."""
    if volume.ndim != 4 or not np.isfinite(volume).all() or not volume.any():
        raise PrivacyError(f"volume distance: expected finite (C, x, y, z) with signal, found shape {volume.shape}")
    filled = np.asarray(volume != 0).any(axis=0)
    window = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        where = np.flatnonzero(np.asarray(filled).sum(axis=others))
        window.append(slice(int(where[0]), int(where[-1]) + 1))
    box = volume[(slice(None), *window)].astype(np.float32)
    return box / np.float32(np.linalg.norm(box.ravel().astype(np.float64)))
