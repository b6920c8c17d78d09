"""Discriminators of a run, read back from where plain and private critics rest them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fediod_med.checkpoints import save_state
from fediod_med.errors import WeightsError
from fediod_med.federation.critic import Critic, PlainCritic, PrivateCritic
from fediod_med.federation.critic_state import stored_discriminators
from fediod_med.networks import PatchDiscriminator
from fediod_med.privacy.discriminator import DiscriminatorPlan
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.protocol import Query

CPU = torch.device("cpu")
SIZE = 16
RUN_ID = "0123abcd"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run_id").write_text(RUN_ID)
    return tmp_path


def judge(critic: Critic, *, rounds: int = 2, run_id: str = f"{RUN_ID}-student", edge: int = SIZE) -> None:
    for number in range(1, rounds + 1):
        x = torch.randn(2, 4, edge, edge, edge)
        critic.judge(x, Query("answer", run_id, number, {"x": x}, {"snapshot": True, "rounds": rounds}))


def plain(folder: Path, **sizes: int | str) -> PlainCritic:
    volumes = [torch.randn(4, SIZE, SIZE, SIZE)]
    return PlainCritic("h0", volumes, state_dir=folder, seed=0, device=CPU, **sizes)


def private(folder: Path, permit: str = "ab", **sizes: int | str) -> PrivateCritic:
    patients = [[torch.randn(4, SIZE, SIZE, SIZE)] for _ in range(2)]
    plan = DiscriminatorPlan(Mechanism(1.0, 1.0, 2))
    options: dict[str, Any] = {"permit": permit, "done": 0, "journal": lambda _: None, "state_dir": folder} | sizes
    return PrivateCritic("h0", patients, plan=plan, device=CPU, **options)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("norm", ["INSTANCE", "GROUP"])
@pytest.mark.parametrize("make", [plain, private])
def test_a_discriminator_is_read_back_as_its_critic_left_it(run: Path, make, norm: str) -> None:
    critic = make(run / "site_state" / "h0", width=4, layers=1, norm=norm)
    judge(critic)
    found, absent = stored_discriminators(run, ["h0"], width=4, layers=1, norm=norm)
    assert not absent and same(found["h0"], critic.discriminator) and not found["h0"].training


@pytest.mark.parametrize("make", [plain, private])
def test_the_sizes_of_the_critics_are_those_of_the_reader(run: Path, make) -> None:
    critic = make(run / "site_state" / "h0")
    judge(critic, rounds=1, edge=2 * SIZE)  # of 16 voxels, one would be left
    assert same(stored_discriminators(run, ["h0"])[0]["h0"], critic.discriminator)


def test_the_last_round_of_this_run_counts(run: Path) -> None:
    home = run / "site_state" / "h0"
    critic = plain(home, width=4, layers=1)
    judge(critic, rounds=3)
    kept = {name: tensor.clone() for name, tensor in critic.discriminator.state_dict().items()}
    judge(plain(home, width=4, layers=1), run_id="ffff-student", rounds=5)
    loaded = stored_discriminators(run, ["h0"], width=4, layers=1)[0]["h0"].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in kept.items())


def test_the_permit_that_trained_last_counts(run: Path) -> None:
    home = run / "site_state" / "h0"
    for age, permit in ((100, "cd"), (200, "ab")):
        critic = private(home, permit=permit, width=4, layers=1)
        judge(critic, rounds=1)
        os.utime(home / f"discriminator-{permit}.pt", (age, age))
    assert same(stored_discriminators(run, ["h0"], width=4, layers=1)[0]["h0"], critic.discriminator)


def test_sites_without_a_state_are_named(run: Path) -> None:
    judge(plain(run / "site_state" / "h0", width=4, layers=1))
    found, absent = stored_discriminators(run, ["h1"])
    assert found == {} and len(absent) == 1
    assert absent[0].startswith("h1, discriminator: ") and "holds no state" in absent[0]
    (run / "run_id").unlink()  # whose snapshots these are can no longer be told
    assert stored_discriminators(run, ["h0"], width=4, layers=1)[0] == {}


def test_another_network_or_something_else_is_refused(run: Path) -> None:
    judge(private(run / "site_state" / "h0", width=4, layers=1), rounds=1)
    with pytest.raises(WeightsError, match="do not fit the network"):
        stored_discriminators(run, ["h0"])
    for wrong in ({"training": {"updates": 1}}, {"student": PatchDiscriminator(width=4).state_dict()}):
        save_state(run / "site_state" / "h1" / "discriminator-ab.pt", wrong)
        with pytest.raises(WeightsError, match="expected the state of a discriminator"):
            stored_discriminators(run, ["h1"])
