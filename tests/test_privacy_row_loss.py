from __future__ import annotations

import math

import pytest
import torch

from fediod_med.errors import PrivacyError
from fediod_med.privacy.row_loss import per_row_cross_entropy, per_row_dice, per_row_dice_ce


def test_small_values_by_hand():
    logits = torch.zeros(1, 2, 2, 1, 1)  # probability .5 everywhere; one of two voxels is foreground
    classes = torch.tensor([1, 0]).reshape(1, 2, 1, 1)
    assert per_row_dice(logits, classes).tolist() == pytest.approx([1 - (2 * 0.5 + 1) / (1 + 1 + 1)])
    assert per_row_cross_entropy(logits, classes).tolist() == pytest.approx([math.log(2)])
    assert per_row_dice_ce(logits, classes[:, None]).tolist() == pytest.approx([1 / 3 + math.log(2)])


def test_the_mean_over_rows_of_monais_loss_is_found_again():
    from monai.losses import DiceCELoss

    logits, classes = torch.randn(3, 4, 4, 4, 4), torch.randint(0, 4, (3, 1, 4, 4, 4))
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1.0, smooth_dr=1.0)
    # MONAI leaves the background out of the Dice term alone.
    assert float(per_row_dice_ce(logits, classes).mean()) == pytest.approx(float(monai(logits, classes)), abs=1e-5)


def test_no_row_looks_at_another():
    logits, classes = torch.randn(3, 4, 4, 4, 4), torch.randint(0, 4, (3, 4, 4, 4))
    before = per_row_dice_ce(logits, classes)
    logits[1], classes[1] = 7.0, 0
    after = per_row_dice_ce(logits, classes)
    assert before[1] != after[1]
    assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_a_row_without_tumour_has_a_finite_loss_and_gradient():
    logits = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    per_row_dice_ce(logits, torch.zeros(1, 4, 4, 4)).sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_labels_of_another_shape_are_refused():
    with pytest.raises(PrivacyError, match="one class per voxel"):
        per_row_dice_ce(torch.zeros(2, 4, 4, 4, 4), torch.zeros(2, 4, 4, 5))
