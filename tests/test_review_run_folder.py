"""A run folder read for display: what is there, why something is not, and never a promise that nobody made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fediod_med.errors import InputError
from fediod_med.privacy.accounting import rdp_epsilon
from fediod_med.privacy.gate import Gate
from fediod_med.privacy.keys import ledger_key
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.policy import PrivacyPolicy, count_part, training_part, universe_id
from fediod_med.review.audit_table import audit_rows, audit_words
from fediod_med.review.ledger_timeline import SiteVerification, ledger_timeline, verified
from fediod_med.review.run_folder import differences_by_case, read_run

PRIVATE = {"mode": "dp-sgd", "epsilon": 7.9994, "delta": 1e-5, "budget": 8.0, "patients": 24, "statement": "so it is"}
NONE = {"mode": "none", "epsilon": None, "delta": None, "statement": "not private"}
HEAD = "subject_id,site,region,dice,hd95_mm,reference_empty,notice\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two hospitals with everything but an audit."""
    folder = tmp_path / "run"
    for name in ("scores", "synthetic", "figures"):
        (folder / name).mkdir(parents=True)
    summary = {
        "privacy": {"north": PRIVATE, "south": PRIVATE},
        "held_out": {"north": "fold 0 of 4", "south": "fold 0 of 4"},
        "rows": {"site:north": {"mean": 0.5}, "student": {"mean": 0.6}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"command": "distill", "privacy": summary["privacy"]}))
    (folder / "history.json").write_text(json.dumps({"rounds": [{"round": 1, "student": 0.3}, {"round": 2}]}))
    (folder / "run_id").write_text("abc123\n")
    for key, dice in (("student", 0.8), ("site-north", 0.7)):
        rows = [f"{case},north,{r},{dice},3.5,false,n\n" for case in ("c2", "c1") for r in ("ET", "TC", "WT")]
        (folder / "scores" / f"{key}.csv").write_text(HEAD + "".join(rows))
    for name in ("synthetic-00", "synthetic-00_labels", "synthetic-00_teacher-north", "synthetic-00_student"):
        (folder / "synthetic" / f"{name}.nii.gz").touch()
    (folder / "synthetic" / "round-000030").mkdir()
    (folder / "synthetic" / "round-000030" / "synthetic-00.nii.gz").touch()
    (folder / "figures" / "panel.png").touch()
    return folder


def privacy(run: Path, terms: object, **more: object) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "privacy": terms, **more}))


def test_everything_small_is_read(run: Path) -> None:
    found = read_run(run)
    assert (found.run_id, found.sites) == ("abc123", ("north", "south"))
    assert found.banner == "Differentially private per patient: epsilon at most 8"
    assert found.rows is not None and found.rows["student"]["mean"] == 0.6
    assert found.privacy is not None and found.privacy[0].words == "dp-sgd, epsilon 8 at delta 1.0e-05, per patient"
    assert found.history is not None and len(found.history) == 2
    assert found.figures == {"panel": run / "figures" / "panel.png"}
    assert set(found.absent) == {"audit", "audit_figures", "synthetic_quality"}
    assert "fediod privacy audit" in found.why("audit")
    assert found.why("rows") == ""


def test_scores_come_with_their_models_key_in_a_fixed_order(run: Path) -> None:
    scores = read_run(run).scores
    assert scores is not None
    assert [(s.model, s.case, s.region) for s in scores[:4]] == [
        ("site:north", "c1", "TC"),
        ("site:north", "c1", "WT"),
        ("site:north", "c1", "ET"),
        ("site:north", "c2", "TC"),
    ]
    assert scores[-1].model == "student" and scores[-1].dice == 0.8 and not scores[-1].reference_empty
    differences = differences_by_case(scores, "student", "site:north", "WT")
    assert [(case, site) for case, site, _ in differences] == [("c1", "north"), ("c2", "north")]
    assert differences[0][2] == pytest.approx(0.1)


def test_synthetic_volumes_know_their_round_labels_and_answers(run: Path) -> None:
    volumes = read_run(run).synthetic
    assert volumes is not None
    early, late = volumes
    assert (early.round, late.round) == (30, None)
    assert early.label_map is None and early.answers == {}
    assert late.label_map == run / "synthetic" / "synthetic-00_labels.nii.gz"
    assert list(late.answers) == ["north"] and list(late.others) == ["student"]


