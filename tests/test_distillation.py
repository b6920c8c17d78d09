"""The method: the student learns, each term acts, and an interrupted run equals an uninterrupted one."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fediod_med.checkpoints import load_state, save_state
from fediod_med.data.phantoms import Grid, load_anatomy
from fediod_med.data.sampler import PublicBatch, PublicSampler, upright
from fediod_med.distillation import learning
from fediod_med.distillation.generating import learn_log_weights, softmax_pull_back
from fediod_med.distillation.learning import is_held_out
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import PAPER_OBJECTIVE, GeneratorObjective, Schedule, snapshot_rounds
from fediod_med.distillation.state import DistillationState, warmed_average
from fediod_med.distillation.volumes import asked_volumes, final_volumes, synthetic_volumes
from fediod_med.ensemble import public_dice
from fediod_med.errors import ProtocolError, SettingsError, WeightsError
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.losses import soft_dice, transfer_divergence
from fediod_med.networks import Generator, build_segmenter
from fediod_med.prior import train_prior
from fediod_med.privacy.gate import Gate
from fediod_med.protocol import Query, Reply, SiteFailure, pack
from fediod_med.snapshots import Snapshot

CPU = torch.device("cpu")
SIZE = 16
SITES = ("north", "south")
NOTHING = GeneratorObjective(gan=0, clarity=0, unique=0, mask=0, balance=0, transfer=0)
SHORT = Schedule(rounds=4, batch=2, student_steps=2, student_batch=2, replay=6, phantom_share=0.0, checkpoint_every=2)


@pytest.fixture(scope="module")
def sampler() -> PublicSampler:
    return PublicSampler(spacing=12, roi=SIZE, count=4, seed=3, anatomy=load_anatomy(Grid((16, 16, 16), 12.0)))


@pytest.fixture(scope="module")
def teachers(sampler: PublicSampler) -> list[nn.Module]:
    """Two teachers that learnt phantoms for a moment."""
    made = []
    for seed in range(len(SITES)):
        torch.manual_seed(seed)
        network = build_segmenter("unet", width=8, depth=2)
        made.append(
            train_prior(network, [sampler], steps=40, batch=2, learning_rate=5e-3, seed=seed, device=CPU, ema=0.8)
        )
    return made


@dataclass
class Bench:
    """Makes hospitals and networks anew, as a new process would."""

    teachers: list[nn.Module]
    sampler: PublicSampler
    folder: Path

    def nodes(self) -> dict[str, SiteNode]:
        volumes = [image.float() for image, _ in self.sampler.volumes()]
        return {
            name: SiteNode(
                name,
                copy.deepcopy(self.teachers[index]),
                (torch.arange(9)[:, None] < torch.tensor([9, 4, 5, 6]) - index).float(),
                critic=PlainCritic(
                    name,
                    volumes[2 * index : 2 * index + 2],
                    state_dir=self.folder / name,
                    seed=1,
                    device=CPU,
                    width=4,
                    layers=1,
                ),
                gate=Gate.unprotected(name),
                device=CPU,
            )
            for index, name in enumerate(SITES)
        }

    def distill(self, **changes: Any) -> DistillationState:
        torch.manual_seed(7)
        student = build_segmenter("unet", width=8, depth=2)
        mode = changes.pop("mode", "conditional")
        generator = None if mode is None else Generator(mode, size=SIZE, width=4)
        arguments: dict[str, Any] = {
            "student": student,
            "generator": generator,
            "sampler": self.sampler,
            "objective": GeneratorObjective(),
            "schedule": SHORT,
            "size": SIZE,
            "seed": 2,
            "run_id": "run-1",
            "device": CPU,
        }
        federation = changes.pop("federation", None) or EmbeddedFederation(self.nodes())
        return distill(federation, **{**arguments, **changes})


@pytest.fixture
def bench(teachers: list[nn.Module], sampler: PublicSampler, tmp_path: Path) -> Bench:
    return Bench(teachers, sampler, tmp_path)


class Unreliable:
    """A federation of real nodes, some of whose calls fail as `fails(site, query)` says."""

    def __init__(self, nodes: Mapping[str, SiteNode], fails: Callable[[str, Query], bool]) -> None:
        self._inner = EmbeddedFederation(nodes)
        self._fails = fails

    @property
    def site_names(self) -> tuple[str, ...]:
        return self._inner.site_names

    def ask(self, queries: Mapping[str, Query], *, quorum: int, timeout_s: float) -> dict[str, Reply | SiteFailure]:
        down = {site for site, query in queries.items() if self._fails(site, query)}
        up = {site: query for site, query in queries.items() if site not in down}
        replies = self._inner.ask(up, quorum=quorum, timeout_s=timeout_s)
        # Failures first: the order of replies must not matter to the centre.
        return {**{site: SiteFailure(site, queries[site].round, "timeout") for site in down}, **replies}


class Listening(Unreliable):
    """Notes every reply beside its query."""

    def __init__(self, nodes: Mapping[str, SiteNode], fails: Callable[[str, Query], bool]) -> None:
        super().__init__(nodes, fails)
        self.heard: list[tuple[Query, Reply]] = []

    def ask(self, queries: Mapping[str, Query], *, quorum: int, timeout_s: float) -> dict[str, Reply | SiteFailure]:
        outcome = super().ask(queries, quorum=quorum, timeout_s=timeout_s)
        self.heard += [(queries[site], found) for site, found in outcome.items() if isinstance(found, Reply)]
        return outcome


def recorder(asked: list[Query], site: str | None = None) -> Callable[[str, Query], bool]:
    """Fails nobody; notes the queries to one site, or to all."""

    def note(to: str, query: Query) -> bool:
        if site in (None, to):
            asked.append(query)
        return False

    return note


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, Mapping):
        return [t for value in state.values() for t in tensors_of(value)]
    return [t for value in state for t in tensors_of(value)] if isinstance(state, list | tuple) else []


def equal_states(a: DistillationState, b: DistillationState) -> bool:
    first, second = tensors_of(a.state_dict()), tensors_of(b.state_dict())
    return len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def generator_weights(state: DistillationState) -> Tensor:
    assert state.generator is not None
    return torch.cat([p.detach().flatten() for p in state.generator.parameters()])


# --- the student ------------------------------------------------------------------------------------------------------


def test_without_a_generator_the_students_loss_falls(bench: Bench) -> None:
    schedule = replace(SHORT, rounds=20, student_steps=4, student_rate=5e-3)
    state = bench.distill(mode=None, schedule=schedule)
    losses = [record["student"] for record in state.history]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert state.generator is None and "clarity" not in state.history[0]


def test_the_student_approaches_the_ensemble_not_the_labels_alone(bench: Bench) -> None:
    """With `truth=0` the target is the ensemble: the student ends nearer to it than it began."""
    x = bench.sampler.draw(99, 4).base
    with torch.no_grad():
        q = torch.stack([torch.softmax(teacher(x), 1) for teacher in bench.teachers]).mean(0)
    schedule = replace(SHORT, rounds=20, student_steps=4, student_rate=5e-3, truth=0.0, ema=0.9)
    state = bench.distill(mode=None, schedule=schedule)
    torch.manual_seed(7)
    untrained = build_segmenter("unet", width=8, depth=2)
    with torch.no_grad():
        before = (torch.softmax(untrained(x), 1) - q).abs().mean()
        after = (torch.softmax(state.student_average.module.eval()(x), 1) - q).abs().mean()
    assert after < 0.5 * before


def test_the_replay_buffer_keeps_the_newest_pairs_in_half_precision(bench: Bench) -> None:
    state = bench.distill(mode=None, schedule=replace(SHORT, rounds=5, replay=3))
    assert len(state.replay) == 3
    for number, pair in zip((3, 4, 5), state.replay, strict=True):
        public = bench.sampler.draw(number, 2)
        assert torch.equal(pair["x"], public.base.half()) and torch.equal(pair["classes"], public.classes.byte())
        assert pair["q"].dtype == torch.float16
        assert torch.allclose(pair["q"].float().sum(1), torch.ones(2, SIZE, SIZE, SIZE), atol=2e-3)


def test_hospitals_are_weighed_by_what_they_know_of_public_phantoms(bench: Bench) -> None:
    """A hospital whose teacher is ruined loses its weight after the first phantom round; before it, all weigh alike."""
    ruined, random = copy.deepcopy(bench.teachers[1]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ruined.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    bench = replace(bench, teachers=[bench.teachers[0], ruined])
    trusting = bench.distill(mode=None, objective=replace(GeneratorObjective(), competence=0.0, realism_weights=False))
    weighing = bench.distill(mode=None, objective=replace(GeneratorObjective(), realism_weights=False))
    assert trusting.dice is not None and weighing.dice is not None and torch.equal(trusting.dice, weighing.dice)
    assert (weighing.dice[0] > weighing.dice[1]).sum() >= 3
    good = bench.teachers[0].eval()
    x = weighing.replay[-1]["x"].float()
    with torch.no_grad():
        alone = torch.softmax(good(x), dim=1)
    far, near = ((run.replay[-1]["q"].float() - alone).abs().mean() for run in (trusting, weighing))
    assert near < 0.25 * far


def test_rehearsal_draws_fresh_phantoms_whose_target_is_the_label_map_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves of a batch are seen at the loss: the rehearsed target is one-hot, the ensemble's is not."""
    drawn: list[tuple[int, int]] = []
    sharp: list[list[bool]] = []
    draw = bench.sampler.draw

    def noted_draw(step: int, batch: int) -> PublicBatch:
        drawn.append((step, batch))
        return draw(step, batch)

    def noted_divergence(target: Tensor, logits: Tensor) -> Tensor:
        sharp.append([bool((volume.amax(0) == 1).all()) for volume in target])
        return transfer_divergence(target, logits)

    monkeypatch.setattr(bench.sampler, "draw", noted_draw)
    monkeypatch.setattr(learning, "transfer_divergence", noted_divergence)
    bench.distill(mode=None, schedule=replace(SHORT, student_batch=3, rehearsal=1 / 3))
    rehearsed = [(step, batch) for step, batch in drawn if step >= learning.REHEARSAL_DRAWS]
    assert rehearsed == [(learning.REHEARSAL_DRAWS + i, 1) for i in range(SHORT.rounds * SHORT.student_steps)]
    assert sharp == [[False, False, True]] * len(rehearsed)


