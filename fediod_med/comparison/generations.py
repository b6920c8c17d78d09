"""Teachers in generations: hospitals train on from the student, and it is distilled from them again.

The idea of federated averaging, whose gain over one average comes from training on after averaging, without its price:
the centre's student goes down, and no weight of a hospital comes up. Local steps and student updates are those of one
generation, cut into parts. Distillation in place of averaging: FedDF (Lin et al. 2020, arXiv 2006.07242), which has
weights come up.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fediod_med.comparison.averaging import Client, serialised_bytes
from fediod_med.comparison.students import Distilled, Recipe, distil_row
from fediod_med.data.sampler import PublicSampler
from fediod_med.generation import Generation
from fediod_med.hospitals import Hospital


def distil_generations(
    row: Recipe,
    hospitals: Sequence[Hospital],
    clients: Mapping[str, Client],
    sampler: PublicSampler,
    *,
    start: nn.Module,
    key: str,
    roi: int,
    seed: int,
    device: torch.device,
) -> Distilled:
    """Train teachers and student in `row.generations` generations.

    Args:
        row: with its number of generations; rounds are spread evenly over them.
        hospitals: as for `students.distil_row`; their own teachers are not used.
        clients: local training of each hospital, by name.
        sampler: phantoms; each generation draws others from its pool.
        start: the public prior, from which the first teachers and the first student start; stays as it is.
        key: of the row.
        roi: edge of a synthetic volume, voxels.
        seed: of the centre and of the discriminators.
        device: where centre and hospitals compute.

    Returns:
        The last student; bytes down include the student's weights, once for each generation but the first.

    Raises:
        SettingsError: fewer generations than 1, or more than there are rounds or local steps.
    """
    generations = [Generation(number, row.generations) for number in range(1, max(1, row.generations) + 1)]
    rounds = [generation.share(row.schedule.rounds) for generation in generations]
    steps = {name: [generation.share(client.steps) for generation in generations] for name, client in clients.items()}
    student, down, up = copy.deepcopy(start), Counter[str](), Counter[str]()
    for number, generation in enumerate(generations):
        taught = []
        for hospital in hospitals:
            name, teacher = hospital.site.site_name, copy.deepcopy(student)
            first, last = steps[name][number]
            clients[name].train(teacher, first=first, last=last, rate=1.0, mu=0.0)
            taught.append(dataclasses.replace(hospital, teacher=teacher.eval()))
        if number:
            down.update(dict.fromkeys(clients, serialised_bytes(student)))
        first, last = rounds[number]
        found = distil_row(
            dataclasses.replace(row, schedule=dataclasses.replace(row.schedule, rounds=last - first)),
            taught,
            sampler.reseeded(generation.reseed),
            key=f"{key}-{number}",
            roi=roi,
            seed=seed,
            device=device,
            start=student,
        )
        student = found.student
        down.update(found.bytes_down)
        up.update(found.bytes_up)
    return Distilled(student, dict(down), dict(up))