@pytest.mark.parametrize(
    ("terms", "banner"),
    [
        ({"north": PRIVATE, "south": NONE}, "NOT PRIVATE: south"),
        ({"north": PRIVATE}, "NOT PRIVATE: south"),  # named by the run, and without terms
        ({"north": PRIVATE, "south": {**PRIVATE, "epsilon": None}}, "NOT PRIVATE: south"),
        ({"north": PRIVATE, "south": {**PRIVATE, "delta": None}}, "NOT PRIVATE: south"),
        ({"north": PRIVATE, "south": {**PRIVATE, "mode": "trust me"}}, "NOT PRIVATE: south"),
        ({"north": PRIVATE, "south": {**PRIVATE, "epsilon": float("inf")}}, "NOT PRIVATE: south"),
        ({"north": {}, "south": {}}, "NOT PRIVATE: north, south"),
        ([], "NOT PRIVATE: the run does not say"),
    ],
)
def test_a_hospital_without_a_promise_makes_the_run_not_private(run: Path, terms: object, banner: str) -> None:
    privacy(run, terms)
    assert read_run(run).banner.startswith(banner)


def test_the_banner_is_that_of_the_outputs(run: Path) -> None:
    from fediod_med.checkpoints import Provenance
    from fediod_med.inference import privacy_banner

    for south in (PRIVATE, NONE):
        privacy(run, {"north": PRIVATE, "south": south})
        provenance = Provenance(
            kind="student",
            network={},
            spacing=2.0,
            label_scheme="brats2023",
            sites=("north", "south"),
            privacy={"north": PRIVATE, "south": south},
            trained_on="phantoms",
            seed=0,
        )
        assert read_run(run).banner == privacy_banner(provenance)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"rounds": 3}', '{"rounds": [1]}', "null"])
def test_a_damaged_file_hides_nothing_else(run: Path, damage: str) -> None:
    (run / "history.json").write_text(damage)
    found = read_run(run)
    assert found.history is None and "history" in found.why("history")
    assert found.scores is not None and found.rows is not None


def test_whatever_is_missing_has_a_reason_and_no_exception(run: Path) -> None:
    (run / "scores" / "student.csv").write_text("a,b\n1,2\n")
    found = read_run(run)
    assert found.scores is None and "scores" in found.why("scores")
    for entry in list(run.iterdir()):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    empty = read_run(run)
    parts = ("summary", "record", "rows", "privacy", "history", "synthetic", "figures", "scores", "audit")
    assert all(getattr(empty, name) is None and empty.why(name) for name in parts)
    assert empty.banner.startswith("NOT PRIVATE") and empty.run_id == "run"
    with pytest.raises(InputError, match="expected a run folder"):
        read_run(run / "nowhere")


