"""The divergences that the experiments compare: exact values, identities, ranks and gradients at fp16's zeros."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from fediod_med.losses import (
    DIVERGENCES,
    feature_contrast,
    pairwise_divergence,
    site_label_information,
    teacher_divergence,
)

SPATIAL = [(), (5, 3), (4, 3, 2)]


def answers(hospitals: int, *spatial: int, classes: int = 4, seed: int = 0) -> Tensor:
    """`(K, 2, C, *spatial)` random probabilities."""
    noise = torch.randn((hospitals, 2, classes, *spatial), generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * noise, dim=2)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
def test_information_of_hospital_and_label_is_the_jensen_shannon_divergence(
    spatial: tuple[int, ...], weights: list[float]
) -> None:
    """Values and gradients agree, so an experiment on either is an experiment on both."""
    probs, pi = answers(3, *spatial).requires_grad_(True), torch.tensor(weights)
    values = [site_label_information(probs, pi), teacher_divergence(probs, pi)]
    assert values[0].item() == pytest.approx(values[1].item(), abs=1e-6)
    # Each teacher's answers sum to one: only the part of the gradient along that constraint moves anything.
    a, b = (torch.autograd.grad(value, probs)[0] for value in values)
    assert torch.allclose(a - a.mean(2, keepdim=True), b - b.mean(2, keepdim=True), atol=1e-6)


def test_information_of_hospital_and_label_from_the_joint_table() -> None:
    """By the definition `sum p(s, y) log p(s, y) / (p(s) p(y))`."""
    p, pi = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]), torch.tensor([0.25, 0.75])
    joint = pi[:, None] * p
    expected = (joint * (joint / (pi[:, None] * joint.sum(0))).log()).sum()
    assert site_label_information(p.view(2, 1, 3), pi).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("hospitals", [2, 3, 5])
def test_pairwise_divergence_is_the_mean_over_ordered_pairs(spatial: tuple[int, ...], hospitals: int) -> None:
    probs = answers(hospitals, *spatial)
    pairs = [(p * (p / q).log()).sum(dim=1).mean() for p, q in permutations(probs, 2)]
    assert pairwise_divergence(probs).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-4)


def test_pairwise_divergence_by_hand_and_alone() -> None:
    a, b = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    expected = (0.8 * math.log(1.6) + 0.2 * math.log(0.4) + 0.5 * math.log(0.625) + 0.5 * math.log(2.5)) / 2
    assert pairwise_divergence(torch.stack([a, b]).view(2, 1, 2, 1)).item() == pytest.approx(expected, rel=1e-5)
    assert pairwise_divergence(a.view(1, 1, 2, 1)).item() == 0


def test_jensen_shannon_is_bounded_where_pairwise_divergence_is_not() -> None:
    certain = torch.eye(2).view(2, 1, 2, 1)
    half = torch.tensor([0.5, 0.5])
    assert teacher_divergence(certain, half).item() == pytest.approx(math.log(2), abs=1e-4)
    assert pairwise_divergence(certain).item() > 10


def test_feature_contrast_of_class_answers_by_hand() -> None:
    """Two classes: centred log-probabilities are plus and minus half the log-odds."""
    odds = torch.tensor([1.0, 3.0])
    probs = torch.softmax(torch.stack([odds / 2, -odds / 2], dim=1), dim=1).view(2, 1, 2)
    # f = +-0.5 and +-1.5, their mean +-1: every entry lies 0.5 from it.
    assert feature_contrast(probs, torch.tensor([0.5, 0.5])).item() == pytest.approx(0.25, rel=1e-4)
    # Weights 1/4, 3/4: mean +-1.25, squares .5625 and .0625.
    assert feature_contrast(probs, torch.tensor([0.25, 0.75])).item() == pytest.approx(0.1875, rel=1e-4)


def test_feature_contrast_sees_means_and_spreads_over_voxels_but_not_places() -> None:
    pi = torch.tensor([0.5, 0.5])
    p = answers(1, 6, 4)[0]
    moved = p.flip(-1)
    assert feature_contrast(torch.stack([p, moved]), pi).item() == pytest.approx(0, abs=1e-9)
    assert teacher_divergence(torch.stack([p, moved]), pi).item() > 0.05
    logs = p.log() - p.log().mean(1, keepdim=True)
    centre = logs.flatten(2).mean(2).view(2, 4, 1, 1)
    narrower = torch.softmax(centre + 0.5 * (logs - centre), dim=1)  # same means, half the spread
    spread = logs.flatten(2).std(2, correction=0)
    expected = (spread / 4).square().mean() / 2  # each half lies a quarter of the spread from the mean of both
    assert feature_contrast(torch.stack([p, narrower]), pi).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_every_divergence_is_zero_where_teachers_agree_and_positive_elsewhere(
    name: str, spatial: tuple[int, ...]
) -> None:
    pi = torch.tensor([0.2, 0.3, 0.5])
    same = answers(1, *spatial).expand(3, *[-1] * (2 + 1 + len(spatial)))
    assert DIVERGENCES[name](same, pi).item() == pytest.approx(0, abs=1e-6)
    assert DIVERGENCES[name](answers(3, *spatial), pi).item() > 0.01


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_has_a_finite_gradient_at_certainty(name: str) -> None:
    certain = torch.zeros(2, 1, 4, 3)
    certain[0, :, 0], certain[1, :, 2] = 1, 1
    probs = certain.requires_grad_(True)
    (gradient,) = torch.autograd.grad(DIVERGENCES[name](probs, torch.tensor([0.5, 0.5])), probs)
    assert torch.isfinite(gradient).all()
