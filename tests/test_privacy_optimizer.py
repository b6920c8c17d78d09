from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from torch import nn

from fediod_med.errors import PrivacyError
from fediod_med.networks import PatchDiscriminator, build_segmenter
from fediod_med.privacy.noise import OsNoise, SeededNoise
from fediod_med.privacy.optimizer import PatientOptimizer, clip_factor, patient_gradient, public_gradient
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.trainable import trainable_parameters


class Silence:
    """A noise source that adds none; only for looking at the sum itself."""

    insecure = True

    def normal(self, shape):
        return np.zeros(shape)

    def uniform(self, shape):
        return np.full(shape, 0.5)


def optimizer_of(parameters, *, sigma=1.0, C=1.0, expected=1.0, source=None):
    return PatientOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=sigma,
        clip_norm=C,
        expected_patients=expected,
        source=source,
    )


def flat(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


def parameter(size=3):
    return nn.Parameter(torch.zeros(size))


def add(optimizer, p, gradient):
    p.grad = torch.as_tensor(gradient, dtype=torch.float32)
    return optimizer.add_patient()


def segmenter_loss(logits):
    classes = (torch.arange(logits[0, 0].numel()) % 4).reshape(logits.shape[2:]).expand(len(logits), -1, -1, -1)
    return per_row_dice_ce(logits, classes)


def patch_loss(logits):
    return torch.relu(1 - logits).flatten(1).mean(1)


def losses_of(network, loss, rows, part):
    return loss(network(rows[part]))


def without_in_place(network):
    """Opacus' hooks fail on activations in place and on SegResNet's residual `+=`: rewrite both, to compare."""
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
        if type(module).__name__ == "ResBlock":

            def forward(x, block=module):
                y = block.conv1(block.act(block.norm1(x)))
                return block.conv2(block.act(block.norm2(y))) + x

            module.forward = forward
    return network


NETWORKS = {
    "unet": (lambda: build_segmenter("unet", width=4, depth=3), segmenter_loss),
    "segresnet": (lambda: build_segmenter("segresnet", width=8, depth=2), segmenter_loss),
    "instance": (lambda: PatchDiscriminator(width=4, layers=1, norm="INSTANCE"), patch_loss),
    "group": (lambda: PatchDiscriminator(width=4, layers=1, norm="GROUP"), patch_loss),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_clipped_sum_equals_the_one_from_opacus_per_sample_gradients(name):
    """Two routes: Opacus' hooks on the whole batch, and one patient after the other. Clipping bites in both."""
    build, loss = NETWORKS[name]
    torch.manual_seed(0)
    network, C = build(), 0.05
    x = torch.randn(3, 2, 4, 16, 16, 16)  # 3 patients, 2 crops
    hooked = GradSampleModule(without_in_place(network), loss_reduction="sum")
    # A module hook fires as Opacus expects only when its input needs a gradient.
    loss(hooked(x.flatten(0, 1).requires_grad_())).sum().backward()
    samples = [p.grad_sample.reshape(3, 2, *p.shape).mean(1) for p in hooked.parameters()]
    norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples]).norm(dim=0)
    factors = (C / norms).clamp(max=1)
    assert bool((factors < 1).any())
    expected = torch.cat([torch.einsum("i,i...", factors, s).flatten() for s in samples])
    hooked.remove_hooks()

    network.zero_grad(set_to_none=True)
    parameters = trainable_parameters(network)
    optimizer = optimizer_of(parameters, C=C, source=Silence())
    for patient, norm in zip(x, norms, strict=True):
        patient_gradient(partial(losses_of, network, loss, patient), 2, physical_batch=1)
        assert optimizer.add_patient() == pytest.approx(float(norm), rel=1e-4)
    optimizer.noised_gradient()
    torch.testing.assert_close(flat(parameters), expected, rtol=1e-4, atol=1e-6)


def test_dynunet_gives_one_by_one_gradients_too():
    """Opacus' hooks cannot run it; plain autograd on each row is the second route."""
    network = build_segmenter("dynunet", width=4, depth=3)
    parameters = trainable_parameters(network)
    x = torch.randn(2, 4, 16, 16, 16)
    expected = torch.zeros(sum(p.numel() for p in parameters))
    for row in x:
        loss = segmenter_loss(network(row[None])).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        expected += gradient * min(1, 0.1 / float(gradient.norm()))
    optimizer = optimizer_of(parameters, C=0.1, source=Silence())
    for row in x:
        patient_gradient(partial(losses_of, network, segmenter_loss, row[None]), 1, 4)
        optimizer.add_patient()
    optimizer.noised_gradient()
    torch.testing.assert_close(flat(parameters), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("physical", [1, 2, 3, 8])
def test_the_gradient_of_a_patient_does_not_depend_on_the_physical_batch(physical):
    p = parameter()
    rows = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 6]])
    patient_gradient(lambda part: rows[part] @ p, 3, physical)
    assert p.grad.tolist() == pytest.approx([1 / 3, 2 / 3, 2])


def test_the_crops_of_a_patient_are_clipped_together():
    """Clipped apart, two opposite crops of norm 1 would each count; together they are one patient of norm at most C."""
    p = parameter(2)
    optimizer = optimizer_of([p], C=0.5, source=Silence())
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    patient_gradient(lambda part: rows[part] @ p, 2, 8)
    assert optimizer.add_patient() == pytest.approx(2.5)
    optimizer.noised_gradient()
    assert p.grad.tolist() == pytest.approx([0.3, 0.4])  # norm .5, not the .707 of two crops


