"""Ensemble weights: they sum to one, survive empty and noised counts, and merge to probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fediod_med.ensemble import (
    REALISM_FLOOR,
    class_ratio_weights,
    competence_weights,
    entropy_confidence,
    learn_weights,
    merge,
    mirrored_logits,
    public_dice,
    realism_confidence,
    site_shares,
)
from fediod_med.losses import entropy_map, soft_dice, transfer_divergence


def random_probs(*shape: int, seed: int = 0) -> Tensor:
    """Softmax over axis 2: `(K, B, C, ...)`."""
    return torch.softmax(2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=2)


counts_of_three = st.lists(
    st.lists(st.floats(-50, 200, allow_nan=False, width=32), min_size=4, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(counts_of_three)
def test_weights_are_shares_whatever_the_counts(rows: list[list[float]]) -> None:
    """Noise may make counts negative, or leave nothing at all."""
    weights = class_ratio_weights(torch.tensor(rows))
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(dim=0), torch.ones(4), atol=1e-5)


def test_weights_are_ratios_of_patients() -> None:
    counts = torch.tensor([[10, 5, 8, 0], [30, 15, 2, 6]])
    expected = torch.tensor([[0.25, 0.25, 0.8, 0.0], [0.75, 0.75, 0.2, 1.0]])
    assert torch.allclose(class_ratio_weights(counts), expected)
    assert torch.allclose(site_shares(counts), torch.tensor([0.25, 0.75]))


def test_a_class_no_hospital_has_is_shared_by_patients() -> None:
    weights = class_ratio_weights(torch.tensor([[10.0, 1, 1, 0], [30.0, 1, 1, 0]]))
    assert torch.allclose(weights[:, 3], torch.tensor([0.25, 0.75]))


def test_negative_counts_are_no_patients() -> None:
    weights = class_ratio_weights(torch.tensor([[10.0, -4, 1, 1], [10.0, 8, 1, 1]]))
    assert torch.allclose(weights[:, 1], torch.tensor([0.0, 1.0]))


def test_counts_that_noise_wiped_out_give_equal_shares() -> None:
    counts = torch.tensor([[-3.0, -1, 0, -2], [0.0, 0, -5, 0]])
    assert torch.allclose(class_ratio_weights(counts), torch.full((2, 4), 0.5))
    q = merge(random_probs(2, 1, 4, 3, 3, 3), counts)
    assert torch.isfinite(q).all()


@pytest.mark.parametrize("spatial", [(), (5,), (4, 3), (4, 3, 2)])
def test_merged_probabilities_sum_to_one(spatial: tuple[int, ...]) -> None:
    probs = random_probs(3, 2, 4, *spatial)
    counts = torch.tensor([[10.0, 2, 3, 0], [5.0, 5, 5, 5], [1.0, 0, 0, 0]])
    q = merge(probs, counts, realism=torch.tensor([[9.0, -9], [0, 0], [-30, 30]]), entropy_temperature=0.3)
    assert q.shape == (2, 4, *spatial)
    assert (q >= 0).all() and torch.allclose(q.sum(dim=1), torch.ones(2, *spatial), atol=1e-5)


def test_merge_by_hand() -> None:
    """q^c is proportional to w_1^c p_1^c + w_2^c p_2^c; class-dependent weights need the renormalisation."""
    probs = torch.tensor([[[0.5, 0.2, 0.2, 0.1]], [[0.1, 0.1, 0.2, 0.6]]])
    counts = torch.tensor([[10.0, 10, 10, 0], [10.0, 0, 10, 10]])
    mixed = torch.tensor([0.3, 0.2, 0.2, 0.6])
    assert torch.allclose(merge(probs, counts)[0], mixed / mixed.sum())


def test_one_hospital_is_its_own_ensemble() -> None:
    probs = random_probs(1, 2, 4, 3, 3, 3)
    q = merge(probs, torch.tensor([[7.0, 3, 0, 2]]), realism=torch.tensor([[-4.0, 2.0]]), entropy_temperature=0.5)
    assert torch.allclose(q, probs[0], atol=1e-6)


def test_agreeing_hospitals_are_left_unchanged() -> None:
    probs = random_probs(1, 2, 4, 3, 3, 3).expand(3, -1, -1, -1, -1, -1)
    q = merge(probs, torch.tensor([[7.0, 3, 0, 2], [1.0, 1, 1, 0], [5.0, 0, 0, 5]]), realism=torch.randn(3, 2))
    assert torch.allclose(q, probs[0], atol=1e-6)


def test_a_saturated_discriminator_cannot_silence_its_hospital() -> None:
    confidence = realism_confidence(torch.tensor([[-1000.0], [0.0]]))
    assert torch.allclose(confidence, torch.tensor([[REALISM_FLOOR], [0.5]]))
    probs = torch.tensor([[[1.0, 0, 0, 0]], [[0, 0, 0, 1.0]]])
    q = merge(probs, torch.ones(2, 4), realism=torch.tensor([[-1000.0], [1000.0]]))
    assert q[0, 0].item() == pytest.approx(REALISM_FLOOR / (1 + REALISM_FLOOR), rel=1e-4)


def test_realism_weighs_each_volume_by_itself() -> None:
    probs = torch.tensor([[[1.0, 0, 0, 0]] * 2, [[0, 0, 0, 1.0]] * 2])
    q = merge(probs, torch.ones(2, 4), realism=torch.tensor([[3.0, -3.0], [-3.0, 3.0]]))
    assert q[0, 0] > 0.9 and q[1, 3] > 0.9


def test_entropy_weights_are_the_ratio_of_exponentials() -> None:
    probs, tau = random_probs(2, 1, 4, 5), 0.7
    weight = entropy_confidence(probs, tau)
    exact = torch.stack([torch.exp(-entropy_map(p) / tau) for p in probs]).unsqueeze(2)
    assert weight.shape == (2, 1, 1, 5)
    assert torch.allclose(weight / weight.sum(0), exact / exact.sum(0), atol=1e-6)


def test_a_small_entropy_temperature_does_not_underflow() -> None:
    probs = torch.full((2, 1, 4, 3), 0.25)
    assert torch.allclose(merge(probs, torch.ones(2, 4), entropy_temperature=1e-3), probs[0])


def test_merge_passes_finite_gradients_to_every_hospital() -> None:
    probs = random_probs(2, 1, 4, 3, 3, 3).requires_grad_(True)
    merge(probs, torch.tensor([[5.0, 5, 5, 5], [5.0, 5, 5, 5]]), realism=torch.zeros(2, 1))[:, 3].sum().backward()
    assert probs.grad is not None and torch.isfinite(probs.grad).all()
    assert (probs.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_public_dice_by_hand() -> None:
    """Two hospitals, one volume of four voxels, three classes; overlap and volumes each smoothed by 1."""
    classes = torch.tensor([[0, 0, 1, 1]])
    right = torch.eye(3)[classes[0]].T[None]  # (1, C, voxels)
    wrong = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])[None]
    found = public_dice(torch.stack([right, wrong]), classes)
    assert torch.allclose(found, torch.tensor([[1.0, 1.0, 1.0], [5 / 7, 1 / 3, 1.0]]))


@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.2])
def test_competence_follows_the_difference_in_dice_alone(shift: float) -> None:
    dice = torch.tensor([[0.7, 0.5], [0.6, 0.5]])
    weights = competence_weights(dice + shift, 0.05)
    assert torch.allclose(weights, torch.tensor([[1.0, 1.0], [0.1353353, 1.0]]), atol=1e-5)


def test_a_more_competent_hospital_decides_its_class() -> None:
    probs, counts = random_probs(2, 1, 4, 5), torch.ones(2, 4)
    assert torch.allclose(merge(probs, counts, competence=torch.ones(2, 4)), merge(probs, counts))
    only_first = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
    assert torch.allclose(merge(probs, counts, competence=only_first), probs[0], atol=1e-6)


def test_a_learned_step_follows_the_gradient_of_the_students_loss() -> None:
    torch.manual_seed(0)
    probs, counts = random_probs(3, 2, 4, 3, 3, 3).double(), torch.tensor([[4.0, 1, 2, 3], [2, 2, 2, 2], [1, 0, 1, 1]])
    classes = torch.randint(4, (2, 3, 3, 3))
    truth = torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).double()
    start = torch.randn(3, 4).double() / 5

    def loss(theta: torch.Tensor) -> float:
        q = merge(probs, counts, competence=theta.exp())
        return float(transfer_divergence(truth, q.log()) + soft_dice(q, truth))

    moved = learn_weights(start, probs, classes, counts, step=1.0) - start
    slopes = torch.zeros(3, 4)
    for k in range(3):
        for c in range(4):
            nudge = torch.zeros(3, 4).double()
            nudge[k, c] = 1e-3
            slopes[k, c] = (loss(start + nudge) - loss(start - nudge)) / 2e-3
    mean_free = -(slopes - slopes.mean(dim=0))
    assert torch.allclose(moved.float(), mean_free.float(), atol=2e-4)


def test_learned_weights_find_the_hospital_that_is_right() -> None:
    torch.manual_seed(0)
    classes = torch.randint(4, (2, 4, 4, 4))
    truth = torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).float()
    right, vague = 0.9 * truth + 0.025, torch.full_like(truth, 0.25)
    probs, weights = torch.stack([vague, right, vague]), torch.zeros(3, 4)
    for _ in range(20):
        weights = learn_weights(weights, probs, classes, torch.ones(3, 4), step=2.0)
    assert (weights[1] > weights[0] + 1).all() and torch.allclose(weights[0], weights[2])
    assert weights.mean(dim=0).abs().max() < 1e-6
    same = learn_weights(torch.zeros(3, 4), torch.stack([right] * 3), classes, torch.ones(3, 4), step=2.0)
    assert same.abs().max() < 1e-6


def test_a_mirrored_answer_is_the_mean_of_the_answers_to_all_mirror_images() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv3d(2, 3, kernel_size=3, padding=1)
    x = torch.randn(2, 2, 4, 5, 6)
    mirrors = [[], [2], [3], [4], [2, 3], [2, 4], [3, 4], [2, 3, 4]]
    by_hand = torch.stack([torch.softmax(network(x.flip(m)), dim=1).flip(m) for m in mirrors]).mean(dim=0)
    answer = torch.softmax(mirrored_logits(network, x), dim=1)
    assert torch.allclose(answer, by_hand, atol=1e-6)
    assert not torch.allclose(answer, torch.softmax(network(x), dim=1), atol=1e-2)
    turned = torch.softmax(mirrored_logits(network, x.flip([3])), dim=1).flip([3])
    assert torch.allclose(answer, turned, atol=1e-6)


def test_mirroring_changes_nothing_for_a_network_that_looks_at_one_voxel() -> None:
    network = torch.nn.Conv2d(2, 3, kernel_size=1)
    x = torch.randn(1, 2, 4, 6)
    assert torch.allclose(mirrored_logits(network, x), torch.log_softmax(network(x), dim=1), atol=1e-6)
