"""A hospital's node: what it answers, that its discriminator learns, and that it can be rewound."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fediod_med.errors import ProtocolError
from fediod_med.federation.critic import KEEP_SNAPSHOTS, PlainCritic
from fediod_med.federation.node import SiteNode
from fediod_med.losses import discriminator_adversarial, generator_adversarial
from fediod_med.networks import build_segmenter
from fediod_med.privacy.gate import Gate
from fediod_med.protocol import REPLY_FIELDS, Query, Reply, unpack
from fediod_med.protocol import pack as pack_message

CPU = torch.device("cpu")
SIZE = 16
PRESENCE = (torch.arange(9)[:, None] < torch.tensor([9, 4, 5, 6])).float()


@pytest.fixture
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a CPU without bfloat16 instructions, so that two routes can be compared closely."""
    monkeypatch.setattr("fediod_med.devices._cpu_has_bf16", lambda: False)


def volumes(seed: int = 0, edges: Sequence[int] = (20, 16, 12)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((4, edges[0], edges[1], edges[2]), generator=generator) for _ in range(3)]


def node(folder: Path, name: str = "hospital-a", **settings: Any) -> SiteNode:
    torch.manual_seed(len(name))
    teacher = build_segmenter("unet", width=4, depth=2)
    settings = {"real_volumes": volumes(), "seed": 5, "device": CPU, "width": 4, "layers": 1, **settings}
    judge = PlainCritic(name, settings.pop("real_volumes"), state_dir=folder, **settings)
    return SiteNode(name, teacher, PRESENCE, critic=judge, gate=Gate.unprotected(name), device=CPU)


def critic(site: SiteNode) -> PlainCritic:
    assert isinstance(site._critic, PlainCritic)
    return site._critic


