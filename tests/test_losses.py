"""Each loss term: exact small values, limits, ranks, and gradients at the zeros that fp16 makes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fediod_med.errors import SettingsError
from fediod_med.losses import (
    class_balance,
    discriminator_adversarial,
    entropy_map,
    generator_adversarial,
    mask_cross_entropy,
    prediction_entropy,
    released_divergence,
    soft_dice,
    teacher_divergence,
    transfer_divergence,
)

C = 4
SPATIAL = [(), (5, 3), (4, 3, 2)]
UNIFORM = torch.full((C,), 1 / C)


def random_probs(*shape: int, seed: int = 0, dim: int = 1) -> Tensor:
    return torch.softmax(2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=dim)


def one_class(label: int, *spatial: int) -> Tensor:
    """`(1, C, *spatial)`, certain of `label`."""
    probs = torch.zeros(1, C, *spatial)
    probs[:, label] = 1
    return probs


def test_entropy_of_the_uniform_is_log_of_the_classes() -> None:
    probs = torch.full((2, C, 3, 3, 3), 1 / C)
    assert prediction_entropy(probs).item() == pytest.approx(math.log(C), rel=1e-6)
    assert entropy_map(probs).shape == (2, 3, 3, 3)


def test_entropy_of_certainty_is_zero() -> None:
    assert prediction_entropy(one_class(2, 3, 3, 3)).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_teachers_that_agree_do_not_diverge(spatial: tuple[int, ...]) -> None:
    p = random_probs(2, C, *spatial)
    assert teacher_divergence(torch.stack([p, p, p]), torch.tensor([0.2, 0.3, 0.5])).item() == pytest.approx(
        0, abs=1e-6
    )


def test_two_teachers_certain_of_different_classes_diverge_by_ln_two() -> None:
    probs = torch.stack([one_class(0, 4, 4), one_class(3, 4, 4)])
    assert teacher_divergence(probs, torch.tensor([0.5, 0.5])).item() == pytest.approx(math.log(2), abs=1e-4)


def test_divergence_is_the_weighted_kl_to_the_mixture() -> None:
    """Two routes to the Jensen-Shannon divergence: entropies, and KL of each member to the mixture."""
    probs, pi = random_probs(3, 2, C, 4, 4, dim=2), torch.tensor([0.2, 0.3, 0.5])
    mixture = (pi.view(-1, 1, 1, 1, 1) * probs).sum(0)
    members = (probs * (probs / mixture).log()).sum(dim=2).mean(dim=(1, 2, 3))
    assert teacher_divergence(probs, pi).item() == pytest.approx((pi * members).sum().item(), rel=1e-4)


def test_a_hospital_without_weight_adds_no_divergence() -> None:
    probs = torch.stack([one_class(0, 4), one_class(3, 4)])
    assert teacher_divergence(probs, torch.tensor([1.0, 0.0])).item() == pytest.approx(0, abs=1e-6)


def test_released_divergence_is_positive_and_falls_as_teachers_agree() -> None:
    """Minimising it (as the published code does) pulls teachers together; the package subtracts its terms instead."""
    logits = torch.randn((2, 1, C, 6), generator=torch.Generator().manual_seed(1))
    spread = logits.clone().requires_grad_(True)
    before = released_divergence(torch.softmax(spread, dim=2))
    (gradient,) = torch.autograd.grad(before, spread)
    after = released_divergence(torch.softmax(logits - 0.5 * gradient, dim=2))
    assert before.item() > after.item() > 0
    assert released_divergence(torch.softmax(logits[:1].expand(2, -1, -1, -1), dim=2)).item() == pytest.approx(
        0, abs=1e-6
    )


def test_released_divergence_by_hand() -> None:
    a, b = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.7, 0.1, 0.1])
    mean = (a + b) / 2
    expected = sum((mean * (mean / p).log()).sum().item() for p in (a, b)) / 2
    assert released_divergence(torch.stack([a, b]).view(2, 1, C, 1)).item() == pytest.approx(expected, rel=1e-5)


def test_balance_is_zero_when_the_mean_is_the_target_and_ln_c_when_one_class_is_used() -> None:
    each = torch.cat([one_class(label, 2, 2) for label in range(C)])
    assert class_balance(each, UNIFORM).item() == pytest.approx(0, abs=1e-5)
    assert class_balance(one_class(1, 2, 2), UNIFORM).item() == pytest.approx(math.log(C), abs=1e-4)


def test_balance_is_the_published_term_times_ln_two_up_to_a_constant() -> None:
    p = random_probs(3, C, 4, 4)
    mean = p.mean(dim=(0, 2, 3))
    published = (mean * mean.log2()).sum().item()
    assert class_balance(p, UNIFORM).item() == pytest.approx(math.log(2) * published + math.log(C), abs=1e-5)


def test_mask_cross_entropy_weighs_present_classes_equally() -> None:
    """Nine background voxels and one of ET count the same: the mean of two class means."""
    probs = torch.full((1, C, 10), 0.1)
    probs[:, 0] = 0.7
    classes = torch.zeros(1, 10, dtype=torch.long)
    classes[0, 9] = 3
    expected = (-math.log(0.7) - math.log(0.1)) / 2
    assert mask_cross_entropy(probs, classes).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_transfer_is_zero_at_equality_and_positive_elsewhere(spatial: tuple[int, ...]) -> None:
    q = random_probs(2, C, *spatial)
    assert transfer_divergence(q, q.log() + 3).item() == pytest.approx(0, abs=1e-6)
    assert transfer_divergence(q, 2 * q.log() + 1).item() > 0.01


def test_transfer_equals_the_kl_of_torch() -> None:
    q, logits = random_probs(2, C, 3, 3), torch.randn(2, C, 3, 3, generator=torch.Generator().manual_seed(5))
    expected = torch.nn.functional.kl_div(torch.log_softmax(logits, 1), q, reduction="none").sum(1).mean()
    assert transfer_divergence(q, logits).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hot_transfer_is_the_mean_square_of_centred_logits() -> None:
    z = torch.randn(2, C, 3, 3, generator=torch.Generator().manual_seed(1))
    s = torch.randn(2, C, 3, 3, generator=torch.Generator().manual_seed(2))
    delta = s - z
    expected = (delta - delta.mean(1, keepdim=True)).square().sum(1).mean() / (2 * C)
    hot = transfer_divergence(torch.softmax(z, 1), s, temperature=60.0)
    assert hot.item() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_soft_dice_is_zero_at_a_soft_target_and_that_is_its_optimum(spatial: tuple[int, ...]) -> None:
    target = random_probs(3, C, *spatial)
    assert soft_dice(target, target).item() == pytest.approx(0, abs=1e-6)
    for seed in range(1, 6):
        assert soft_dice(random_probs(3, C, *spatial, seed=seed), target).item() > 0.01


def test_soft_dice_ignores_how_background_is_spread() -> None:
    target = one_class(0, 4, 4, 4)
    assert soft_dice(target, target).item() == pytest.approx(0, abs=1e-6)
    assert soft_dice(one_class(1, 4, 4, 4), one_class(2, 4, 4, 4)).item() > 0.5


@pytest.mark.parametrize("spatial", SPATIAL)
def test_gradients_are_finite_where_fp16_made_zeros(spatial: tuple[int, ...]) -> None:
    certain = torch.cat([one_class(0, *spatial), one_class(3, *spatial)]).half().float()
    classes = torch.full((2, *spatial), 1)
    pi = torch.tensor([0.5, 0.5])
    terms: list[Callable[[Tensor], Tensor]] = [
        prediction_entropy,
        lambda p: teacher_divergence(torch.stack([p, p.flip(1)]), pi),
        lambda p: released_divergence(torch.stack([p, p.flip(1)])),
        lambda p: class_balance(p, UNIFORM),
        lambda p: mask_cross_entropy(p, classes),
        lambda p: transfer_divergence(p, torch.zeros(2, C, *spatial)),
        lambda p: soft_dice(p, certain),
    ]
    for term in terms:
        leaf = certain.clone().requires_grad_(True)
        value = term(leaf)
        value.backward()
        assert value.shape == ()
        assert torch.isfinite(value) and leaf.grad is not None and torch.isfinite(leaf.grad).all()


def test_student_gradient_is_finite_and_points_to_the_target() -> None:
    logits = torch.tensor([[60.0, -60.0, 0.0, 0.0]]).half().requires_grad_(True)
    transfer_divergence(one_class(1), logits).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0] > 0 > logits.grad[0, 1]


@pytest.mark.parametrize(
    ("criterion", "generator", "discriminator"),
    [
        ("hinge", -2.0, (3 + 1.5) / 2),
        ("bce", math.log1p(math.exp(-2)), (2 + math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5))) / 2),
        ("least_squares", 1.0, (4 + 2.25) / 2),
    ],
)
def test_adversarial_losses_by_hand(criterion: str, generator: float, discriminator: float) -> None:
    """Synthetic patches judged +2, real ones -0.5."""
    fake, real = torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), -0.5)
    assert generator_adversarial(fake, criterion).item() == pytest.approx(generator, rel=1e-5)
    assert discriminator_adversarial(fake, real, criterion).item() == pytest.approx(discriminator, rel=1e-5)


@pytest.mark.parametrize("criterion", ["hinge", "bce"])
def test_a_confident_judge_still_teaches_the_generator(criterion: str) -> None:
    logits = torch.full((1, 1, 2), -20.0, requires_grad=True)
    generator_adversarial(logits, criterion).backward()
    assert logits.grad is not None and logits.grad.sum().item() == pytest.approx(-1, rel=1e-3)


def test_unknown_criterion_is_refused() -> None:
    with pytest.raises(SettingsError, match="hinge, bce or least_squares"):
        generator_adversarial(torch.zeros(1, 1), "wasserstein")
    with pytest.raises(SettingsError, match="wasserstein"):
        discriminator_adversarial(torch.zeros(1, 1), torch.zeros(1, 1), "wasserstein")