def test_all_parameters_are_clipped_by_one_norm():
    a, b = parameter(1), parameter(1)
    optimizer = optimizer_of([a, b], source=Silence())
    a.grad, b.grad = torch.tensor([30.0]), torch.tensor([40.0])
    optimizer.add_patient()
    optimizer.noised_gradient()
    assert [a.grad.item(), b.grad.item()] == pytest.approx([0.6, 0.8])


def test_a_small_gradient_is_left_as_it_is():
    p = parameter(2)
    optimizer = optimizer_of([p], source=Silence())
    add(optimizer, p, [0.25, -0.5])
    optimizer.noised_gradient()
    assert p.grad.tolist() == [0.25, -0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_a_null_patient(bad):
    p = parameter(2)
    optimizer = optimizer_of([p], source=Silence())
    add(optimizer, p, [bad, 1.0])
    add(optimizer, p, [0.5, 0.0])
    optimizer.noised_gradient()
    assert p.grad.tolist() == [0.5, 0.0]


def test_a_huge_gradient_does_not_escape_through_overflow():
    p = parameter(2)
    optimizer = optimizer_of([p], source=Silence())
    add(optimizer, p, [3e38, 3e38])  # its squares overflow float32
    optimizer.noised_gradient()
    assert p.grad.tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_a_null_patient_without_rows_adds_nothing():
    p = parameter(2)
    optimizer = optimizer_of([p], source=Silence())
    patient_gradient(lambda part: p.sum()[None], 0, 4)
    assert optimizer.add_patient() == 0
    optimizer.noised_gradient()
    assert p.grad.tolist() == [0, 0]


def test_the_denominator_is_constant():
    """Dividing by the number drawn would give .5 for both draws."""
    for drawn, expected in ((1, 0.125), (3, 0.375), (0, 0.0)):
        p = parameter(1)
        optimizer = optimizer_of([p], expected=4.0, source=Silence())
        for _ in range(drawn):
            add(optimizer, p, [0.5])
        optimizer.noised_gradient()
        assert p.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_the_noise_has_the_promised_deviation_whatever_was_drawn(drawn):
    """std = sigma C / (q n); 40000 coordinates estimate it to .35 % (one sigma), so 2 % finds any factor of note."""
    p = parameter(40_000)
    optimizer = optimizer_of([p], sigma=1.5, C=2.0, expected=4.0)
    for _ in range(drawn):
        add(optimizer, p, torch.zeros(40_000))
    optimizer.noised_gradient()
    assert float(p.grad.std()) == pytest.approx(1.5 * 2.0 / 4.0, rel=0.02)
    assert abs(float(p.grad.mean())) < 5 * 0.75 / 200


def test_the_noise_is_new_in_every_run_even_after_the_same_seed():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        p = parameter(8)
        optimizer = optimizer_of([p])
        optimizer.noised_gradient()
        found.append(p.grad.clone())
    assert not torch.equal(*found)
    assert not OsNoise().insecure and SeededNoise(0).insecure


def test_a_step_hook_of_opacus_is_called_once_per_step_with_the_sampling_rate_as_it_is():
    accountant = RDPAccountant()
    p = parameter(2)
    optimizer = optimizer_of([p], sigma=2.0)
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.25))
    for drawn in (3, 0, 1):
        for _ in range(drawn):
            add(optimizer, p, [1.0, 0.0])
        optimizer.noised_gradient()
        optimizer.descend()
    assert accountant.history == [(2.0, 0.25, 3)]


def test_nothing_of_a_draw_is_left_for_the_next():
    p = parameter(1)
    optimizer = optimizer_of([p], source=Silence())
    add(optimizer, p, [1.0])
    optimizer.noised_gradient()
    optimizer.descend()
    assert p.item() == -1
    optimizer.noised_gradient()
    assert p.grad.item() == 0


def test_a_public_gradient_is_clipped_and_mixed_in_after_the_noise():
    p = parameter(2)
    optimizer = optimizer_of([p], C=1.0, expected=2.0, source=Silence())
    add(optimizer, p, [1.0, 0.0])
    optimizer.noised_gradient()
    optimizer.add_public([torch.tensor([0.0, 8.0])], weight=0.25)
    assert p.grad.tolist() == pytest.approx([0.75 * 0.5, 0.25 * 1.0])


def test_public_gradients_are_zero_where_the_loss_does_not_reach():
    a, b = parameter(1), parameter(1)
    assert [g.item() for g in public_gradient((3 * a).sum(), [a, b])] == [3, 0]
    assert a.grad is None


def test_a_loss_that_is_reduced_over_rows_is_refused():
    p = parameter()
    with pytest.raises(PrivacyError, match=r"one loss per row, shape \(2,\), found \(\)"):
        patient_gradient(lambda part: p.sum(), 2, 4)


@pytest.mark.parametrize("numbers", [{"sigma": -1.0}, {"C": 0.0}, {"expected": 0.0}, {"C": math.nan}])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(PrivacyError, match="expected a noise multiplier"):
        optimizer_of([parameter()], **numbers)


@pytest.mark.parametrize(("norm", "expected"), [(0.5, 1), (1, 1), (4, 0.25), (math.nan, 0), (math.inf, 0)])
def test_clip_factor(norm, expected):
    assert clip_factor(norm, 1.0) == expected
