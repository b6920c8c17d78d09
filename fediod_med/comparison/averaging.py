"""Federated training by averaging weights: FedAvg, FedProx and the one-shot average.

FedAvg: McMahan et al. 2017 (arXiv 1602.05629), algorithm 1, weights by number of patients. FedProx: Li et al. 2020
(arXiv 1812.06127), equation 2. All hospitals take part in every round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fediod_med.errors import SettingsError


@dataclass(frozen=True)
class AveragingPlan:
    """How the local compute of the hospitals is cut into rounds.

    Attributes:
        rounds: exchanges of weights; each hospital's local steps are spread evenly over them.
        rate: factor on each hospital's own peak learning rate.
        mu: weight of FedProx's proximal term; 0 is FedAvg.
    """

    rounds: int
    rate: float = 1.0
    mu: float = 0.0


class Client(Protocol):
    """A hospital as federated averaging sees it."""

    @property
    def patients(self) -> int:
        """Its weight in the average."""

    @property
    def steps(self) -> int:
        """Local optimiser steps of the whole training."""

    def train(self, network: nn.Module, *, first: int, last: int, rate: float, mu: float) -> None:
        """Train `network` in place: steps `first` (included) to `last` (left out) of the schedule.

        `rate` is a factor on the peak learning rate, `mu` pulls towards the weights that the network comes with.
        """


def weighted_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """`sum_k w_k state_k / sum_k w_k`, entry by entry, summed in float64 and returned in the entry's own dtype.

    Args:
        states: `state_dict` of each network.
        weights: non-negative, one per network.

    Raises:
        SettingsError: nothing to average, weights that do not fit, or networks of different architectures.
    """
    total = float(sum(weights))
    if not states or len(states) != len(weights) or min(weights) < 0 or total <= 0:
        raise SettingsError(f"average: expected one non-negative weight per network, found {len(states)} and {weights}")
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(found != shapes[0] for found in shapes):
        raise SettingsError("average: expected networks of one architecture, found different names or shapes")
    averaged: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if not first.is_floating_point():  # a counter, equal at all hospitals
            averaged[name] = first.clone()
            continue
        mean = sum(state[name].double() * (weight / total) for state, weight in zip(states, weights, strict=True))
        averaged[name] = torch.as_tensor(mean).to(first.dtype)
    return averaged


def federated_average(
    start: nn.Module,
    clients: Mapping[str, Client],
    plan: AveragingPlan,
    *,
    on_round: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """FedAvg or FedProx from the weights of `start`, which stays as it is.

    Args:
        start: the warm start that every hospital receives in the first round.
        clients: hospitals by name.
        plan: rounds, rate and mu.
        on_round: receives (round, rounds).

    Returns:
        The global network after the last round, in evaluation mode.

    Raises:
        SettingsError: no hospital, or more rounds than a hospital has local steps.
    """
    fewest = min((client.steps for client in clients.values()), default=0)
    if not 1 <= plan.rounds <= fewest:
        raise SettingsError(
            f"averaging: expected 1 to {fewest} rounds (local steps of a hospital), found {plan.rounds}"
        )
    network = copy.deepcopy(start)
    for number in range(plan.rounds):
        states, sizes = [], []
        for client in clients.values():
            local = copy.deepcopy(network)
            first, last = (client.steps * n // plan.rounds for n in (number, number + 1))
            client.train(local, first=first, last=last, rate=plan.rate, mu=plan.mu)
            states.append(local.state_dict())
            sizes.append(float(client.patients))
        network.load_state_dict(weighted_average(states, sizes))
        if on_round is not None:
            on_round(number + 1, plan.rounds)
    return network.eval()


def proximal_penalty(network: nn.Module, anchor: Sequence[Tensor], mu: float) -> Tensor:
    """`mu / 2 * ||w - w_global||^2` over all parameters; `anchor` are the global ones in the same order."""
    squares = [(p - a).square().sum() for p, a in zip(network.parameters(), anchor, strict=True)]
    return mu / 2 * torch.stack(squares).sum()


def serialised_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights as one safetensors message, float32 as trained."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
    return len(save(tensors))
