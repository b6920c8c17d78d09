"""The two ends of a federation over an engine, without the engine: exact, exactly once, and resumable anywhere."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fediod_med.errors import BudgetExceeded, ProtocolError, SettingsError
from fediod_med.federation.flare.centre import SegmentEnd, claim, finish, run_rounds
from fediod_med.federation.flare.desk import Desk, refusal
from fediod_med.federation.flare.journal import Journal
from fediod_med.federation.flare.plan import HospitalPlan
from fediod_med.federation.flare.remote import RemoteFederation
from fediod_med.federation.flare.replies import Envelope, ReplyStore, only_process
from fediod_med.federation.flare.settings import RunSettings, read_settings
from fediod_med.hospitals import open_federation, open_hospital
from fediod_med.privacy.ledger import LEDGER
from fediod_med.privacy.records import Head
from fediod_med.protocol import Query, Reply, SiteFailure, pack, unpack
from fediod_med.site_gate import open_gate
from fediod_med.sites import load_site
from tests.flare_parties import ROI, SPACING, write_hospitals

NAMES = ("north", "south", "west")
CPU = torch.device("cpu")
SHAPE = (2, 4, ROI, ROI, ROI)
GRADIENT = "epsilon: 8.0\nprivacy_mode: gradient\nreleases: 4\nclip_norm: 1.0\npatient_ids: subjects\n"


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals without privacy, on disk; tests read them only."""
    root = tmp_path_factory.mktemp("hospitals")
    write_hospitals(root, NAMES)
    return root


def plan(root: Path, name: str, state: Path) -> HospitalPlan:
    return HospitalPlan(root / "sites" / name, None, root / "sites", state / name, "cpu", 0)


def desk(root: Path, name: str, state: Path) -> Desk:
    return Desk(plan(root, name, state), name=name)


def settings(**changed: Any) -> RunSettings:
    values: dict[str, Any] = {
        "run_id": "run-1",
        "sites": list(NAMES),
        "spacing": SPACING,
        "roi": ROI,
        "pool": 2,
        "quorum": 3,
        "schedule": {"rounds": 3, "student_steps": 1, "checkpoint_every": 2, "batch": 1, "student_batch": 2},
        "data_name": "phantoms",
    }
    return read_settings(values | changed)


class DirectCourier:
    """Carries contents to desks in this process; `before` may raise, drop or change what is on its way."""

    def __init__(self, desks: Mapping[str, Desk]) -> None:
        self.desks = dict(desks)
        self.trips: list[tuple[str, tuple[str, ...]]] = []
        self.late: set[str] = set()
        self.before: Callable[[int, str], str | None] = lambda _trip, _site: None

    def carry(
        self, task: str, contents: Mapping[str, Mapping[str, Any]], *, quorum: int, timeout_s: float, grace_s: float
    ) -> dict[str, Mapping[str, Any] | str]:
        self.trips.append((task, tuple(contents)))
        found: dict[str, Mapping[str, Any] | str] = {}
        for site, content in contents.items():
            lost = self.before(len(self.trips), site)
            if lost == "query lost":
                continue
            if task == "fediod_account":
                found[site] = {"account": self.desks[site].account()}
                continue
            seen = None if content["sequence"] is None else Head(content["sequence"], content["hash"])
            try:
                answer: Mapping[str, Any] = dataclasses.asdict(self.desks[site].answer(content["message"], seen=seen))
            except Exception as error:
                answer = {"refused": refusal(error)}
            if lost != "reply lost":
                found[site] = answer
        return found

    def heard(self) -> frozenset[str]:
        late, self.late = frozenset(self.late), set()
        return late


def remote(courier: DirectCourier, folder: Path, names: tuple[str, ...] = NAMES) -> RemoteFederation:
    return RemoteFederation(names, courier, folder=folder, grace_s=1, settings={"spacing": SPACING})


def forget_saved(federation: RemoteFederation, record: Mapping[str, float]) -> None:
    """As the controller does: what a checkpoint covers need not be remembered, and nothing else may be dropped."""
    if record["round"] % 2 == 0:
        federation.journal.forget(int(record["round"]))


