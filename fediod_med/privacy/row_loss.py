"""The segmenter's loss, one number per row: nothing in it looks at another row of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fediod_med.errors import PrivacyError


def per_row_dice(logits: Tensor, classes: Tensor) -> Tensor:
    """Soft Dice loss of each row, mean over the foreground classes, smoothed by 1 (Milletari et al. 2016, section 3).

    Args:
        logits: `(R, C, ...)`.
        classes: `(R, ...)` integers.

    Returns:
        `(R,)`, in [0, 1).
    """
    probs = logits.softmax(dim=1)[:, 1:].flatten(2)
    truth = one_hot(classes.long(), logits.shape[1]).movedim(-1, 1)[:, 1:].flatten(2).to(probs.dtype)
    overlap = (probs * truth).sum(dim=2)
    volume = probs.sum(dim=2) + truth.sum(dim=2)
    return 1 - ((2 * overlap + 1) / (volume + 1)).mean(dim=1)


def per_row_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy over the voxels of each row, nats; arguments and result as for `per_row_dice`."""
    return cross_entropy(logits, classes.long(), reduction="none").flatten(1).mean(dim=1)


def per_row_dice_ce(logits: Tensor, classes: Tensor) -> Tensor:
    """Dice plus cross-entropy of each row, computed in float32.

    Args:
        logits: `(R, C, ...)`.
        classes: `(R, ...)` or `(R, 1, ...)` integers.

    Returns:
        `(R,)`.

    Raises:
        PrivacyError: the shapes do not belong together.
    """
    if classes.dim() == logits.dim() and classes.shape[1] == 1:
        classes = classes[:, 0]
    if classes.shape != (logits.shape[0], *logits.shape[2:]):
        raise PrivacyError(
            f"row loss: expected one class per voxel of logits {tuple(logits.shape)}, found {tuple(classes.shape)}"
        )
    logits = logits.float()
    return torch.add(per_row_dice(logits, classes), per_row_cross_entropy(logits, classes))