def test_student_steps_cost_no_traffic(bench: Bench) -> None:
    few, many = (EmbeddedFederation(bench.nodes()) for _ in range(2))
    bench.distill(mode=None, federation=few, schedule=replace(SHORT, student_steps=1))
    bench.distill(mode=None, federation=many, schedule=replace(SHORT, student_steps=5))
    assert few.bytes_down == many.bytes_down and few.bytes_up == many.bytes_up


def test_each_round_is_reported_once(bench: Bench) -> None:
    seen: list[Mapping[str, float]] = []
    state = bench.distill(on_round=seen.append)
    assert [record["round"] for record in seen] == [1, 2, 3, 4]
    assert seen == state.history
    assert set(seen[0]) == {
        *("round", "sites", "clarity", "unique", "mask", "transfer", "student"),
        *("realism", "realism:north", "realism:south"),
    }
    assert seen[2]["realism"] == pytest.approx((seen[2]["realism:north"] + seen[2]["realism:south"]) / 2)
    assert seen[2]["realism:north"] != seen[2]["realism:south"]


# --- the generator ----------------------------------------------------------------------------------------------------


def test_the_first_query_is_the_phantom_itself(bench: Bench) -> None:
    asked: list[Query] = []
    federation = Unreliable(bench.nodes(), recorder(asked))
    bench.distill(federation=federation, schedule=replace(SHORT, rounds=2))
    xs = {query.round: query.tensors["x"] for query in asked if query.kind == "answer"}
    assert torch.equal(xs[1], bench.sampler.draw(1, 2).base)
    second = bench.sampler.draw(2, 2)
    assert not torch.equal(xs[2], second.base)
    assert (xs[2][(second.tissues == 0)[:, None].expand_as(xs[2])] == 0).all()


