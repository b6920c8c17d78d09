"""Where a prediction is unsure, and where several predictions disagree, voxel by voxel.

Both maps are in nats and lie on the grid of the probabilities; `data.nifti.writing.write_volumes` writes
them as float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fediod_med.errors import InputError
from fediod_med.labels import CLASSES
from fediod_med.losses import entropy_map

# Voxels handled at a time: bounds the working memory to about 100 MB whatever the grid.
_BLOCK = 1 << 20
_SUM_TOLERANCE = 0.02


def class_entropy(probabilities: np.ndarray) -> NDArray[np.float32]:
    """Entropy of the class probabilities, in nats: 0 where certain, ln 4 = 1.386 where all classes are alike.

    Args:
        probabilities: `(4, X, Y, Z)`, any float type, summing to 1 over the classes.

    Returns:
        `(X, Y, Z)` float32.

    Raises:
        InputError: wrong shape, values not finite, or not probabilities.
    """
    flat = require_probabilities(probabilities, "class entropy")
    entropy = np.empty(flat.shape[1], dtype=np.float32)
    for start in range(0, flat.shape[1], _BLOCK):
        entropy[start : start + _BLOCK] = _entropy(_block(flat, start)).numpy()
    return entropy.reshape(probabilities.shape[1:])


def teacher_disagreement(
    predictions: Iterable[np.ndarray], weights: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """How far several predictions differ: their generalised Jensen-Shannon divergence at each voxel, in nats.

    `H(sum_k w_k p_k) - sum_k w_k H(p_k)` (Lin 1991, IEEE Trans Inf Theory 37(1)); 0 where all agree, at most ln 4 and
    at most the entropy of the weights. Its mean is `losses.teacher_divergence`.

    Args:
        predictions: at least two maps `(4, X, Y, Z)` on one grid; they are read once, one at a time.
        weights: of the teachers, not negative; scaled to sum to 1; all alike when omitted.

    Returns:
        `(X, Y, Z)` float32.

    Raises:
        InputError: fewer than two maps, unlike shapes, weights that do not fit, or values that are no probabilities.
    """
    share = None if weights is None else np.asarray(weights, dtype=np.float64)
    if share is not None and not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise InputError(f"teacher disagreement: expected weights that are not negative, found {list(share)}")
    mixture: NDArray[np.float32] | None = None
    members: NDArray[np.float32] | None = None
    shape: tuple[int, ...] = ()
    count, total = 0, 0.0
    for count, prediction in enumerate(predictions, start=1):
        if share is not None and count > len(share):
            break
        weight = 1.0 if share is None else float(share[count - 1])
        flat = require_probabilities(prediction, "teacher disagreement")
        if mixture is None or members is None:
            shape = prediction.shape
            mixture, members = np.zeros(flat.shape, np.float32), np.zeros(flat.shape[1], np.float32)
        if prediction.shape != shape:
            raise InputError(f"teacher disagreement: expected maps of shape {shape}, found {prediction.shape}")
        for start in range(0, flat.shape[1], _BLOCK):
            block = _block(flat, start)
            mixture[:, start : start + _BLOCK] += weight * block.numpy()
            members[start : start + _BLOCK] += weight * _entropy(block).numpy()
        total += weight
    if mixture is None or members is None or count < 2 or (share is not None and count != len(share)):
        wanted = "at least two maps" if share is None else f"{max(2, len(share))} maps, one per weight"
        raise InputError(f"teacher disagreement: expected {wanted}, found {count}")
    divergence = np.empty(members.shape, dtype=np.float32)
    for start in range(0, len(members), _BLOCK):
        mixed = _entropy(torch.from_numpy(mixture[:, start : start + _BLOCK] / np.float32(total))).numpy()
        # Rounding may leave a little less than nothing where all agree.
        divergence[start : start + _BLOCK] = np.maximum(mixed - members[start : start + _BLOCK] / total, 0)
    return divergence.reshape(shape[1:])


def require_probabilities(probabilities: np.ndarray, task: str) -> np.ndarray:
    """`(4, voxels)` view of class probabilities `(4, X, Y, Z)`; `InputError`, naming the task, when they are none."""
    if probabilities.ndim != 4 or len(probabilities) != len(CLASSES) or probabilities.dtype.kind != "f":
        raise InputError(
            f"{task}: expected class probabilities ({len(CLASSES)}, X, Y, Z) as floats, found {probabilities.dtype} of "
            f"shape {probabilities.shape}"
        )
    flat = probabilities.reshape(len(CLASSES), -1)
    # Every 101st voxel: catches logits and unnormalised maps without a pass over the whole.
    probe = flat[:, ::101].astype(np.float32)
    if not (np.isfinite(probe).all() and (np.abs(probe.sum(axis=0) - 1) <= _SUM_TOLERANCE).all()):
        raise InputError(f"{task}: expected probabilities that sum to 1 over the classes, found other values")
    return flat


def _block(flat: np.ndarray, start: int) -> torch.Tensor:
    return torch.from_numpy(flat[:, start : start + _BLOCK].astype(np.float32))


def _entropy(block: torch.Tensor) -> torch.Tensor:
    """`(4, N)` to `(N,)`, nats."""
    return entropy_map(block[None])[0]
