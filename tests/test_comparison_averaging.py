"""Federated averaging: exact means, and FedProx between FedAvg and standing still."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fediod_med.comparison.averaging import (
    AveragingPlan,
    federated_average,
    proximal_penalty,
    serialised_bytes,
    weighted_average,
)
from fediod_med.errors import SettingsError


class Regression:
    """A hospital with a linear regression; the target is its own."""

    def __init__(self, patients: int, target: float, steps: int = 40) -> None:
        self.patients = patients
        self.steps = steps
        self._target = target

    def train(self, network: nn.Module, *, first: int, last: int, rate: float, mu: float) -> None:
        anchor = [p.detach().clone() for p in network.parameters()]
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01 * rate)
        x = torch.eye(3)
        for _ in range(first, last):
            loss = (network(x) - self._target).square().mean() + proximal_penalty(network, anchor, mu)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.fixture
def start() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_average_of_two_known_networks_is_their_weighted_mean() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}, {"w": torch.tensor([5.0, -2.0]), "n": torch.tensor(3)}
    mean = weighted_average([a, b], [3, 1])
    assert torch.equal(mean["w"], torch.tensor([2.0, 1.0]))
    assert mean["n"] == 3 and mean["w"].dtype == torch.float32


def test_averaging_refuses_unlike_networks_and_no_weight() -> None:
    with pytest.raises(SettingsError, match="architecture"):
        weighted_average([nn.Linear(2, 1).state_dict(), nn.Linear(3, 1).state_dict()], [1, 1])
    with pytest.raises(SettingsError, match="weight"):
        weighted_average([nn.Linear(2, 1).state_dict()], [0])


def test_equal_clients_are_one_client(start) -> None:
    plan = AveragingPlan(rounds=4)
    one = federated_average(start, {"a": Regression(5, 1.0)}, plan)
    many = federated_average(start, {n: Regression(5, 1.0) for n in "abc"}, plan)
    for x, y in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_one_client_in_rounds_takes_the_steps_of_one_training(start) -> None:
    client = Regression(1, 2.0, steps=7)
    alone = copy.deepcopy(start)
    client.train(alone, first=0, last=7, rate=1.0, mu=0.0)
    assert equal(federated_average(start, {"a": client}, AveragingPlan(rounds=3)), alone.eval())


def test_larger_hospitals_pull_harder(start) -> None:
    network = federated_average(start, {"a": Regression(9, 1.0, 2000), "b": Regression(1, 0.0, 2000)}, AveragingPlan(4))
    assert network(torch.eye(3)).detach().flatten().tolist() == pytest.approx([0.9] * 3, abs=0.01)


def test_fedprox_without_mu_is_fedavg_and_a_huge_mu_stays(start) -> None:
    clients = {"a": Regression(1, 5.0, 200), "b": Regression(2, -5.0, 200)}

    def moved(mu: float) -> float:
        network = federated_average(start, clients, AveragingPlan(rounds=2, mu=mu))
        pairs = zip(network.parameters(), start.parameters(), strict=True)
        return max(float((p - q).detach().abs().max()) for p, q in pairs)

    plain = federated_average(start, clients, AveragingPlan(rounds=2))
    assert equal(federated_average(start, clients, AveragingPlan(rounds=2, mu=0.0)), plain)
    distances = [moved(mu) for mu in (0.0, 1.0, 100.0)]
    assert distances == sorted(distances, reverse=True) and distances[2] < 0.1 * distances[0]


def test_the_start_is_left_alone_and_rounds_fit_the_steps(start) -> None:
    before = copy.deepcopy(start)
    federated_average(start, {"a": Regression(1, 1.0)}, AveragingPlan(rounds=2))
    assert equal(before, start)
    with pytest.raises(SettingsError, match="rounds"):
        federated_average(start, {"a": Regression(1, 1.0, steps=3)}, AveragingPlan(rounds=4))


def test_bytes_are_those_of_the_serialised_weights(start) -> None:
    payload = sum(4 * t.numel() for t in start.state_dict().values())
    assert payload < serialised_bytes(start) < payload + 400