def test_a_round_takes_two_trips(bench: Bench) -> None:
    asked: list[Query] = []
    bench.distill(federation=Unreliable(bench.nodes(), recorder(asked)), schedule=replace(SHORT, rounds=1))
    kinds = [(query.kind, query.round) for query in asked]
    assert kinds == [(kind, n) for kind, n in (("describe", 0), ("answer", 1), ("pull_back", 1)) for _ in SITES]


def test_what_no_term_needs_is_not_asked(bench: Bench) -> None:
    def asked(objective: GeneratorObjective) -> list[Query]:
        queries: list[Query] = []
        federation = Unreliable(bench.nodes(), recorder(queries, SITES[0]))
        bench.distill(federation=federation, objective=objective, schedule=replace(SHORT, rounds=1))
        return [query for query in queries if query.kind != "describe"]

    no_critic = asked(replace(GeneratorObjective(), gan=0.0, realism_weights=False))
    assert [q.kind for q in no_critic] == ["answer", "pull_back"] and not no_critic[0].settings["adversarial"]
    only_critic = asked(replace(NOTHING, gan=1.0, realism_weights=False))
    assert [q.kind for q in only_critic] == ["answer"] and only_critic[0].settings["adversarial"]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_phantom_rounds_ask_about_the_phantom_and_need_one_trip(bench: Bench, share: float) -> None:
    asked: list[Query] = []
    federation = Unreliable(bench.nodes(), recorder(asked, "north"))
    state = bench.distill(
        federation=federation, schedule=replace(SHORT, rounds=8, student_steps=1, phantom_share=share)
    )
    pulled = {query.round for query in asked if query.kind == "pull_back"}
    phantoms = set(range(1, 9)) - pulled
    assert len(phantoms) == 8 * share
    for query in asked:
        if query.kind == "answer" and query.round in phantoms:
            assert torch.equal(query.tensors["x"], bench.sampler.draw(query.round, 2).base)
    assert {record["round"] for record in state.history if "clarity" in record} == pulled
    assert (max(phantoms, default=8) - min(phantoms, default=1)) >= 8 - 2 / max(share, 0.25)


@pytest.mark.parametrize("term", ["gan", "clarity", "unique", "mask", "balance", "transfer"])
def test_each_term_alone_moves_the_generator_and_its_sign_matters(bench: Bench, term: str) -> None:
    """The zero-initialised head takes the gradient's direction: opposite weights move it in opposite directions."""
    schedule = replace(SHORT, rounds=1, student_steps=0)
    nothing = generator_weights(bench.distill(objective=NOTHING, schedule=schedule))
    more, less = (
        generator_weights(bench.distill(objective=replace(NOTHING, **{term: weight}), schedule=schedule)) - nothing
        for weight in (1.0, -1.0)
    )
    assert more.norm() > 0
    assert torch.nn.functional.cosine_similarity(more, less, dim=0) < -0.9


def test_without_any_term_the_generator_stays(bench: Bench) -> None:
    state = bench.distill(objective=NOTHING)
    torch.manual_seed(7)
    build_segmenter("unet", width=8, depth=2)
    untouched = Generator("conditional", size=SIZE, width=4)
    assert torch.equal(generator_weights(state), torch.cat([p.detach().flatten() for p in untouched.parameters()]))
    assert {"mask", "transfer", "balance"} & set(state.history[0]) == set()


def test_the_mask_term_falls_when_the_generator_follows_it(bench: Bench) -> None:
    objective = replace(NOTHING, mask=1.0)
    fast = replace(SHORT, rounds=16, student_steps=0, generator_rate=1e-2)
    terms = [record["mask"] for record in bench.distill(objective=objective, schedule=fast).history]
    still = [
        record["mask"]
        for record in bench.distill(objective=objective, schedule=replace(fast, generator_rate=0.0)).history
    ]
    # Rounds draw different phantoms, so each is compared with itself under a generator that does not learn.
    assert sum(terms[-6:]) < 0.95 * sum(still[-6:])


@pytest.mark.parametrize("divergence", ["jensen_shannon", "released"])
@pytest.mark.parametrize("unique", [-1.0, 1.0])
def test_the_paper_mode_runs_from_noise_alone(bench: Bench, divergence: str, unique: float) -> None:
    objective = replace(PAPER_OBJECTIVE, divergence=divergence, unique=unique)
    state = bench.distill(mode="unconditional", sampler=None, objective=objective, schedule=replace(SHORT, rounds=2))
    assert all(torch.isfinite(torch.tensor(list(record.values()))).all() for record in state.history)
    assert "balance" in state.history[0] and "mask" not in state.history[0]
    assert state.replay[0].keys() == {"x", "q"}


def test_the_sign_of_uniqueness_parts_or_joins_the_teachers(bench: Bench) -> None:
    schedule = replace(SHORT, rounds=16, student_steps=0, generator_rate=1e-2)

    def disagreement(weight: float) -> float:
        history = bench.distill(objective=replace(NOTHING, unique=weight), schedule=schedule).history
        return sum(record["unique"] for record in history[-5:])

    assert disagreement(1.0) > 1.1 * disagreement(-1.0)