def no_pause(_record: Mapping[str, float]) -> None:
    return


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_over_desks_equals_the_embedded_federation_bit_for_bit(hospitals: Path, tmp_path: Path) -> None:
    opened = []
    for name in NAMES:
        site = load_site(hospitals / "sites" / name)
        opened.append(
            open_hospital(
                site,
                open_gate(site),
                out=tmp_path / "embedded",
                seed=0,
                device="cpu",
                teachers=hospitals / "sites",
                sampler=None,
                on_epoch=lambda _a, _b, _c: None,
                on_step=lambda _a, _b: None,
            )
        )
    embedded = open_federation(opened, out=tmp_path / "embedded", seed=0, run_id="run-1", device=CPU, adversarial=True)
    reference = run_rounds(embedded, settings(), folder=tmp_path / "e", device="cpu", on_round=no_pause)
    courier = DirectCourier({name: desk(hospitals, name, tmp_path / "state") for name in NAMES})
    federation = remote(courier, tmp_path / "r")
    state = run_rounds(federation, settings(), folder=tmp_path / "r", device="cpu", on_round=no_pause)
    assert same_weights(state.student_average, reference.student_average)
    assert state.generator is not None and reference.generator is not None
    assert same_weights(state.generator, reference.generator)
    assert state.history == reference.history
    assert federation.bytes_up == embedded.bytes_up

    privacy = finish(state, federation, settings(), folder=tmp_path / "r", device="cpu")
    assert {site: terms["mode"] for site, terms in privacy.items()} == dict.fromkeys(NAMES, "none")
    for name in ("student.safetensors", "summary.json", "run.json", "history.json", "bundle/models"):
        assert (tmp_path / "r" / name).exists()
    assert "NOT PRIVATE" in (tmp_path / "r" / "summary.json").read_text(encoding="utf-8")


class PowerFailure(BaseException):
    """Ends the centre between two messages."""


@dataclasses.dataclass(frozen=True)
class PowerCut:
    """Fails in the second trip of a life, before this site is asked."""

    site: str

    def __call__(self, trip: int, site: str) -> str | None:
        if (trip, site) == (2, self.site):
            raise PowerFailure
        return None


@pytest.mark.slow
def test_a_centre_and_hospitals_that_die_anywhere_end_with_the_same_weights(hospitals: Path, tmp_path: Path) -> None:
    """Every trip of the run is cut once before and once after the hospitals have answered; both sides restart."""

    def fresh(state: Path) -> DirectCourier:
        return DirectCourier({name: desk(hospitals, name, state) for name in NAMES})

    whole = fresh(tmp_path / "whole-state")
    reference = run_rounds(
        remote(whole, tmp_path / "whole"), settings(), folder=tmp_path / "whole", device="cpu", on_round=no_pause
    )
    cut_at = 1
    while True:
        courier = fresh(tmp_path / "state")

        courier.before = PowerCut("north" if cut_at % 2 else "west")
        federation = remote(courier, tmp_path / "cut")
        try:
            state = run_rounds(
                federation,
                settings(),
                folder=tmp_path / "cut",
                device="cpu",
                on_round=partial(forget_saved, federation),
            )
            break
        except PowerFailure:
            cut_at += 1
            assert cut_at < 20, "a life that ends in its second trip must bring the run one trip further"
    assert cut_at >= 5  # one trip a life: answers of three rounds, pull-backs of two, and the description
    assert same_weights(state.student_average, reference.student_average)
    assert state.history == reference.history


def test_a_segment_can_pause_and_the_run_goes_on(hospitals: Path, tmp_path: Path) -> None:
    def pause(record: Mapping[str, float]) -> None:
        if record["round"] == 1:
            raise SegmentEnd("asked")

    courier = DirectCourier({name: desk(hospitals, name, tmp_path / "state") for name in NAMES})
    with pytest.raises(SegmentEnd):
        run_rounds(remote(courier, tmp_path), settings(), folder=tmp_path, device="cpu", on_round=pause)
    before = len(courier.trips)
    rounds: list[int] = []
    run_rounds(
        remote(courier, tmp_path),
        settings(),
        folder=tmp_path,
        device="cpu",
        on_round=lambda record: rounds.append(int(record["round"])),
    )
    assert rounds == [1, 2, 3]  # there is no checkpoint before round 2; round 1 comes from the journal
    assert len(courier.trips) - before == 3  # round 2 shows a phantom: its answer needs no pull-back


def answer(number: int = 1, seed: int = 0, **changed: Any) -> bytes:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    asked = {"adversarial": True, "differentiate": True, "snapshot": True, "spacing": SPACING, **changed}
    return pack(Query("answer", "run-1", number, {"x": x}, asked))


def pull_back(number: int = 1) -> bytes:
    return pack(Query("pull_back", "run-1", number, {"logit_gradient": torch.ones(SHAPE)}))


def test_a_query_that_comes_again_is_answered_with_the_same_bytes(hospitals: Path, tmp_path: Path) -> None:
    first = desk(hospitals, "north", tmp_path)
    reply = first.answer(answer())
    assert first.answer(answer()) == reply
    assert desk(hospitals, "north", tmp_path).answer(answer()) == reply  # after a restart, too
    with pytest.raises(ProtocolError, match="answered for another query"):
        first.answer(answer(seed=1))


