from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.errors import BudgetExceeded, PrivacyError
from fediod_med.networks import PatchDiscriminator
from fediod_med.privacy.discriminator import DiscriminatorPlan, PrivateDiscriminator
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.noise import SeededNoise


class Everyone(SeededNoise):
    """Silent normals; everybody is drawn."""

    def __init__(self):
        super().__init__(0)

    def normal(self, shape):
        return np.zeros(shape)

    def uniform(self, shape):
        return np.full(shape, 1e-12)


class Linear(nn.Module):
    def __init__(self, size=2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x @ self.weight


def build(network=None, *, sigma=1.0, q=0.5, steps=3, patients=4, source=None, journal=None, **settings):
    return PrivateDiscriminator(
        Linear() if network is None else network,
        DiscriminatorPlan(Mechanism(sigma, q, steps), **settings),
        patients=patients,
        real_loss=lambda logits: torch.relu(1 - logits).flatten(1).mean(1) if logits.dim() > 1 else -logits,
        fake_loss=lambda logits: torch.relu(1 + logits).mean() if logits.dim() > 1 else logits.mean(),
        source=source,
        journal=journal,
    )


def gradient_seen(discriminator, fake, draw):
    """What Adam receives: caught before it moves the weights."""
    seen = []
    optimizer = discriminator._optimizer.original_optimizer
    handle = optimizer.register_step_pre_hook(
        lambda o, *_: seen.append(torch.cat([p.grad.flatten() for g in o.param_groups for p in g["params"]]))
    )
    discriminator.update(fake, draw)
    handle.remove()
    return seen[0]


def test_the_real_half_is_clipped_per_patient_over_q_n_and_the_synthetic_half_added():
    discriminator = build(source=Everyone(), clip_norm=2.0)
    real = torch.tensor([[[-8.0, 0], [-8.0, 0]], [[0, -1.0], [0, -1.0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]])
    fake = torch.tensor([[0.0, 1.0]])
    # Real: patient 0 is clipped from 8 to 2, patient 1 kept at 1; over q n = 2. Each half counts one half.
    found = gradient_seen(discriminator, fake, lambda i: real[i])
    assert found.tolist() == pytest.approx([0.5 * 2 / 2, 0.5 * 1 / 2 + 0.5 * 1])


def test_only_the_real_half_is_noised_with_the_promised_deviation():
    size = 40_000
    discriminator = build(Linear(size), sigma=2.0, q=1e-12, patients=5, clip_norm=1.5)
    found = gradient_seen(discriminator, torch.zeros(1, size), lambda i: torch.zeros(1, size))
    assert float(found.std()) * (1e-12 * 5) == pytest.approx(0.5 * 2.0 * 1.5, rel=0.02)


@pytest.mark.parametrize("norm", ["INSTANCE", "GROUP"])
def test_synthetic_rows_do_not_enter_the_real_half(norm):
    """The sum over patients is the same whatever the centre sends along."""
    torch.manual_seed(0)
    state = PatchDiscriminator(width=4, layers=1, norm=norm).state_dict()
    real = torch.randn(4, 2, 4, 16, 16, 16)
    sums = []
    for scale in (0.1, 30):
        network = PatchDiscriminator(width=4, layers=1, norm=norm)
        network.load_state_dict(state)
        discriminator = build(network, source=Everyone())
        seen: list[torch.Tensor] = []
        discriminator._optimizer.attach_step_hook(
            lambda o, seen=seen: seen.append(torch.cat([p.grad.flatten() for p in o.params]))
        )
        discriminator.update(scale * torch.randn(3, 4, 16, 16, 16), lambda i: real[i])
        sums.append(seen[0])
    assert torch.equal(*sums)
    assert float(sums[0].norm()) > 0


def test_it_freezes_when_its_updates_are_spent_and_touches_nobody():
    touched: list[int] = []

    def draw(index):
        touched.append(index)
        return torch.ones(1, 2)

    discriminator = build(steps=2, source=Everyone())
    for left in (2, 1):
        assert discriminator.remaining == left
        discriminator.update(torch.zeros(1, 2), draw)
    before, count = discriminator.network.weight.clone(), len(touched)
    with pytest.raises(BudgetExceeded, match="all 2 charged updates are made"):
        discriminator.update(torch.zeros(1, 2), draw)
    assert torch.equal(discriminator.network.weight, before)
    assert len(touched) == count


def test_an_update_is_journalled_before_a_patient_is_touched():
    events: list[str] = []

    def draw(index):
        events.append("patient")
        return torch.ones(1, 2)

    discriminator = build(source=Everyone(), patients=1, journal=lambda number: events.append(f"update {number}"))
    discriminator.update(torch.zeros(1, 2), draw)
    discriminator.update(torch.zeros(1, 2), draw)
    assert events == ["update 1", "patient", "update 2", "patient"]


def test_an_update_lost_in_a_crash_stays_counted(tmp_path):
    discriminator = build(steps=3, source=Everyone())
    discriminator.update(torch.zeros(1, 2), lambda _: torch.ones(1, 2))
    save_state(tmp_path / "d.pt", discriminator.state_dict())
    again = build(steps=3, source=Everyone())
    again.load_state_dict(load_state(tmp_path / "d.pt"), journalled=2)
    assert again.updates == 2 and again.remaining == 1
    assert torch.equal(again.network.weight, discriminator.network.weight)
    # An older snapshot cannot give updates back.
    again.load_state_dict(load_state(tmp_path / "d.pt"))
    assert again.remaining == 1


def test_it_learns_to_tell_bright_from_dark_volumes():
    torch.manual_seed(0)
    discriminator = build(
        PatchDiscriminator(width=4, layers=1), sigma=0.05, q=0.5, steps=30, patients=8, learning_rate=5e-3
    )
    noise = torch.randn(8, 1, 4, 16, 16, 16)
    for _ in range(30):
        discriminator.update(torch.randn(2, 4, 16, 16, 16), lambda i: noise[i] + 2)
    with torch.no_grad():
        real, fake = discriminator.network(noise[:, 0] + 2).mean(), discriminator.network(noise[:, 0]).mean()
    assert real > fake + 0.5


def test_a_network_that_mixes_patients_or_a_site_without_patients_is_refused():
    with pytest.raises(PrivacyError, match="mixes patients"):
        build(nn.Sequential(nn.Conv3d(4, 1, 1), nn.BatchNorm3d(1)))
    with pytest.raises(PrivacyError, match="at least one patient"):
        build(patients=0)
