"""Training of the public prior: it learns, returns the average, and repeats exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fediod_med.data.phantoms import Grid, load_anatomy
from fediod_med.data.sampler import PublicSampler
from fediod_med.networks import build_segmenter
from fediod_med.prior import train_prior

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sampler() -> PublicSampler:
    return PublicSampler(spacing=12, roi=16, count=4, seed=3, anatomy=load_anatomy(Grid((16, 16, 16), 12.0)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_segmenter("unet", width=8, depth=2)


def train(
    net: nn.Module, samplers: list[PublicSampler], losses: list[float], steps: int = 5, ema: float = 0.9
) -> nn.Module:
    return train_prior(
        net,
        samplers,
        steps=steps,
        batch=2,
        learning_rate=5e-3,
        seed=1,
        device=CPU,
        ema=ema,
        on_step=lambda _, loss: losses.append(loss),
    )


def test_the_loss_falls_on_phantoms(sampler: PublicSampler) -> None:
    losses: list[float] = []
    train(network(), [sampler], losses, steps=60)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_the_average_is_returned_in_evaluation_mode(sampler: PublicSampler) -> None:
    net = network()
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    averaged = train(net, [sampler], [], steps=1, ema=0.9)
    assert averaged is not net and not averaged.training
    assert all(
        torch.equal(a, b) for a, b in zip(averaged.state_dict().values(), net.state_dict().values(), strict=True)
    )
    later = train(network(), [sampler], [], steps=8, ema=0.99)
    live = network()
    train(live, [sampler], [], steps=8, ema=0.0)
    moved = [
        (float((later.state_dict()[n] - start[n]).norm()), float((live.state_dict()[n] - start[n]).norm()))
        for n in start
    ]
    assert sum(a for a, _ in moved) < 0.7 * sum(b for _, b in moved)


def test_training_repeats_exactly_whatever_else_draws_random_numbers(sampler: PublicSampler) -> None:
    first = train(network(), [sampler], [])
    net = network()
    torch.rand(17)
    second = train(net, [sampler], [])
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_samplers_take_turns(sampler: PublicSampler) -> None:
    other = PublicSampler(spacing=12, roi=8, count=1, seed=4, anatomy=load_anatomy(Grid((16, 16, 16), 12.0)))
    net = network()
    shapes: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[-1]))
    train(net, [sampler, other], [], steps=4)
    assert shapes == [8, 16, 8, 16]
