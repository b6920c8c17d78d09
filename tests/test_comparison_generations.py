"""Teachers in generations: what goes down, what they start from, and that one generation is a plain run."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fediod_med.comparison.averaging import serialised_bytes
from fediod_med.comparison.bench import Bench
from fediod_med.comparison.generations import distil_generations, shares
from fediod_med.comparison.local import open_client
from fediod_med.comparison.profiles import get_profile
from fediod_med.comparison.run import make_plan
from fediod_med.comparison.smoke import write_smoke_sites
from fediod_med.comparison.students import Recipe, distil_row, recipe
from fediod_med.comparison.tasks import all_tasks, task_done
from fediod_med.comparison.work import perform
from fediod_med.errors import SettingsError
from fediod_med.sites import load_sites

SMOKE = get_profile("smoke")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """Hospitals of the first fold with their teachers."""
    folder = tmp_path_factory.mktemp("generations")
    sites = load_sites(write_smoke_sites(folder / "phantoms"))
    plan = make_plan(
        sites, out=folder / "out", profile=SMOKE, folds=2, seeds=[0], rows=["site:*"], data_name="phantoms"
    )
    tasks = [task for task in all_tasks(plan) if task.cell.fold == 0]
    for task in tasks:
        if not task_done(plan, task):
            perform(plan, task, "cpu")
    return Bench(plan, tasks[0].cell, "cpu")


def weights(network: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in network.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def row_of(generations: int, *, rounds: int) -> Recipe:
    plain = recipe("kd_phantoms", SMOKE)
    return dataclasses.replace(
        plain, generations=generations, schedule=dataclasses.replace(plain.schedule, rounds=rounds)
    )


@dataclass
class Diary:
    """A hospital that writes down what it is asked to train, and moves every weight by its own amount."""

    move: float
    steps: int = 7
    patients: int = 1
    parts: list[tuple[int, int]] = field(default_factory=list)
    starts: list[list[Tensor]] = field(default_factory=list)

    def train(self, network: nn.Module, *, first: int, last: int, rate: float, mu: float) -> None:
        self.parts.append((first, last))
        self.starts.append(weights(network))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(self.move)


def test_hospitals_share_their_steps_out_and_go_on_from_the_student(bench: Bench) -> None:
    start = bench.start()
    before = weights(start)
    clients = {name: Diary(move=0.01 * n) for n, name in enumerate(bench.plan.site_names, start=1)}
    found = distil_generations(
        row_of(3, rounds=6), bench.hospitals, clients, bench.sampler,
        start=start, key="diary", roi=SMOKE.roi, seed=0, device=CPU,
    )  # fmt: skip
    diaries = list(clients.values())
    for diary in diaries:
        assert diary.parts == [(0, 2), (2, 4), (4, 7)]
        assert equal(diary.starts[0], before)
        assert not equal(diary.starts[1], before) and not equal(diary.starts[2], diary.starts[1])
    assert equal(diaries[0].starts[1], diaries[1].starts[1])  # the student, and no hospital's own weights
    assert equal(diaries[0].starts[2], diaries[1].starts[2])
    assert equal(weights(start), before)
    assert not equal(weights(found.student), diaries[0].starts[2])


def test_a_generation_more_sends_the_student_down_once_and_no_weight_up(bench: Bench) -> None:
    clients = {name: Diary(move=0.01) for name in bench.plan.site_names}
    places = {"roi": SMOKE.roi, "seed": 0, "device": CPU}
    both = distil_generations(
        row_of(2, rounds=2), bench.hospitals, clients, bench.sampler, start=bench.start(), key="two", **places
    )
    one = distil_row(row_of(1, rounds=1), bench.hospitals, bench.sampler, key="two-0", start=bench.start(), **places)
    weight = serialised_bytes(bench.start())
    for name in bench.plan.site_names:
        assert both.bytes_down[name] == 2 * one.bytes_down[name] + weight
        assert both.bytes_up[name] == 2 * one.bytes_up[name] < weight


def test_one_generation_is_local_training_and_one_distillation(bench: Bench) -> None:
    clients = {
        site.site_name: open_client(site, site.subjects()[0], public=bench.sampler, device=CPU) for site in bench.sites
    }
    row, places = row_of(1, rounds=2), {"roi": SMOKE.roi, "seed": 0, "device": CPU}
    found = distil_generations(row, bench.hospitals, clients, bench.sampler, start=bench.start(), key="one", **places)
    taught = []
    for hospital in bench.hospitals:
        teacher, client = copy.deepcopy(bench.start()), clients[hospital.site.site_name]
        client.train(teacher, first=0, last=client.steps, rate=1.0, mu=0.0)
        taught.append(dataclasses.replace(hospital, teacher=teacher.eval()))
    plain = distil_row(row, taught, bench.sampler, key="one-0", **places)  # it starts from the public prior as well
    assert equal(weights(found.student), weights(plain.student))


@pytest.mark.parametrize("generations", [0, 3, 8])
def test_more_generations_than_rounds_or_steps_are_refused(bench: Bench, generations: int) -> None:
    clients = {name: Diary(move=0.0) for name in bench.plan.site_names}
    rounds = 2 if generations == 3 else 20
    with pytest.raises(SettingsError, match="generations: expected 1 to"):
        distil_generations(
            row_of(generations, rounds=rounds), bench.hospitals, clients, bench.sampler,
            start=bench.start(), key="many", roi=SMOKE.roi, seed=0, device=CPU,
        )  # fmt: skip
    assert all(not diary.parts for diary in clients.values())


def test_draws_of_generations_differ_and_the_first_are_the_samplers_own(bench: Bench) -> None:
    draws = [bench.sampler.reseeded(offset).draw(1, 4).base for offset in (0, 1)]
    assert torch.equal(draws[0], bench.sampler.draw(1, 4).base) and not torch.equal(*draws)


@given(st.integers(1, 7), st.integers(0, 400))
def test_shares_follow_one_another_and_none_is_empty(generations: int, more: int) -> None:
    parts = shares(generations + more, generations)
    assert len(parts) == generations and parts[0][0] == 0 and parts[-1][1] == generations + more
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    lengths = [last - first for first, last in parts]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
