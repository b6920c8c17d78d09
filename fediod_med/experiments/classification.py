"""The method on classification, as in the paper: many sites with unlike classes, a generator from noise alone.

Teachers, networks and data are other ones; `distill`, losses, ensemble, node and discriminator are the hospitals'.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fediod_med.comparison.averaging import AveragingPlan, federated_average, proximal_penalty
from fediod_med.data.layouts import Subject
from fediod_med.data.partitions import dirichlet
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.ensemble import merge
from fediod_med.experiments.images import ImageSet, check_size
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.networks import Generator, build_classifier
from fediod_med.privacy.gate import Gate
from fediod_med.teacher import cosine_rate

NOTHING = GeneratorObjective(
    gan=0.0, clarity=0.0, unique=0.0, mask=0.0, transfer=0.0, realism_weights=False, competence=0.0
)
"""A generator that is never trained: what the student learns from its noise is the control."""


@dataclass(frozen=True)
class Setup:
    """Sizes of one classification experiment.

    Attributes:
        sites: number of sites.
        local_steps: optimiser steps of a site's teacher, and of each site over all rounds of FedAvg.
        pooled_steps: of the classifier on all images together.
        batch: images a step.
        rate: peak learning rate of the sites' AdamW.
        averaging_rounds: of FedAvg.
        width: of classifiers, generator and discriminators.
        levels: of the classifiers.
        latent: length of the generator's noise.
        doublings: of the generator's edges.
        real_batch: real images a discriminator step.
        discriminator_rate: of the discriminators' Adam.
        objective: of the generator.
        schedule: of the distillation.
    """

    sites: int
    local_steps: int
    pooled_steps: int
    batch: int
    rate: float
    averaging_rounds: int
    width: int
    levels: int
    latent: int
    doublings: int
    real_batch: int
    discriminator_rate: float
    objective: GeneratorObjective
    schedule: Schedule


class ImageClient:
    """A site's own training, as federated averaging sees it (`comparison.averaging.Client`); also of a lone teacher."""

    def __init__(self, x: Tensor, y: Tensor, *, steps: int, batch: int, rate: float, seed: int) -> None:
        """Images `(N, S, H, W)` and labels `(N,)`; `steps`, `batch` and peak `rate` of AdamW; `seed` of the draws."""
        self._x, self._y, self._steps, self._batch, self._rate, self._seed = x, y, steps, batch, rate, seed

    @property
    def patients(self) -> int:
        """Images: the site's weight in the average."""
        return len(self._y)

    @property
    def steps(self) -> int:
        """Local optimiser steps of the whole training."""
        return self._steps

    def train(self, network: nn.Module, *, first: int, last: int, rate: float, mu: float) -> None:
        """Cross-entropy steps `first` (included) to `last` (left out), in place."""
        anchor = [p.detach().clone() for p in network.parameters()] if mu else []
        optimizer = torch.optim.AdamW(network.parameters(), lr=self._rate, weight_decay=1e-3, fused=True)
        network.train()
        for step in range(first, last):
            random = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
            chosen = torch.randint(len(self._y), (self._batch,), generator=random)
            for group in optimizer.param_groups:
                group["lr"] = self._rate * rate * cosine_rate(step, self._steps)
            loss = nn.functional.cross_entropy(network(self._x[chosen]), self._y[chosen])
            if mu:
                loss = loss + proximal_penalty(network, anchor, mu)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def split_among_sites(labels: Tensor, *, alpha: float, sites: int, seed: int) -> dict[str, list[int]]:
    """Indices of the images of each site: every class spread by Dirichlet(alpha) (`partitions.dirichlet`)."""
    subjects = [Subject(f"image-{i:06d}", {}) for i in range(len(labels))]
    parts = dirichlet(subjects, [int(label) for label in labels], alpha, sites, seed)
    return {name: [int(s.subject_id.removeprefix("image-")) for s in part] for name, part in parts.items()}