def batch(seed: int) -> Tensor:
    return torch.randn((2, 4, SIZE, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def ask(site: SiteNode, number: int, *, run_id: str = "run-1", x: Tensor | None = None, **settings: Any) -> Reply:
    settings = {"adversarial": True, **settings}
    return site._reply(Query("answer", run_id, number, {"x": batch(number) if x is None else x}, settings))


def same(a: Reply, b: Reply) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def test_replies_carry_the_listed_tensors_only(tmp_path: Path) -> None:
    site = node(tmp_path)
    described = unpack(site.handle(Query("describe", "run-1", 0)).payload)
    answer = ask(site, 1, differentiate=True)
    pulled = site._reply(Query("pull_back", "run-1", 1, {"logit_gradient": torch.randn(2, 4, SIZE, SIZE, SIZE)}))
    plain = ask(site, 2, adversarial=False)
    for reply, fields in (
        (described, {"class_counts"}),
        (answer, {"probs", "realism", "x_gradient"}),
        (pulled, {"x_gradient"}),
        (plain, {"probs"}),
    ):
        assert isinstance(reply, Reply)
        assert set(reply.tensors) == fields <= REPLY_FIELDS[reply.kind]
        assert reply.site == "hospital-a"
        assert not any(tensor.requires_grad for tensor in reply.tensors.values())
        unpack(pack_message(reply))


def test_shapes_and_values_of_an_answer(tmp_path: Path) -> None:
    site = node(tmp_path)
    reply = ask(site, 1).tensors
    assert reply["probs"].shape == (2, 4, SIZE, SIZE, SIZE)
    assert torch.allclose(reply["probs"].sum(1), torch.ones(2, SIZE, SIZE, SIZE), atol=1e-5)
    assert reply["realism"].shape == (2,)
    assert reply["x_gradient"].shape == (2, 4, SIZE, SIZE, SIZE) and reply["x_gradient"].abs().max() > 0


@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize("criterion", ["hinge", "bce", "least_squares"])
def test_realism_and_its_gradient_are_those_of_the_updated_discriminator(tmp_path: Path, criterion: str) -> None:
    site = node(tmp_path, criterion=criterion)
    x = batch(1)
    reply = ask(site, 1, x=x).tensors
    leaf = x.clone().requires_grad_(True)
    logits = critic(site).discriminator(leaf)
    generator_adversarial(logits, criterion).backward()
    assert torch.allclose(reply["realism"], logits.flatten(1).mean(1))
    assert leaf.grad is not None and torch.allclose(reply["x_gradient"], leaf.grad, atol=1e-7)


def test_the_callers_volume_is_left_as_it_was(tmp_path: Path) -> None:
    """One x goes to all hospitals; a graph of one must not hang on it."""
    x = batch(1)
    before = x.clone()
    ask(node(tmp_path), 1, x=x, differentiate=True)
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None


@pytest.mark.parametrize("criterion", ["hinge", "bce", "least_squares"])
def test_discriminator_steps_lower_its_loss(tmp_path: Path, criterion: str) -> None:
    real = [v * 0.2 + 1 for v in volumes()]
    site = node(tmp_path, criterion=criterion, real_volumes=real, learning_rate=2e-3)
    fake = batch(0)

    def loss() -> float:
        with torch.no_grad():
            patches = critic(site).real_batch((SIZE, SIZE, SIZE), 999)
            return float(
                discriminator_adversarial(
                    critic(site).discriminator(fake), critic(site).discriminator(patches), criterion
                )
            )

    before = loss()
    realism = [float(ask(site, number, x=fake).tensors["realism"].mean()) for number in range(1, 13)]
    assert loss() < 0.8 * before
    assert realism[-1] < realism[0]


def test_the_teacher_never_changes(tmp_path: Path) -> None:
    site = node(tmp_path)
    before = copy.deepcopy(site._teacher.state_dict())
    for number in (1, 2, 3):
        ask(site, number, differentiate=True)
        site._reply(Query("pull_back", "run-1", number, {"logit_gradient": torch.randn(2, 4, SIZE, SIZE, SIZE)}))
    assert all(torch.equal(before[name], tensor) for name, tensor in site._teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in site._teacher.parameters())
    assert not site._teacher.training


@pytest.mark.usefixtures("_float32")
def test_pull_back_is_the_vector_jacobian_product(tmp_path: Path) -> None:
    site = node(tmp_path)
    x, g = batch(1), torch.randn(2, 4, SIZE, SIZE, SIZE)
    ask(site, 1, x=x, adversarial=False, differentiate=True)
    pulled = site._reply(Query("pull_back", "run-1", 1, {"logit_gradient": g})).tensors["x_gradient"]
    leaf = x.clone().requires_grad_(True)
    (site._teacher(leaf) * g).sum().backward()
    assert leaf.grad is not None and torch.allclose(pulled, leaf.grad, atol=1e-6)


def test_a_pull_back_belongs_to_its_answer(tmp_path: Path) -> None:
    site = node(tmp_path)
    g = torch.zeros(2, 4, SIZE, SIZE, SIZE)

    def pull(number: int, run_id: str = "run-1", gradient: Tensor = g) -> Reply:
        return site._reply(Query("pull_back", run_id, number, {"logit_gradient": gradient}))

    with pytest.raises(ProtocolError, match="without its answer"):
        pull(1)
    ask(site, 1)
    with pytest.raises(ProtocolError, match="without its answer"):
        pull(1)  # asked without `differentiate`
    ask(site, 2, differentiate=True)
    with pytest.raises(ProtocolError, match="without its answer"):
        pull(2, run_id="run-2")
    ask(site, 3, differentiate=True)
    with pytest.raises(ProtocolError, match="logit_gradient of shape"):
        pull(3, gradient=torch.zeros(1, 4, SIZE, SIZE, SIZE))
    ask(site, 4, differentiate=True)
    pull(4)
    with pytest.raises(ProtocolError, match="without its answer"):
        pull(4)  # each answer is differentiated once


def test_rewinding_to_a_snapshot_continues_identically(tmp_path: Path) -> None:
    site = node(tmp_path)
    for number in (1, 2, 3):
        ask(site, number, snapshot=number == 2)
    continued = [ask(site, 4), ask(site, 5)]

    assert same(ask(site, 3), ask(node(tmp_path), 3))  # the same process, and a new one
    assert [same(ask(site, number), continued[number - 4]) for number in (4, 5)] == [True, True]


def test_the_first_round_starts_afresh(tmp_path: Path) -> None:
    site = node(tmp_path)
    first = [ask(site, number) for number in (1, 2)]
    assert [same(ask(site, number), first[number - 1]) for number in (1, 2)] == [True, True]


def test_runs_do_not_share_a_discriminator(tmp_path: Path) -> None:
    site = node(tmp_path)
    first = ask(site, 1)
    with pytest.raises(ProtocolError, match="no snapshot"):
        ask(site, 2, run_id="run-2")
    assert same(ask(site, 1, run_id="run-2"), first)


def test_a_restarted_site_that_missed_rounds_continues_from_its_newest_snapshot(tmp_path: Path) -> None:
    site = node(tmp_path)
    ask(site, 1, snapshot=True)
    ask(site, 2, snapshot=True)
    in_memory = ask(site, 5)
    assert same(ask(node(tmp_path), 5), in_memory)


def test_a_site_that_a_run_has_not_reached_before_may_join_late_if_so_made(tmp_path: Path) -> None:
    fresh = ask(node(tmp_path / "a"), 1)
    site = node(tmp_path / "b", joins_late=True)
    late = ask(site, 4, x=batch(1), snapshot=True)
    assert late.tensors["x_gradient"].shape == fresh.tensors["x_gradient"].shape
    ask(site, 5)
    with pytest.raises(ProtocolError, match="no snapshot"):
        ask(site, 3)  # it has a state by now, and that state is later


def test_rounds_out_of_order_are_refused_and_change_nothing(tmp_path: Path) -> None:
    site = node(tmp_path)
    for wrong in (5, 0, -3):
        with pytest.raises(ProtocolError, match="no snapshot"):
            ask(site, wrong)
    ask(site, 1)
    ask(site, 2)
    with pytest.raises(ProtocolError, match="no snapshot"):
        ask(site, 2)  # the same round twice: its discriminator would step twice
    other = node(tmp_path / "other")
    ask(other, 1)
    ask(other, 2)
    assert same(ask(site, 3), ask(other, 3))


def test_a_site_that_missed_rounds_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = node(tmp_path)
    ask(site, 1)
    reply = ask(site, 4)
    assert "missed rounds 2 to 3" in caplog.text
    assert reply.round == 4
    ask(site, 5)


def test_old_snapshots_go_and_those_of_an_abandoned_continuation_too(tmp_path: Path) -> None:
    site = node(tmp_path)
    for number in range(1, 5):
        ask(site, number, snapshot=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-1-round-000003.pt", "run-1-round-000004.pt"]
    assert KEEP_SNAPSHOTS == 2
    ask(site, 1, snapshot=True)  # the same run, started again
    assert [p.name for p in tmp_path.iterdir()] == ["run-1-round-000001.pt"]
    fresh = node(tmp_path)
    assert ask(fresh, 2).round == 2


@pytest.mark.parametrize("run_id", ["../elsewhere", "a/b", "", "*", "a b"])
def test_run_ids_that_could_leave_the_folder_are_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ProtocolError, match="run id"):
        ask(node(tmp_path / "state"), 1, run_id=run_id, snapshot=True)
    assert list(tmp_path.rglob("*.pt")) == []


def test_malformed_queries_are_refused(tmp_path: Path) -> None:
    site = node(tmp_path)
    with pytest.raises(ProtocolError, match="unknown query 'weights'"):
        site._reply(Query("weights", "run-1", 1))
    for shape in ((2, 3, SIZE, SIZE, SIZE), (4, SIZE, SIZE, SIZE)):
        with pytest.raises(ProtocolError, match=r"\(B, 4, D, H, W\)"):
            ask(site, 1, x=torch.zeros(shape))
    with pytest.raises(ProtocolError, match="no scans"):
        ask(node(tmp_path, real_volumes=[]), 1)


def test_real_patches_are_fixed_by_the_round_and_come_from_the_scans(tmp_path: Path) -> None:
    flat = [torch.full((4, 20, 20, 20), float(value)) for value in (1, 2, 3)]
    site = node(tmp_path, real_volumes=flat, batch=16)
    patches = critic(site).real_batch((8, 8, 8), 4)
    assert type(patches) is Tensor and patches.shape == (16, 4, 8, 8, 8)
    assert torch.equal(patches, critic(site).real_batch((8, 8, 8), 4))
    assert set(patches.unique().tolist()) == {1, 2, 3}
    assert not torch.equal(patches, critic(site).real_batch((8, 8, 8), 5))
    varied = node(tmp_path)
    assert not torch.equal(critic(varied).real_batch((8, 8, 8), 1), critic(varied).real_batch((8, 8, 8), 2))


def test_scans_smaller_than_the_patch_are_padded_with_background(tmp_path: Path) -> None:
    site = node(tmp_path, real_volumes=[torch.ones(4, 4, 6, 8)])
    patches = critic(site).real_batch((8, 8, 8), 1)
    assert patches.shape == (2, 4, 8, 8, 8)
    assert (patches.flatten(1).sum(1) == 4 * 4 * 6 * 8).all()


def test_hospitals_start_from_different_discriminators_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> list[Tensor]:
        return list(critic(node(tmp_path, name, seed=seed)).discriminator.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(weights("a", 1), weights("a", 1), strict=True))
    assert not torch.equal(weights("a", 1)[0], weights("b", 1)[0])
    assert not torch.equal(weights("a", 1)[0], weights("a", 2)[0])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    PlainCritic("a", volumes(), state_dir=tmp_path, seed=0, device=CPU, width=4, layers=1)
    assert torch.equal(torch.rand(1), expected)


def test_a_teacher_given_in_training_mode_is_frozen(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Conv3d(4, 4, 1), nn.Dropout(0.5)).train()
    site = SiteNode("a", teacher, PRESENCE, critic=None, gate=Gate.unprotected("a"), device=CPU)
    x = batch(1)
    assert same(ask(site, 1, x=x, adversarial=False), ask(site, 1, x=x, adversarial=False))