def test_a_restart_between_the_trips_of_a_round_changes_nothing(hospitals: Path, tmp_path: Path) -> None:
    steady = desk(hospitals, "south", tmp_path / "a")
    steady.answer(answer())
    restarted = desk(hospitals, "south", tmp_path / "b")
    restarted.answer(answer())
    restarted = desk(hospitals, "south", tmp_path / "b")
    assert restarted.answer(pull_back()).payload == steady.answer(pull_back()).payload
    with pytest.raises(ProtocolError, match="without its answer"):
        restarted.answer(pull_back(7))


def test_no_query_is_charged_twice_and_the_budget_ends_the_answers(tmp_path: Path) -> None:
    write_hospitals(tmp_path, ["north"], privacy={"north": GRADIENT})
    asked = desk(tmp_path, "north", tmp_path / "state")
    asked.answer(pack(Query("describe", "run-1", 0)))
    ledger = tmp_path / "sites" / "north" / "privacy" / LEDGER

    def charges() -> int:
        return ledger.read_text(encoding="utf-8").count('"event":"charge"')

    one = asked.answer(answer(adversarial=False))
    spent = charges()
    assert one.mode == "gradient" and one.epsilon is not None and one.epsilon > 0
    again = desk(tmp_path, "north", tmp_path / "state").answer(answer(adversarial=False))
    assert again == one and charges() == spent
    shutil.rmtree(tmp_path / "state")  # the ledger alone still knows
    assert desk(tmp_path, "north", tmp_path / "state").answer(answer(adversarial=False)).payload == one.payload
    assert charges() == spent
    for number in (2, 3, 4):
        asked.answer(answer(number, adversarial=False))
    full = charges()
    with pytest.raises(BudgetExceeded):
        asked.answer(answer(5, adversarial=False))
    assert charges() == full
    with pytest.raises(Exception, match="the centre has seen record"):
        asked.answer(answer(6, adversarial=False), seen=Head(99, "a" * 64))


def test_a_desk_refuses_what_is_not_for_it(hospitals: Path, tmp_path: Path) -> None:
    asked = desk(hospitals, "west", tmp_path)
    with pytest.raises(SettingsError, match="works at 2"):
        asked.answer(answer(spacing=2.0))
    with pytest.raises(ProtocolError, match="run id"):
        asked.answer(pack(Query("describe", "../../etc", 0)))
    with pytest.raises(ProtocolError):
        asked.answer(b"code")
    with pytest.raises(SettingsError, match="expected site_name 'other'"):
        Desk(plan(hospitals, "west", tmp_path), name="other").answer(answer())
    assert refusal(BudgetExceeded("P-0017")) == "BudgetExceeded"
    assert refusal(OSError("/data/P-0017")) == "FediodError"


def test_two_processes_of_a_hospital_do_not_answer_at_once(tmp_path: Path) -> None:
    with (
        only_process(tmp_path),
        pytest.raises(ProtocolError, match="another process"),
        only_process(tmp_path, patience_s=0),
    ):
        pass
    with only_process(tmp_path):
        pass


def test_old_replies_are_dropped_but_not_the_class_counts(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path)
    kept = Envelope(b"bytes", "none", None, None, None)
    for number in range(5):
        store.keep(number, "answer" if number else "describe", "d", kept)
    left = sorted(path.name for path in (tmp_path / "replies").iterdir())
    assert left == ["000000-describe.reply", "000003-answer.reply", "000004-answer.reply"]
    assert store.find(4, "answer", "d") == kept


def test_a_site_that_misses_two_trips_is_not_asked_until_it_is_heard_of(hospitals: Path, tmp_path: Path) -> None:
    courier = DirectCourier({name: desk(hospitals, name, tmp_path / "state") for name in NAMES})
    courier.before = lambda trip, site: "reply lost" if site == "west" and trip <= 2 else None
    federation = remote(courier, tmp_path)

    def ask(number: int) -> dict[str, Reply | SiteFailure]:
        query = unpack(answer(number, adversarial=False, differentiate=False))
        assert isinstance(query, Query)
        return federation.ask(dict.fromkeys(NAMES, query), quorum=2, timeout_s=9)

    assert ask(1)["west"] == SiteFailure("west", 1, "no reply")
    assert ask(2)["west"] == SiteFailure("west", 2, "no reply")
    assert federation.absent == ("west",)
    assert ask(3)["west"] == SiteFailure("west", 3, "absent")
    assert courier.trips[2][1] == ("north", "south")
    courier.late = {"west"}
    assert isinstance(ask(4)["west"], Reply)
    assert not federation.absent