def run_cell(images: ImageSet, setup: Setup, *, alpha: float, seed: int, state: Path) -> dict[str, Any]:
    """Every row for one partition and one seed.

    Args:
        images: training part for the sites, test part for the scores.
        setup: sizes.
        alpha: of the Dirichlet distribution.
        seed: of partition, networks and draws.
        state: folder for the discriminators' snapshots.

    Returns:
        `rows`: for each row `accuracy` and `correct`, a text of 0 and 1 by test image; `sites`: images and accuracy of
        each; `bytes_up`, `bytes_down`: mean per site of the distillation.

    Raises:
        SettingsError: sizes that do not fit the images, or a partition that leaves a site empty.
    """
    check_size(images, setup.doublings)
    parts = split_among_sites(images.train_y, alpha=alpha, sites=setup.sites, seed=seed)
    start = _network(images, setup, seed * 1000 + 999)
    clients: dict[str, ImageClient] = {}
    teachers: dict[str, nn.Module] = {}
    for number, (name, index) in enumerate(parts.items()):
        clients[name] = _client(images, index, setup, setup.local_steps, seed * 1000 + number)
        teachers[name] = copy.deepcopy(start)
        clients[name].train(teachers[name], first=0, last=setup.local_steps, rate=1.0, mu=0.0)
    presence = {name: nn.functional.one_hot(images.train_y[i], images.classes).float() for name, i in parts.items()}
    counts = torch.stack([p.sum(dim=0) for p in presence.values()])

    answers = {name: _probabilities(teacher, images.test_x) for name, teacher in teachers.items()}
    averaged = federated_average(start, clients, AveragingPlan(rounds=setup.averaging_rounds))
    pooled = copy.deepcopy(start)
    everything = _client(images, list(range(len(images.train_y))), setup, setup.pooled_steps, seed * 1000 + 998)
    everything.train(pooled, first=0, last=setup.pooled_steps, rate=1.0, mu=0.0)

    rows = {
        "ensemble": merge(torch.stack(list(answers.values())), counts),
        "fedavg": _probabilities(averaged, images.test_x),
        "pooled": _probabilities(pooled, images.test_x),
    }
    traffic: dict[str, float] = {}
    for row, objective in (("student", setup.objective), ("untrained_generator", NOTHING)):
        nodes = {
            name: _node(name, images, parts[name], teachers[name], presence[name], setup, seed, state / row / name)
            for name in parts
        }
        federation = EmbeddedFederation(nodes)
        student = _distilled(federation, images, setup, objective, seed=seed, run_id=row.replace("_", "-"))
        rows[row] = _probabilities(student, images.test_x)
        if row == "student":
            traffic = {
                "bytes_up": sum(federation.bytes_up.values()) / len(parts),
                "bytes_down": sum(federation.bytes_down.values()) / len(parts),
            }
    return {
        "alpha": alpha,
        "seed": seed,
        "rows": {name: _scored(probs, images.test_y) for name, probs in rows.items()},
        "sites": {
            name: {"images": len(parts[name]), "accuracy": _scored(probs, images.test_y)["accuracy"]}
            for name, probs in answers.items()
        },
        **traffic,
    }


def _network(images: ImageSet, setup: Setup, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_classifier(images.shape, images.classes, width=setup.width, levels=setup.levels)


def _client(images: ImageSet, index: Sequence[int], setup: Setup, steps: int, seed: int) -> ImageClient:
    x, y = images.train_x[list(index)], images.train_y[list(index)]
    return ImageClient(x, y, steps=steps, batch=setup.batch, rate=setup.rate, seed=seed)


def _node(
    name: str,
    images: ImageSet,
    index: Sequence[int],
    teacher: nn.Module,
    presence: Tensor,
    setup: Setup,
    seed: int,
    state: Path,
) -> SiteNode:
    device = torch.device("cpu")
    critic = PlainCritic(
        name,
        list(images.train_x[list(index)]),
        state_dir=state,
        seed=seed,
        device=device,
        batch=setup.real_batch,
        width=setup.width,
        layers=1,
        learning_rate=setup.discriminator_rate,
        sequences=images.shape[0],
        spatial_dims=2,
        mirrored=False,
    )
    return SiteNode(
        name,
        teacher,
        presence,
        critic=critic,
        gate=Gate.unprotected(name),
        device=device,
        sequences=images.shape[0],
        spatial_dims=2,
    )


def _distilled(
    federation: EmbeddedFederation,
    images: ImageSet,
    setup: Setup,
    objective: GeneratorObjective,
    *,
    seed: int,
    run_id: str,
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(
            "unconditional",
            size=images.shape[1],
            width=setup.width,
            latent=setup.latent,
            sequences=images.shape[0],
            spatial_dims=2,
            doublings=setup.doublings,
        )
    state = distill(
        federation,
        student=_network(images, setup, seed * 1000 + 997),
        generator=generator,
        sampler=None,
        objective=objective,
        schedule=setup.schedule,
        size=images.shape[1],
        seed=seed,
        run_id=run_id,
        device=torch.device("cpu"),
    )
    averaged: nn.Module = state.student_average.module
    return averaged


def _probabilities(network: nn.Module, x: Tensor) -> Tensor:
    """`(N, C)`, in evaluation mode, a thousand images at a time."""
    network.eval()
    with torch.no_grad():
        return torch.cat([torch.softmax(network(part), dim=1) for part in x.split(1000)])


def _scored(probs: Tensor, labels: Tensor) -> Mapping[str, Any]:
    correct = probs.argmax(dim=1) == labels
    return {
        "accuracy": float(correct.float().mean()),
        "correct": "".join("1" if hit else "0" for hit in correct.tolist()),
    }