def test_an_unconditional_generator_does_not_borrow_labels_from_a_sampler(bench: Bench) -> None:
    """Its volumes do not show the sampler's label maps, so these must not become the student's truth."""
    arguments: dict[str, Any] = {
        "mode": "unconditional",
        "objective": PAPER_OBJECTIVE,
        "schedule": replace(SHORT, rounds=2),
    }
    state = bench.distill(**arguments)
    assert "classes" not in state.replay[0]
    assert equal_states(state, bench.distill(**arguments, sampler=None))
    ((_, classes),) = synthetic_volumes(state, sampler=bench.sampler, count=1, size=SIZE, seed=0, device=CPU)
    assert classes is None


def test_softmax_pull_back_equals_autograd() -> None:
    logits = torch.randn(2, 4, 3, 3, 3, requires_grad=True)
    g = torch.randn(2, 4, 3, 3, 3)
    p = torch.softmax(logits, dim=1)
    (expected,) = torch.autograd.grad(p, logits, grad_outputs=g)
    assert torch.allclose(softmax_pull_back(p.detach(), g), expected, atol=1e-6)
    certain = torch.zeros(1, 4, 2)
    certain[:, 0] = 1
    assert torch.equal(softmax_pull_back(certain, torch.full((1, 4, 2), 1e6)), torch.zeros(1, 4, 2))


def test_synthetic_volumes_come_from_the_averaged_generator_and_repeat(bench: Bench) -> None:
    state = bench.distill()

    def make() -> list[tuple[Tensor, Tensor | None]]:
        return list(synthetic_volumes(state, sampler=bench.sampler, count=3, size=SIZE, seed=5, device=CPU))

    for (x, classes), (again, _) in zip(make(), make(), strict=True):
        assert x.shape == (4, SIZE, SIZE, SIZE) and torch.equal(x, again) and not x.requires_grad
        assert classes is not None and classes.shape == (SIZE, SIZE, SIZE)
    phantoms = bench.distill(mode=None)
    (x, classes), *_ = synthetic_volumes(phantoms, sampler=bench.sampler, count=1, size=SIZE, seed=5, device=CPU)
    public: PublicBatch = bench.sampler.draw(10_000_000, 1).upright()
    assert torch.equal(x, public.base[0]) and classes is not None and torch.equal(classes, public.classes[0])


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "share", "expected"),
    [
        (9, 0.0, (1, 3, 5, 7, 9)),
        (2, 0.0, (1, 2)),
        (60, 0.5, (1, 15, 29, 45, 59)),  # odd rounds are the generator's
        (1, 0.5, (1,)),
        (8, 1.0, ()),
    ],
)
def test_snapshots_are_spread_over_the_generators_rounds(rounds: int, share: float, expected: tuple[int, ...]) -> None:
    schedule = replace(SHORT, rounds=rounds, phantom_share=share)
    assert snapshot_rounds(schedule, generator=True, public=True) == expected
    assert snapshot_rounds(schedule, generator=False, public=True) == ()
    assert len(snapshot_rounds(schedule, generator=True, public=False)) == min(rounds, 5)


def test_a_snapshot_holds_what_was_asked_and_answered_as_the_heads_lie(bench: Bench) -> None:
    """Against the messages themselves; the draws of these rounds are mirrored, so that undoing it is seen."""
    taken: list[Snapshot] = []
    federation = Listening(bench.nodes(), lambda *_: False)
    state = bench.distill(
        federation=federation, on_snapshot=taken.append, schedule=replace(SHORT, rounds=6, phantom_share=0.5)
    )
    assert [snapshot.round for snapshot in taken] == [1, 3, 5]
    sent = {query.round: query.tensors["x"] for query, _ in federation.heard if query.kind == "answer"}
    replies = {(reply.round, reply.site): reply for _, reply in federation.heard if reply.kind == "answer"}
    for snapshot in taken:
        drawn = bench.sampler.draw(snapshot.round, 2)
        assert drawn.mirrored.any()
        assert torch.equal(snapshot.x, upright(sent[snapshot.round], drawn.mirrored))
        assert snapshot.public is not None and torch.equal(snapshot.public.base, drawn.upright().base)
        for site in SITES:
            said = upright(replies[snapshot.round, site].tensors["probs"].float(), drawn.mirrored)
            assert torch.allclose(snapshot.answers[site], said / said.sum(1, keepdim=True), atol=1e-6)
        merged = list(state.replay)[snapshot.round - 1]["q"]
        assert torch.equal(snapshot.ensemble.half(), upright(merged, drawn.mirrored))
        assert torch.allclose(snapshot.student.sum(1), torch.ones(2, SIZE, SIZE, SIZE), atol=1e-5)
    torch.manual_seed(7)
    untrained = build_segmenter("unet", width=8, depth=2)
    with torch.no_grad():
        first = torch.softmax(untrained(sent[1]), dim=1)
    assert torch.allclose(upright(taken[0].student, bench.sampler.draw(1, 2).mirrored), first, atol=1e-5)


def test_snapshots_change_nothing_and_ask_nothing(bench: Bench) -> None:
    plain, watched = (EmbeddedFederation(bench.nodes()) for _ in range(2))
    expected = bench.distill(federation=plain)
    assert equal_states(expected, bench.distill(federation=watched, on_snapshot=lambda _: None))
    assert plain.bytes_down == watched.bytes_down and plain.bytes_up == watched.bytes_up


def test_a_hospital_that_did_not_answer_is_not_in_the_snapshot(bench: Bench) -> None:
    taken: list[Snapshot] = []
    federation = Unreliable(bench.nodes(), lambda site, query: site == "north" and query.round == 2)
    bench.distill(federation=federation, quorum=1, on_snapshot=taken.append)
    assert [set(snapshot.answers) for snapshot in taken] == [set(SITES), {"south"}, set(SITES), set(SITES)]


