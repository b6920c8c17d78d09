"""Private gradients in a public subspace: geometry, bound and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from fediod_med.errors import PrivacyError
from fediod_med.networks import build_segmenter
from fediod_med.privacy.noise import NoiseSource, SeededNoise
from fediod_med.privacy.optimizer import PatientOptimizer, patient_gradient, public_gradient
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.subspace import SubspaceOptimizer, flatten, public_basis, public_share, unflatten


class Silent(SeededNoise):
    def normal(self, shape):
        return np.zeros(shape)


def parameters(*shapes) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def optimizer_of(params, *, dimensions, sigma=1.0, clip=1.0, expected=1.0, source: NoiseSource | None = None):
    return SubspaceOptimizer(
        torch.optim.SGD(params, lr=1.0),
        dimensions=dimensions,
        noise_multiplier=sigma,
        clip_norm=clip,
        expected_patients=expected,
        source=source,
    )


def gradient_of(params: Sequence[nn.Parameter]) -> torch.Tensor:
    return flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in params])


def set_gradient(params, vector: torch.Tensor) -> None:
    for p, g in zip(params, unflatten(vector, params), strict=True):
        p.grad = g.clone()


def test_a_basis_is_orthonormal_and_spans_every_public_gradient():
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(3, 2, generator=generator) * 100, torch.randn(5, generator=generator)] for _ in range(4)]
    basis = public_basis(gradients)
    assert basis.shape == (4, 11)
    assert torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-5)
    for gradient in gradients:
        flat = flatten(gradient)
        assert torch.allclose((flat @ basis.T) @ basis, flat, atol=1e-3)


def test_a_vanishing_public_gradient_leaves_the_others_a_basis():
    basis = public_basis([[torch.tensor([0.0, 2.0, 0.0])], [torch.zeros(3)], [torch.tensor([0.0, -5.0, 0.0])]])
    assert basis.shape == (3, 3)
    assert torch.allclose(basis.T @ basis, torch.diag(torch.tensor([0.0, 1.0, 0.0])), atol=1e-6)


def test_public_gradients_must_be_finite_and_there():
    with pytest.raises(PrivacyError, match="finite"):
        public_basis([[torch.tensor([1.0, float("nan")])]])
    with pytest.raises(PrivacyError, match="at least one"):
        public_basis([])


def test_with_every_direction_in_the_basis_it_equals_training_without_one():
    """Two routes to one number: all d directions, no noise, against the optimiser of whole gradients."""
    generator = torch.Generator().manual_seed(1)
    patients = [torch.randn(7, generator=generator) * scale for scale in (0.1, 3.0, 0.4) * 7]  # more than one product
    basis, _ = torch.linalg.qr(torch.randn(7, 7, generator=generator))
    projected, whole = parameters((3,), (2, 2)), parameters((3,), (2, 2))
    one = optimizer_of(projected, dimensions=7, clip=0.5, expected=2.0, source=Silent(0))
    one.set_basis(basis)
    two = PatientOptimizer(
        torch.optim.SGD(whole, lr=1.0), noise_multiplier=1.0, clip_norm=0.5, expected_patients=2.0, source=Silent(0)
    )
    for optimizer, params in ((one, projected), (two, whole)):
        for gradient in patients:
            set_gradient(params, gradient)
            optimizer.add_patient()
        optimizer.noised_gradient()
        optimizer.descend()
    assert torch.allclose(flatten(projected), flatten(whole), atol=1e-6)
    assert float(flatten(projected).detach().norm()) > 0.1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e20, float("inf"), float("nan")])
def test_no_patient_moves_the_sum_by_more_than_the_clip_norm_even_on_a_bad_basis(size):
    params = parameters((6,))
    optimizer = optimizer_of(params, dimensions=3, clip=0.25, source=Silent(0))
    optimizer.set_basis(torch.full((3, 6), 10.0))  # neither orthogonal nor of length 1
    set_gradient(params, torch.full((6,), size))
    optimizer.add_patient()
    optimizer._project()
    summed = optimizer._coefficients.summed_grad
    assert summed.dtype == torch.float64
    assert float(summed.norm()) <= 0.25 * (1 + 1e-12)


def test_the_noise_lies_in_the_subspace_with_the_promised_deviation():
    params = parameters((50,))
    basis = torch.linalg.qr(torch.randn(50, 2, generator=torch.Generator().manual_seed(2))).Q.T
    seen = []
    for draw in range(400):
        optimizer = optimizer_of(params, dimensions=2, sigma=3.0, clip=0.5, expected=4.0, source=SeededNoise(draw))
        optimizer.set_basis(basis)
        optimizer.noised_gradient()
        gradient = gradient_of(params)
        coefficients = basis @ gradient
        assert torch.allclose(coefficients @ basis, gradient, atol=1e-5)
        seen += coefficients.tolist()
        optimizer.zero_grad()
    assert kstest(np.array(seen), "norm", args=(0, 3.0 * 0.5 / 4.0)).pvalue > 1e-3
    assert np.std(seen) == pytest.approx(0.375, rel=0.08)


def test_nothing_of_a_draw_is_left_for_the_next():
    params = parameters((4,))
    optimizer = optimizer_of(params, dimensions=1, source=Silent(0))
    optimizer.set_basis(torch.eye(4)[:1])
    for expected in (1.0, 0.0):
        if expected:
            set_gradient(params, torch.tensor([1.0, 5.0, 0.0, 0.0]))
            optimizer.add_patient()
        optimizer.noised_gradient()
        assert gradient_of(params).tolist() == [expected, 0, 0, 0]
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)


def test_a_basis_of_another_shape_or_none_is_refused():
    params = parameters((4,))
    optimizer = optimizer_of(params, dimensions=2)
    optimizer.add_patient()
    with pytest.raises(PrivacyError, match="basis before"):
        optimizer.noised_gradient()
    with pytest.raises(PrivacyError, match=r"\(2, 4\)"):
        optimizer.set_basis(torch.eye(4))


def test_it_serves_a_real_network():
    torch.manual_seed(0)
    network = build_segmenter(backbone="unet", width=4, depth=2, in_channels=4, out_channels=4)
    params = list(network.parameters())
    images, labels = torch.randn(3, 4, 8, 8, 8), torch.randint(0, 4, (3, 8, 8, 8))
    basis = public_basis(
        public_gradient(per_row_dice_ce(network(images[i : i + 1]), labels[i : i + 1]).sum(), params) for i in range(2)
    )
    optimizer = optimizer_of(params, dimensions=2, source=Silent(0), clip=1e9)
    optimizer.set_basis(basis)
    patient_gradient(lambda part: per_row_dice_ce(network(images[2:][part]), labels[2:][part]), 1, 1)
    whole = gradient_of(params)
    optimizer.add_patient()
    optimizer.noised_gradient()
    found = gradient_of(params)
    assert torch.allclose(found, (whole @ basis.T) @ basis, atol=1e-4 * float(whole.norm()))
    assert 0 < float(found.norm()) <= float(whole.norm()) * (1 + 1e-5)
    assert math.isfinite(float(found.norm()))


def test_the_public_share_grows_as_noise_drowns_the_patients():
    def share(sigma: float, expected: float, k: int = 64) -> float:
        return public_share(0.5, noise_multiplier=sigma, expected_patients=expected, dimensions=k)

    assert share(1.0, 16.0) == 0.5  # r = 2: noise of half the clip norm
    assert share(1.0, 1000.0) == 0.5
    assert share(2.0, 16.0) == 0.75  # r = 1
    assert share(1e6, 16.0) == pytest.approx(1.0, abs=1e-5)
    assert share(0.0, 16.0) == share(5.0, 16.0, k=0) == 0.5
    values = [share(sigma, 16.0) for sigma in (0.5, 1.0, 2.0, 4.0, 8.0)]
    assert values == sorted(values)
