"""Differentiable augmentation: zero stays zero, the gradient is right, and a draw is fixed by its seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fediod_med.errors import SettingsError
from fediod_med.federation.augmentation import Augmentation, draw_augmentation
from fediod_med.federation.critic_design import CriticDesign

SHAPE = (2, 3, 16, 16, 16)


def volumes(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Noise in a box, exact zeros around it."""
    x = torch.zeros(shape, dtype=torch.float64)
    inner = (slice(None), slice(None), *[slice(3, 13)] * (len(shape) - 2))
    x[inner] = torch.randn(x[inner].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x


def still(shape: tuple[int, ...] = SHAPE, **changes: Any) -> Augmentation:
    """No change but the cut of the lowest corner, which is outside the brain, and those asked for."""
    batch, sequences, *size = shape
    nothing = Augmentation(
        torch.zeros(batch, sequences),
        torch.ones(batch, sequences),
        ((0,) * len(size),) * batch,
        ((0,) * len(size),) * batch,
    )
    return dataclasses.replace(nothing, **changes)


def test_a_change_of_nothing_changes_nothing_but_the_cut_box() -> None:
    x = volumes()
    expected = x.clone()
    expected[:, :, :4, :4, :4] = 0
    assert torch.allclose(still().apply(x), expected, rtol=0, atol=1e-15)


def test_brightness_and_contrast_are_per_sequence_and_inside_the_brain() -> None:
    x = volumes()
    brain = x != 0
    factors, shifts = torch.tensor([[0.5, 1.0, 1.5], [1.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.25, 0.5], [-0.5, 0, 0]])
    found = still(contrast=factors, brightness=shifts).apply(x)
    assert (found[~brain] == 0).all()
    x, found, brain = (v[..., 4:, 4:, 4:] for v in (x, found, brain))  # beside the cut box
    for volume in range(2):
        for sequence in range(3):
            before, after = (v[volume, sequence][brain[volume, sequence]] for v in (x, found))
            assert float(after.std() / before.std()) == pytest.approx(float(factors[volume, sequence]), abs=1e-6)
            pairs = (after - before).mean() - (factors[volume, sequence] - 1) * (
                before.mean() - whole_mean(volume, sequence)
            )
            assert float(pairs) == pytest.approx(float(shifts[volume, sequence]), abs=1e-6)


def whole_mean(volume: int, sequence: int) -> torch.Tensor:
    inside = volumes()[volume, sequence]
    return inside[inside != 0].mean()


def test_a_shift_moves_whole_voxels_and_brings_background_in() -> None:
    x = volumes()
    found = still(shifts=((2, 0, -1), (0, 0, 0))).apply(x)
    expected = torch.zeros_like(x[0])
    expected[:, 2:, :, :-1] = x[0, :, :-2, :, 1:]
    expected[:, :4, :4, :4] = 0
    assert torch.allclose(found[0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [SHAPE, (2, 1, 16, 24)])
def test_outside_the_brain_stays_zero_and_the_change_has_its_bounds(shape: tuple[int, ...]) -> None:
    size = shape[2:]
    outside = torch.zeros(shape)
    for seed in range(30):
        draw = draw_augmentation(shape, seed=seed)
        assert (draw.apply(outside) == 0).all()
        assert draw.brightness.abs().max() <= 0.5 and (draw.contrast - 1).abs().max() <= 0.5
        assert all(abs(step) <= edge // 8 for shift in draw.shifts for step, edge in zip(shift, size, strict=True))
        assert all(0 <= low <= edge - edge // 4 for c in draw.corners for low, edge in zip(c, size, strict=True))
        ones = dataclasses.replace(draw, shifts=((0,) * len(size),) * 2).apply(torch.rand(shape) + 3)
        assert int((ones[0, 0] == 0).sum()) == int(torch.tensor(size).float().prod()) // 4 ** len(size)
    found = draw_augmentation(shape, seed=1).apply(volumes(shape).float())
    frame = found.abs().sum(1)[:, 0]  # the box ends 3 voxels from the border, and a shift is at most 2
    assert (frame == 0).all()


def test_draws_reach_both_ends_and_differ_between_volumes() -> None:
    draws = [draw_augmentation(SHAPE, seed=seed) for seed in range(60)]
    assert {shift[0][0] for shift in (draw.shifts for draw in draws)} == {-2, -1, 0, 1, 2}
    assert {draw.corners[0][2] for draw in draws} == set(range(13))
    assert any(draw.shifts[0] != draw.shifts[1] for draw in draws)
    assert torch.stack([draw.brightness for draw in draws]).min() < -0.4


def test_a_draw_is_fixed_by_its_seed() -> None:
    x = volumes()
    one, same, other = (draw_augmentation(SHAPE, seed=seed).apply(x) for seed in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_gradient_is_that_of_finite_differences() -> None:
    shape = (1, 2, 8, 8, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_(True)
    draw = draw_augmentation(shape, seed=3)
    assert any(draw.shifts[0]) and torch.autograd.gradcheck(draw.apply, (x,), fast_mode=True)


def test_a_design_that_cannot_be_is_refused() -> None:
    assert CriticDesign().plain and not CriticDesign(spectral=True).plain
    for wrong in ({"scales": 0}, {"penalty": -1.0}, {"penalty": float("nan")}):
        with pytest.raises(SettingsError, match="discriminator"):
            CriticDesign(**wrong)