def test_links_that_lead_out_of_the_run_are_left_alone(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.touch()
    for path in (run / "figures" / "other.png", run / "synthetic" / "other.nii.gz", run / "scores" / "other.csv"):
        path.symlink_to(secret)
    (run / "history.json").unlink()
    (run / "history.json").symlink_to(secret)
    found = read_run(run)
    assert list(found.figures or ()) == ["panel"]
    assert [volume.name for volume in found.synthetic or ()] == ["synthetic-00", "synthetic-00"]
    assert {score.model for score in found.scores or ()} == {"student", "site:north"}
    assert found.history is None and "leads out" in found.why("history")


# --- ledgers ----------------------------------------------------------------------------------------------------------

PARTS = {
    "counts": count_part(Mechanism(9.0, 1.0, 9), dim=2),
    "teacher": training_part(Mechanism(9.0, 0.5, 5), clip_norm=1.0),
}


@pytest.fixture
def ledger(run: Path, tmp_path: Path) -> Path:
    """The run, with the ledger of `north`: two releases and a training; and its claim."""
    pytest.importorskip("opacus")
    keys = tmp_path / "keys"
    policy = PrivacyPolicy(
        site="north",
        mode="dp-sgd",
        epsilon=8.0,
        delta=1e-5,
        patients=2,
        universe=universe_id(("p1", "p2"), ledger_key(keys)),
        parts=PARTS,
    )
    gate = Gate.open(tmp_path / "log", key_folder=keys, policy=policy, patients=("p1", "p2"))
    for query in "qr":
        gate.release("counts", query_id=query, query_digest="d", compute=lambda: np.eye(2), seal=lambda v: v.tobytes())
    gate.finish_training(gate.begin_training("teacher", run_id="r", settings_digest="s"), "w")
    shutil.copytree(tmp_path / "log", run / "privacy" / "north")
    assert gate.head is not None
    head = {"sequence": gate.head.sequence, "hash": gate.head.hash}
    claim = {"mode": "dp-sgd", "epsilon": gate.spent_epsilon(), "delta": 1e-5, "ledger_head": head}
    privacy(run, {"north": claim}, held_out={"north": "fold 0 of 4"})
    return run


def test_the_timeline_adds_up_as_the_accountant_does(ledger: Path) -> None:
    timeline = ledger_timeline(ledger, "north")
    assert (timeline.budget, timeline.delta, timeline.mode, timeline.patients) == (8.0, 1e-5, "dp-sgd", 2)
    assert [(e.event, e.kind) for e in timeline.events] == [
        ("open", ""),
        ("charge", "counts"),
        ("done", "counts"),
        ("charge", "counts"),
        ("done", "counts"),
        ("train", "teacher"),
        ("trained", "teacher"),
    ]
    counts, teacher = Mechanism(9.0, 1.0, 1), Mechanism(9.0, 0.5, 5)
    steps: list[list[Mechanism]] = [[], [counts], [counts], [counts] * 2, [counts] * 2]
    steps += [[counts, counts, teacher]] * 2
    for event, spent in zip(timeline.events, steps, strict=True):
        assert event.epsilon == pytest.approx(rdp_epsilon(spent, 1e-5), rel=1e-9)
    claimed = json.loads((ledger / "summary.json").read_text())["privacy"]["north"]["epsilon"]
    assert timeline.events[-1].epsilon == pytest.approx(claimed)
    assert timeline.events[5].steps == 5 and timeline.problem == ""


def test_a_changed_record_ends_the_timeline_with_a_reason(ledger: Path) -> None:
    path = ledger / "privacy" / "north" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3].replace(b'"steps":1', b'"steps":2'), *lines[4:]]))
    timeline = ledger_timeline(ledger, "north")
    assert len(timeline.events) == 3 and "changed after it was written" in timeline.problem
    path.write_bytes(b"")
    assert "empty" in ledger_timeline(ledger, "north").problem
    assert "without a privacy promise" in ledger_timeline(ledger, "south").problem


def only(found: tuple[SiteVerification, ...] | str) -> SiteVerification:
    assert not isinstance(found, str) and len(found) == 1
    return found[0]


def test_verification_holds_until_something_is_changed(ledger: Path) -> None:
    found = only(verified(ledger))
    assert found.ok and found.site == "north" and found.statement.startswith("(epsilon =")
    (ledger / "privacy" / "north" / "ledger.jsonl").unlink()
    found = only(verified(ledger))
    assert not found.ok and found.statement.startswith("NOT VERIFIED")
    (ledger / "summary.json").unlink()
    assert isinstance(verified(ledger), str)


# --- audits -----------------------------------------------------------------------------------------------------------


def test_audit_rows_stand_beside_their_claims() -> None:
    attack = {
        "target": "teacher:north",
        "attack": "loss",
        "members": 24,
        "non_members": 8,
        "auc": 0.6,
        "auc_interval": [0.4, 0.8],
        "p_value": 0.1,
        "epsilon": {"epsilon": 0.2, "ceiling": 0.4},
        "claim": {"epsilon": 8.0, "delta": 1e-5},
        "contradicts_claim": False,
    }
    canaries = {
        "target": "teacher:north",
        "epsilon_lower_bound": 1.5,
        "canaries": 100,
        "inserted": 47,
        "ceiling": 4.0,
        "claimed_epsilon": 8.0,
        "contradicts_claim": False,
    }
    audit = {
        "attacks": [attack, {**attack, "claim": None, "contradicts_claim": True}, "odd"],
        "one_run": [canaries],
        "alarms": ["student, loss"],
        "meaning": "Lower bounds.",
        "skipped": ["x"],
    }
    first, second, third = audit_rows(audit)
    assert (first.auc_low, first.lower_bound, first.ceiling, first.claimed) == (0.4, 0.2, 0.4, 8.0)
    assert second.contradicts and second.claimed is None
    assert (third.attack, third.lower_bound, third.claimed) == ("canaries in one run", 1.5, 8.0)
    assert (third.members, third.non_members) == (47, 53)
    assert audit_words(audit) == ("ALARM: student, loss", "Lower bounds.", "Skipped: x")
    assert audit_rows({}) == () and audit_words({"alarms": None}) == ()