def test_a_trip_below_the_quorum_is_made_again_with_the_same_bytes(hospitals: Path, tmp_path: Path) -> None:
    courier = DirectCourier({name: desk(hospitals, name, tmp_path / "state") for name in NAMES})
    courier.before = lambda trip, site: "reply lost" if site != "north" and trip == 1 else None
    query = unpack(answer(1))
    other = unpack(answer(1, seed=5))  # as if the centre's arithmetic had not repeated itself
    assert isinstance(query, Query) and isinstance(other, Query)
    found = remote(courier, tmp_path).ask(dict.fromkeys(NAMES, query), quorum=3, timeout_s=9)
    assert sum(isinstance(reply, Reply) for reply in found.values()) == 1
    again = remote(courier, tmp_path).ask(dict.fromkeys(NAMES, other), quorum=3, timeout_s=9)
    assert all(isinstance(reply, Reply) for reply in again.values())
    assert len(courier.trips) == 2
    remote(courier, tmp_path).ask(dict.fromkeys(NAMES, query), quorum=3, timeout_s=9)
    assert len(courier.trips) == 2  # from the journal


def test_a_ledger_set_back_or_a_foreign_reply_is_a_failure_of_that_site_alone(hospitals: Path, tmp_path: Path) -> None:
    courier = DirectCourier({name: desk(hospitals, name, tmp_path / "state") for name in NAMES})
    federation = remote(courier, tmp_path)
    federation.heads["south"] = Head(7, "b" * 64)
    courier.desks["west"] = courier.desks["north"]
    query = unpack(pack(Query("describe", "run-1", 0)))
    assert isinstance(query, Query)
    found = federation.ask(dict.fromkeys(NAMES, query), quorum=1, timeout_s=9)
    assert isinstance(found["north"], Reply)
    assert found["south"] == SiteFailure("south", 0, "PrivacyError")  # the hospital itself sees that it was set back
    assert found["west"] == SiteFailure("west", 0, "ProtocolError")


def test_a_journal_keeps_the_first_question_and_forgets_what_a_checkpoint_covers(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first = journal.asked(1, "answer", {"a": b"one", "b": b"one"})
    assert journal.asked(1, "answer", {"a": b"two", "b": b"two"}) == first
    with pytest.raises(ProtocolError, match="begun with"):
        journal.asked(1, "answer", {"a": b"one"})
    assert journal.ended(1, "answer") is None
    journal.end(1, "answer", {"a": b"reply", "b": "no reply"})
    assert journal.ended(1, "answer") == {"a": b"reply", "b": "no reply"}
    journal.asked(2, "answer", {"a": b"x"})
    journal.forget(1)
    assert [path.name for path in tmp_path.iterdir()] == ["000002-answer"]


def test_a_run_folder_belongs_to_its_settings(tmp_path: Path) -> None:
    claim(tmp_path, settings())
    claim(tmp_path, settings())
    with pytest.raises(SettingsError, match="quorum"):
        claim(tmp_path, settings(quorum=2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"run_id": "../x"},
        {"sites": ["north", "north"]},
        {"sites": []},
        {"quorum": 4},
        {"mode": "eval"},
        {"schedule": {"hooks": 1}},
        {"objective": {"gan": float("nan")}},
        {"teachers": "/data"},
        {"timeout_s": 0},
    ],
)
def test_settings_are_plain_and_possible(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        settings(**wrong)


@pytest.mark.slow
def test_twenty_hospitals_complete_ten_rounds(tmp_path: Path) -> None:
    """Unlike backbones, layouts and label schemes, one with a budget, one that is away for a while."""
    names = tuple(f"site-{number:02d}" for number in range(20))
    write_hospitals(tmp_path, names, cases=1, privacy={"site-07": GRADIENT.replace("releases: 4", "releases: 40")})
    courier = DirectCourier({name: desk(tmp_path, name, tmp_path / "state") for name in names})
    courier.before = lambda trip, site: "query lost" if site == "site-11" and 4 < trip < 7 else None
    asked = settings(sites=list(names), quorum=15, schedule={"rounds": 10, "student_steps": 0, "checkpoint_every": 5})
    federation = remote(courier, tmp_path / "run", names)
    history: list[float] = []

    def on_round(record: Mapping[str, float]) -> None:
        history.append(record["sites"])
        courier.late |= set(federation.absent)  # it looks for work again

    run_rounds(federation, asked, folder=tmp_path / "run", device="cpu", on_round=on_round)
    assert len(history) == 10 and max(history) == 20 and min(history) >= 18
    assert federation.spent["site-07"]["mode"] == "gradient" and federation.spent["site-07"]["epsilon"] > 0
