"""Teachers in generations: hospitals train on from the student, and it is distilled from them again.

The idea of federated averaging, whose gain over one average comes from training on after averaging, without its price:
the centre's student goes down, and no weight of a hospital comes up. Local steps and student updates are those of one
generation, cut into parts. Each generation is a distillation of its own: generator, discriminators, replay, weights by
Dice and the student's learning rate begin anew, and the centre's noise is the same; the phantoms are others. Teachers
have the student's network here, whatever `--teachers` says. Distillation in place of averaging: FedDF (Lin et al.
2020, arXiv 2006.07242), which has weights come up.
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
from fediod_med.errors import SettingsError
from fediod_med.hospitals import Hospital

OTHER_DRAWS = 7_919  # between the seeds of the phantoms drawn in two generations


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
    rounds = shares(row.schedule.rounds, row.generations)
    steps = {name: shares(client.steps, row.generations) for name, client in clients.items()}
    student, down, up = copy.deepcopy(start), Counter[str](), Counter[str]()
    for number, (begin, end) in enumerate(rounds):
        taught = []
        for hospital in hospitals:
            name, teacher = hospital.site.site_name, copy.deepcopy(student)
            first, last = steps[name][number]
            clients[name].train(teacher, first=first, last=last, rate=1.0, mu=0.0)
            taught.append(dataclasses.replace(hospital, teacher=teacher.eval()))
        if number:
            down.update(dict.fromkeys(clients, serialised_bytes(student)))
        found = distil_row(
            dataclasses.replace(row, schedule=dataclasses.replace(row.schedule, rounds=end - begin)),
            taught,
            sampler.reseeded(OTHER_DRAWS * number),
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


def shares(total: int, generations: int) -> list[tuple[int, int]]:
    """The parts `(first, last)` of `range(total)` that each generation does; together they do it all.

    Raises:
        SettingsError: fewer than one generation, or more than there is to share.
    """
    if not 1 <= generations <= total:
        raise SettingsError(f"generations: expected 1 to {total} (rounds, and local steps), found {generations}")
    return [(total * number // generations, total * (number + 1) // generations) for number in range(generations)]