def test_a_resumed_run_takes_the_snapshots_that_the_interrupted_one_missed(bench: Bench) -> None:
    """A snapshot is taken before its round is saved: what lies on disk, and what a resumed run adds, is everything."""
    schedule = replace(SHORT, rounds=6)
    whole: list[Snapshot] = []
    bench.distill(schedule=schedule, on_snapshot=whole.append)
    found: dict[int, Snapshot] = {}

    def keep(snapshot: Snapshot) -> None:
        found[snapshot.round] = snapshot

    arguments: dict[str, Any] = {"schedule": schedule, "checkpoint": bench.folder / "centre.pt", "on_snapshot": keep}
    with pytest.raises(InterruptedRunError):
        bench.distill(**arguments, on_round=interrupt_after(4))
    assert max(found) <= 4
    bench.distill(**arguments, resume=True)
    assert sorted(found) == [snapshot.round for snapshot in whole] == [1, 2, 3, 5, 6]
    for snapshot in whole:
        again = found[snapshot.round]
        assert torch.equal(snapshot.x, again.x) and torch.equal(snapshot.student, again.student)
        assert all(torch.equal(snapshot.answers[site], again.answers[site]) for site in SITES)


def test_an_unconditional_generators_snapshot_has_no_phantom(bench: Bench) -> None:
    taken: list[Snapshot] = []
    bench.distill(mode="unconditional", objective=PAPER_OBJECTIVE, sampler=None, on_snapshot=taken.append)
    assert len(taken) == 4 and all(snapshot.public is None for snapshot in taken)


@pytest.mark.parametrize("replay", [100, 3])
def test_asked_volumes_are_those_of_the_generators_newest_rounds_one_a_phantom(bench: Bench, replay: int) -> None:
    asked: list[Query] = []
    schedule = replace(SHORT, rounds=6, phantom_share=0.5, replay=replay)
    state = bench.distill(federation=Unreliable(bench.nodes(), recorder(asked, "north")), schedule=schedule)
    sent = {query.round: query.tensors["x"] for query in asked if query.kind == "answer"}
    x, public = asked_volumes(state, schedule=schedule, sampler=bench.sampler, count=20)
    assert public is not None and len(x) == len(set(public.phantoms.tolist()))
    rounds = (5, 3, 1) if replay == 100 else (5,)
    expected: dict[int, Tensor] = {}
    for number in rounds:  # the newest volume of a phantom counts
        drawn = bench.sampler.draw(number, 2)
        for index, phantom in enumerate(drawn.phantoms.tolist()):
            turned = upright(sent[number][index : index + 1], drawn.mirrored[index : index + 1])[0]
            expected.setdefault(phantom, turned.half().float())
    assert list(expected) == public.phantoms.tolist()
    assert all(torch.equal(found, wanted) for found, wanted in zip(x, expected.values(), strict=True))
    for volume, base in zip(x, public.base, strict=True):
        assert torch.equal(volume == 0, base == 0) or (volume - base).abs().max() < 1
    few, behind = asked_volumes(state, schedule=schedule, sampler=bench.sampler, count=1)
    assert behind is not None and torch.equal(few[0], x[0]) and len(few) == len(behind.base) == 1


def test_asked_volumes_of_an_unconditional_generator_and_of_none(bench: Bench) -> None:
    state = bench.distill(mode="unconditional", objective=PAPER_OBJECTIVE, sampler=None)
    x, public = asked_volumes(state, schedule=SHORT, sampler=None, count=5)
    assert x.shape == (5, 4, SIZE, SIZE, SIZE) and public is None
    assert torch.equal(x[0], state.replay[-1]["x"][0].float())
    never = replace(SHORT, phantom_share=1.0)
    x, public = asked_volumes(bench.distill(schedule=never), schedule=never, sampler=bench.sampler, count=5)
    assert len(x) == 0 and public is None


def test_final_volumes_name_their_phantoms(bench: Bench) -> None:
    """An untrained generator returns them, so the pair must agree to the last voxel, mirrored draws or not."""
    state = bench.distill(objective=NOTHING, schedule=replace(SHORT, rounds=1))
    made = list(final_volumes(state, sampler=bench.sampler, count=4, size=SIZE, seed=5, device=CPU))
    images, _ = bench.sampler.pool()
    for x, public in made:
        assert public is not None and torch.equal(x, public.base[0])
        assert torch.equal(x, images[int(public.phantoms)].float())
    assert any(bool(bench.sampler.draw(10_000_000 + i, 1).mirrored.any()) for i in range(4))


# --- hospitals that fail ----------------------------------------------------------------------------------------------


def test_fewer_replies_than_the_quorum_stop_the_run_by_name(bench: Bench) -> None:
    federation = Unreliable(bench.nodes(), lambda site, query: site == "south" and query.round == 2)
    with pytest.raises(ProtocolError, match=r"expected replies from 2 hospitals, found 1; failed: south \(timeout\)"):
        bench.distill(federation=federation)


@pytest.mark.parametrize("kind", ["answer", "pull_back"])
def test_a_quorum_carries_a_round_and_the_missing_site_comes_back(bench: Bench, kind: str) -> None:
    federation = Unreliable(
        bench.nodes(), lambda site, query: site == "north" and query.kind == kind and query.round in (2, 3)
    )
    state = bench.distill(federation=federation, quorum=1, schedule=replace(SHORT, rounds=5))
    assert [record["sites"] for record in state.history] == ([2, 1, 1, 2, 2] if kind == "answer" else [2] * 5)


def test_one_lasting_hospital_of_two_is_enough_for_a_quorum_of_one(bench: Bench) -> None:
    federation = Unreliable(bench.nodes(), lambda site, query: site == "north" and query.round > 0)
    state = bench.distill(federation=federation, quorum=1)
    assert [record["sites"] for record in state.history] == [1] * 4


def test_class_counts_are_needed_from_all(bench: Bench) -> None:
    federation = Unreliable(bench.nodes(), lambda site, query: site == "north" and query.kind == "describe")
    with pytest.raises(ProtocolError, match=r"describe: expected replies from 2 hospitals, found 1; failed: north"):
        bench.distill(federation=federation, quorum=1)


def test_replies_of_another_round_do_not_count(bench: Bench) -> None:
    class Late(Unreliable):
        def ask(self, queries: Mapping[str, Query], *, quorum: int, timeout_s: float) -> dict[str, Reply | SiteFailure]:
            outcome = super().ask(queries, quorum=quorum, timeout_s=timeout_s)
            return {s: replace(r, round=r.round - 1) if s == "south" else r for s, r in outcome.items()}

    with pytest.raises(ProtocolError, match=r"south \(no fitting reply\)"):
        bench.distill(federation=Late(bench.nodes(), lambda *_: False))


# --- combinations that do not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sampler": None}, "unconditional"),
        ({"mode": None, "sampler": None}, "unconditional"),
        ({"mode": "unconditional", "sampler": None}, "no mask"),
        ({"objective": GeneratorObjective(divergence="kl")}, "jensen_shannon, released, information"),
        ({"quorum": 3}, "quorum of 1 to 2"),
        ({"quorum": 0}, "quorum of 1 to 2"),
        ({"schedule": replace(SHORT, replay=0)}, "replay"),
        ({"schedule": replace(SHORT, checkpoint_every=0)}, "checkpoint_every"),
        ({"schedule": replace(SHORT, phantom_share=1.5)}, "phantom_share"),
        ({"schedule": replace(SHORT, rehearsal=0.9)}, "rehearsal"),
        ({"schedule": replace(SHORT, rehearsal=-0.4)}, "rehearsal"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anyone_is_asked(
    bench: Bench, changes: dict[str, Any], complaint: str
) -> None:
    federation = Unreliable(bench.nodes(), lambda *_: pytest.fail("a hospital was asked"))
    with pytest.raises(SettingsError, match=complaint):
        bench.distill(federation=federation, **changes)


# --- resuming ---------------------------------------------------------------------------------------------------------


class InterruptedRunError(Exception):
    """Raised inside a round's report, where a process might die."""


def interrupt_after(number: int) -> Callable[[Mapping[str, float]], None]:
    def on_round(record: Mapping[str, float]) -> None:
        if record["round"] == number:
            raise InterruptedRunError

    return on_round


@pytest.mark.parametrize(
    ("mode", "stop"), [("conditional", 2), ("conditional", 3), ("conditional", 5), ("unconditional", 3), (None, 3)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(bench: Bench, mode: str | None, stop: int) -> None:
    """Bit for bit, with new nodes and networks, whether it stopped at a checkpoint (every second round) or after."""
    arguments: dict[str, Any] = {"mode": mode, "schedule": replace(SHORT, rounds=6, phantom_share=0.5)}
    if mode == "unconditional":
        arguments |= {"objective": PAPER_OBJECTIVE, "sampler": None}
    whole = bench.distill(**arguments, checkpoint=bench.folder / "whole" / "centre.pt")
    for folder in SITES:  # the reference run leaves nothing to the resumed one
        for path in (bench.folder / folder).glob("*.pt"):
            path.unlink()

    checkpoint = bench.folder / "centre.pt"
    with pytest.raises(InterruptedRunError):
        bench.distill(**arguments, checkpoint=checkpoint, on_round=interrupt_after(stop))
    assert load_state(checkpoint)["round"] == stop // 2 * 2
    rounds: list[float] = []
    resumed = bench.distill(
        **arguments, checkpoint=checkpoint, resume=True, on_round=lambda record: rounds.append(record["round"])
    )
    assert rounds[0] == stop // 2 * 2 + 1
    assert equal_states(whole, resumed)
    assert resumed.history == whole.history and resumed.round == whole.round == 6


def test_checkpoints_do_not_change_a_run(bench: Bench) -> None:
    plain, saved = bench.distill(), bench.distill(checkpoint=bench.folder / "centre.pt")
    assert equal_states(plain, saved)


def test_a_run_repeats_whatever_else_draws_random_numbers(bench: Bench) -> None:
    first = bench.distill()
    assert equal_states(first, bench.distill(on_round=lambda _: torch.rand(3)))
    assert not equal_states(first, bench.distill(seed=3))


def test_hospitals_that_live_on_are_rewound_when_the_centre_resumes(bench: Bench) -> None:
    schedule = replace(SHORT, rounds=6)
    whole = bench.distill(schedule=schedule)
    nodes = bench.nodes()
    checkpoint = bench.folder / "centre.pt"
    with pytest.raises(InterruptedRunError):
        bench.distill(
            federation=EmbeddedFederation(nodes), schedule=schedule, checkpoint=checkpoint, on_round=interrupt_after(5)
        )
    resumed = bench.distill(federation=EmbeddedFederation(nodes), schedule=schedule, checkpoint=checkpoint, resume=True)
    assert equal_states(whole, resumed)


def test_resuming_a_finished_run_asks_nobody(bench: Bench) -> None:
    checkpoint = bench.folder / "centre.pt"
    finished = bench.distill(checkpoint=checkpoint)
    federation = Unreliable(bench.nodes(), lambda *_: pytest.fail("a hospital was asked"))
    assert equal_states(finished, bench.distill(federation=federation, checkpoint=checkpoint, resume=True))


def test_resuming_without_a_checkpoint_starts_at_the_first_round(bench: Bench) -> None:
    resumed = bench.distill(checkpoint=bench.folder / "centre.pt", resume=True)
    assert equal_states(resumed, bench.distill())


def test_a_checkpoint_of_another_setting_is_refused(bench: Bench) -> None:
    checkpoint = bench.folder / "centre.pt"
    bench.distill(mode=None, checkpoint=checkpoint, schedule=replace(SHORT, rounds=2))
    with pytest.raises(WeightsError, match=r"centre\.pt.*generator.*settings the run was started with"):
        bench.distill(checkpoint=checkpoint, resume=True)
    bench.distill(checkpoint=bench.folder / "with.pt", schedule=replace(SHORT, rounds=2))
    with pytest.raises(WeightsError, match="generator"):
        bench.distill(mode=None, checkpoint=bench.folder / "with.pt", resume=True)
    other = build_segmenter("unet", width=4, depth=2)
    with pytest.raises(WeightsError, match="does not fit"):
        bench.distill(mode=None, student=other, checkpoint=checkpoint, resume=True)


SCRIPT = """
import pathlib, sys, time
import torch
from fediod_med.checkpoints import save_state
from fediod_med.data.phantoms import Grid, load_anatomy
from fediod_med.data.sampler import PublicSampler
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.node import SiteNode
from fediod_med.networks import Generator, build_segmenter
from fediod_med.privacy.gate import Gate

torch.set_num_threads(1)
CPU = torch.device("cpu")


def run(folder, *, pause, resume):
    folder = pathlib.Path(folder)
    sampler = PublicSampler(spacing=12, roi=16, count=3, seed=3, anatomy=load_anatomy(Grid((16, 16, 16), 12.0)))
    volumes = [image.float() for image, _ in sampler.volumes()]
    nodes = {}
    for index, name in enumerate(("north", "south")):
        torch.manual_seed(index)
        critic = PlainCritic(name, volumes[index:], state_dir=folder / name, seed=1, device=CPU, width=4, layers=1)
        nodes[name] = SiteNode(name, build_segmenter("unet", width=4, depth=2), torch.ones(9, 4), critic=critic,
            gate=Gate.unprotected(name), device=CPU)
    torch.manual_seed(7)

    def on_round(record):
        (folder / "rounds.txt").open("a").write(f"{int(record['round'])}\\n")
        time.sleep(pause)

    state = distill(EmbeddedFederation(nodes), student=build_segmenter("unet", width=4, depth=2),
        generator=Generator("conditional", size=16, width=4), sampler=sampler, objective=GeneratorObjective(),
        schedule=Schedule(rounds=14, student_steps=2, replay=6, checkpoint_every=4), size=16, seed=2, run_id="killed",
        device=CPU, checkpoint=folder / "centre.pt", resume=resume, on_round=on_round)
    save_state(folder / "end.pt", state.state_dict())


if sys.argv[1] == "victim":
    run(sys.argv[2], pause=0.15, resume=False)
else:
    run(sys.argv[2], pause=0, resume=True)
    run(sys.argv[3], pause=0, resume=False)
"""


def test_a_run_killed_at_any_moment_and_resumed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """SIGKILL gives no chance to save: only what lies on disk continues, in a new process."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT, encoding="utf-8")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    victim = subprocess.Popen([sys.executable, str(script), "victim", str(killed)], stderr=subprocess.PIPE)
    log = killed / "rounds.txt"
    deadline = time.monotonic() + 120
    try:
        while not log.is_file() or len(log.read_text().split()) < 6:
            if victim.poll() is not None or time.monotonic() > deadline:
                victim.kill()
                pytest.fail(f"the run ended before it was killed: {victim.communicate()[1].decode()}")
            time.sleep(0.02)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    before = [int(line) for line in log.read_text().split()]
    saved = load_state(killed / "centre.pt")["round"]
    assert before[-1] < 14 and saved in (4, 8, 12) and not (killed / "end.pt").exists()

    subprocess.run([sys.executable, str(script), "resume", str(killed), str(whole)], check=True, timeout=120)
    after = [int(line) for line in log.read_text().split()][len(before) :]
    assert after == list(range(saved + 1, 15))  # it continued from the checkpoint, not from the start
    resumed, uninterrupted = load_state(killed / "end.pt"), load_state(whole / "end.pt")
    assert resumed["history"] == uninterrupted["history"]
    for part in ("student", "student_average", "generator", "generator_average", "student_optimizer", "replay"):
        first, second = tensors_of(resumed[part]), tensors_of(uninterrupted[part])
        assert len(first) == len(second) > 0
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), part


def test_queries_of_a_run_are_messages(bench: Bench) -> None:
    """Whatever the centre asks can be sent; settings are plain values."""
    asked: list[Query] = []
    federation = Unreliable(bench.nodes(), recorder(asked))
    bench.distill(federation=federation, checkpoint=bench.folder / "centre.pt", schedule=replace(SHORT, rounds=2))
    assert {query.kind for query in asked} == {"describe", "answer", "pull_back"}
    assert all(pack(query) for query in asked)
    snapshots = {q.round for q in asked if q.kind == "answer" and q.settings["snapshot"]}
    assert snapshots == {2}


def test_the_average_of_few_steps_has_forgotten_the_start() -> None:
    average = torch.zeros(())
    for step in range(1, 31):
        average = warmed_average(average, torch.ones(()), step, decay=0.99)
    assert float(average) > 0.99, "a decay of .99 from the start would leave .74 of it"
    assert float(warmed_average(torch.zeros(()), torch.ones(()), 10_000, decay=0.99)) == pytest.approx(0.01)


def test_a_run_with_every_addition_resumes_to_the_same_weights(bench: Bench) -> None:
    additions: dict[str, Any] = {"mirrored": True, "candidates": 3, "mixup": True, "selection": True}
    schedule = replace(SHORT, rounds=10, phantom_share=0.5, checkpoint_every=3, **additions)
    objective = replace(GeneratorObjective(), entropy=0.2, learned=1.0)
    arguments: dict[str, Any] = {"schedule": schedule, "objective": objective}
    whole = bench.distill(**arguments)
    checkpoint = bench.folder / "centre.pt"
    with pytest.raises(InterruptedRunError):
        bench.distill(**arguments, checkpoint=checkpoint, on_round=interrupt_after(7))
    resumed = bench.distill(**arguments, checkpoint=checkpoint, resume=True)
    assert equal_states(whole, resumed)
    assert len(whole.held_out) == 1 and whole.best is not None and whole.log_weights is not None
    plain = bench.distill(schedule=replace(SHORT, rounds=10, phantom_share=0.5))
    assert not equal_states(whole, plain)


def test_a_search_asks_about_the_volumes_on_which_the_student_errs_most(bench: Bench, sampler: PublicSampler) -> None:
    """With a student that stands still, the volumes asked about are the two worst of the six drawn."""
    schedule = replace(SHORT, rounds=1, batch=2, candidates=3, student_steps=0)
    state = bench.distill(mode=None, schedule=schedule, objective=NOTHING)
    drawn = sampler.draw(1, 6)
    with torch.no_grad():
        guess = torch.softmax(state.student.eval()(drawn.base), dim=1)
    dice = [float(public_dice(guess[i][None, None], drawn.classes[i][None])[0, 1:].mean()) for i in range(6)]
    worst = sorted(range(6), key=dice.__getitem__)[:2]
    assert len({*dice}) == 6
    assert torch.equal(state.replay[0]["x"], drawn.base[worst].half())
    assert torch.equal(state.replay[0]["classes"], drawn.classes[worst].to(torch.uint8))


def test_asked_volumes_of_a_search_come_with_their_own_phantoms(bench: Bench, sampler: PublicSampler) -> None:
    schedule = replace(SHORT, rounds=3, batch=1, candidates=3, generator_rate=0.0)
    state = bench.distill(schedule=schedule)
    x, public = asked_volumes(state, schedule=schedule, sampler=sampler, count=9)
    assert public is not None and len(x) >= 1
    assert torch.equal(x, public.base.half().float())  # a generator that stands still returns the phantom


def test_the_selected_student_is_the_one_that_agrees_best_with_answers_it_never_learned_from(bench: Bench) -> None:
    schedule = replace(SHORT, rounds=16, phantom_share=0.5, selection=True, ema=0.0)
    student = build_segmenter("unet", width=8, depth=2)

    def spoil(record: Mapping[str, float]) -> None:
        """Make the student so bad before the last round that its two steps cannot mend it."""
        if record["round"] == 15:
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.mul_(-5)

    state = bench.distill(schedule=schedule, student=student, on_round=spoil)
    judged = {int(record["round"]): record["held_out"] for record in state.history if "held_out" in record}
    assert sorted(judged) == [8, 10, 12, 14, 16]
    assert state.best is not None and state.best["round"] == min(judged, key=judged.__getitem__) != 16
    assert len(state.held_out) == 1 and len(state.replay) == min(15, schedule.replay)
    kept = state.held_out[0]
    assert all(not torch.equal(kept["x"], pair["x"]) for pair in state.replay)
    student = state.student_average.module.eval()
    with torch.no_grad():
        logits = student(kept["x"].float()).float()
    target = kept["q"].float()
    loss = transfer_divergence(target, logits) + soft_dice(torch.softmax(logits, dim=1), target)
    assert float(loss) == pytest.approx(min(judged.values()), rel=1e-4)


def test_a_checkpoint_from_before_selection_and_learned_weights_is_continued(bench: Bench) -> None:
    whole = bench.distill()
    checkpoint = bench.folder / "centre.pt"
    with pytest.raises(InterruptedRunError):
        bench.distill(checkpoint=checkpoint, on_round=interrupt_after(3))
    state = load_state(checkpoint)
    save_state(checkpoint, {k: v for k, v in state.items() if k not in ("log_weights", "held_out", "best")})
    assert equal_states(whole, bench.distill(checkpoint=checkpoint, resume=True))


def test_what_is_held_out_is_every_fifth_round_of_the_first_half() -> None:
    schedule = replace(SHORT, rounds=40, selection=True)
    assert [n for n in range(1, 41) if is_held_out(n, schedule)] == [5, 10, 15, 20]
    assert not any(is_held_out(n, replace(schedule, selection=False)) for n in range(1, 41))


def test_a_hospital_that_did_not_answer_keeps_its_place_among_the_learned_weights(
    bench: Bench, sampler: PublicSampler
) -> None:
    """Two of three answer, and alike: nothing is learned, so nothing moves. Unlike answers move those two alone."""
    state = bench.distill(schedule=replace(SHORT, rounds=1))
    before = torch.tensor([[2.0] * 4, [-1.0] * 4, [-1.0] * 4])
    public = sampler.draw(1, 2)
    probs = torch.rand((2, 2, 4, *public.classes.shape[1:]), generator=torch.Generator().manual_seed(0))
    probs = probs / probs.sum(dim=2, keepdim=True)
    alike = probs[:1].expand(2, *probs.shape[1:])
    for answers, same in ((alike, True), (probs, False)):
        state.log_weights = before.clone()
        learn_log_weights(state, answers, public, torch.ones(2, 4), [0, 1], 3, step=1.0)
        assert torch.equal(state.log_weights[2], before[2])
        assert torch.allclose(state.log_weights[:2].mean(dim=0), before[:2].mean(dim=0), atol=1e-6)
        assert torch.allclose(state.log_weights, before, atol=1e-6) == same


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": replace(SHORT, candidates=0)},
        {"objective": replace(GeneratorObjective(), entropy=-1.0)},
        {"objective": replace(GeneratorObjective(), learned=-1.0)},
        {"schedule": replace(SHORT, rounds=9, selection=True)},
    ],
)
def test_impossible_additions_are_refused(bench: Bench, changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"candidates|entropy|learned|selection"):
        bench.distill(**changes)
