"""Results from hand-made rows: means, intervals, Holm, targets, and tables that say what they are."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from fediod_med.comparison.cells import Cell
from fediod_med.comparison.plots import write_plots
from fediod_med.comparison.profiles import get_profile
from fediod_med.comparison.results import gather, holm, patient_means, signed_rank_p, targets
from fediod_med.comparison.rows import DISTILLED, all_rows, chosen_rows, row_kind
from fediod_med.comparison.storage import StoredRow
from fediod_med.comparison.students import recipe
from fediod_med.comparison.tables import escape, latex, markdown, target_lines
from fediod_med.errors import SettingsError
from fediod_med.evaluation import SubjectScore
from fediod_med.labels import REGIONS

PATIENTS = {"north": ["Brats18_N_A_1", "Brats18_N_B_1", "Brats18_N_C_1"], "south": ["Brats18_S_D_1", "Brats18_S_E_1"]}
ABOUT = {"data": "phantoms", "folds": 2, "seeds": [0, 1]}


def stored(key: str, offset: float, *, seeds: tuple[int, ...] = (0, 1)) -> list[StoredRow]:
    """A row of two folds: a patient scores `offset` plus a tenth of its place, and .02 more with the second seed."""
    rows = []
    for seed in seeds:
        for fold in range(2):
            scores = [
                SubjectScore(subject, site, region, offset + 0.1 * place + 0.02 * seed, 5.0, False)
                for site, subjects in PATIENTS.items()
                for place, subject in enumerate(subjects)
                if place % 2 == fold
                for region in REGIONS
            ]
            record = {
                "status": "done",
                "bytes": {"up": {"north": 3_000_000, "south": 1_000_000}, "down": {"north": 0, "south": 0}},
                "seconds": 60.0,
            }
            rows.append(StoredRow(key, Cell(seed, fold, 2), record, tuple(scores)))
    return rows


def results(**offsets: float) -> dict:
    rows = {key: stored(key, offset) for key, offset in offsets.items()}
    return gather(rows, site_names=list(PATIENTS), cells=4, about=ABOUT)


def test_seeds_and_visits_are_averaged_before_anything_else() -> None:
    rows = stored("ours", 0.5)
    means = patient_means(rows, "dice")
    assert len(means) == 5
    assert means["north", "Brats18_N_B"].tolist() == pytest.approx([0.61] * 4)
    visit = SubjectScore("Brats18_N_B_2", "north", "TC", 0.0, 5.0, False)
    extra = [visit, *(SubjectScore("Brats18_N_B_2", "north", r, 0.0, 5.0, False) for r in ("WT", "ET"))]
    rows.append(StoredRow("ours", Cell(2, 1, 2), rows[0].record, tuple(extra)))
    assert patient_means(rows, "dice")["north", "Brats18_N_B"][0] == pytest.approx((0.60 + 0.62 + 0.0) / 3)


def test_a_row_holds_means_sites_seeds_and_cells() -> None:
    row = results(ours=0.5)["rows"]["ours"]
    assert row["dice"]["mean"] == pytest.approx(0.5 + 0.1 * (0 + 1 + 2 + 0 + 1) / 5 + 0.01)
    assert row["sites"]["south"] == pytest.approx({"TC": 0.56, "WT": 0.56, "ET": 0.56, "mean": 0.56, "patients": 2})
    assert row["worst_site"] == "south" and row["patients"] == 5 and row["complete"]
    assert row["seed_means"]["1"] - row["seed_means"]["0"] == pytest.approx(0.02)
    assert sum(cell["n"] for cell in row["scores"]) == 10
    assert {(cell["fold"], cell["seed"]) for cell in row["scores"]} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert row["bytes"]["up"] == {"north": 3e6, "south": 1e6}


def test_a_constant_lead_has_an_interval_without_width() -> None:
    test = results(ours=0.53, fedavg=0.50)["paired"]["fedavg"]
    assert test["difference"] == pytest.approx(0.03)
    assert test["ci95"] == pytest.approx([0.03, 0.03])
    assert test["wins"] == [5, 0, 0]
    assert test["wilcoxon_p"] == pytest.approx(2 / 2**5)  # five of five above: the exact two-sided p


def test_targets_are_met_or_missed_by_the_right_amount() -> None:
    found = {
        t["name"]: t for t in results(ours=0.5, fedavg=0.4, fedavg_tuned=0.45, pooled=0.6, kd_phantoms=0.47)["targets"]
    }
    ours = 0.59
    assert found["ours / FedAvg"]["rival"] == "fedavg_tuned"  # the stronger of the two
    assert found["ours / FedAvg"]["value"] == pytest.approx(ours / 0.54)
    assert found["ours / FedAvg"]["met"]
    assert found["ours / pooled"]["margin"] == pytest.approx(ours / 0.69 - 0.97)
    assert not found["ours / pooled"]["met"]
    assert found["ours - kd_phantoms, interval above 0"]["met"]
    assert "ours / best ensemble" not in found


def test_an_incomplete_rival_is_compared_on_the_patients_that_it_has() -> None:
    ours = {("a", "1"): np.full(4, 0.8), ("a", "2"): np.full(4, 0.4)}
    pooled = {("a", "1"): np.full(4, 0.8)}
    (target,) = targets({"ours": ours, "pooled": pooled})
    assert target["value"] == pytest.approx(1.0) and target["met"]  # not .6 / .8
    assert targets({"ours": ours, "pooled": {("b", "1"): np.full(4, 0.5)}}) == []


def test_a_row_with_fewer_seeds_meets_ours_in_its_own_seeds() -> None:
    """Seeds differ by a constant; against one seed alone `ours` leads by what it leads by in that seed."""
    fewer = [row for row in stored("fedavg", 0.4) if row.cell.seed == 0]
    rows = {"ours": stored("ours", 0.5), "fedavg": fewer}
    found = gather(
        rows, site_names=["north", "south"], cells=4, about={"data": "phantoms", "folds": 2, "seeds": [0, 1]}
    )
    assert found["paired"]["fedavg"]["difference"] == pytest.approx(0.1)
    (target,) = found["targets"]
    assert target["value"] == pytest.approx(
        found["rows"]["ours"]["seed_means"]["0"] / found["rows"]["fedavg"]["dice"]["mean"]
    )


def test_a_lead_whose_interval_holds_zero_misses_the_target() -> None:
    ours, other = (patient_means(stored(key, 0.5), "dice") for key in ("ours", "kd_phantoms"))
    shifts = [0.5, -0.3, -0.02, 0.0, 0.1]
    shifted = {patient: scores + shift for (patient, scores), shift in zip(ours.items(), shifts, strict=True)}
    (target,) = targets({"ours": shifted, "kd_phantoms": other})
    assert target["value"] == pytest.approx(0.056) and target["ci95"][0] < 0 and not target["met"]
    assert "interval holds 0" in target_lines({"targets": [target]})[0]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert signed_rank_p(np.zeros(4)) == 1.0


def test_a_row_that_failed_is_shown_with_its_reason() -> None:
    failed = StoredRow("pooled", Cell(0, 0, 2), {"status": "failed", "reason": "no memory"}, ())
    rows = {"ours": stored("ours", 0.5), "pooled": [failed], "fedavg": stored("fedavg", 0.4)[:3]}
    found = gather(rows, site_names=list(PATIENTS), cells=4, about=ABOUT)
    text = markdown(found)
    assert "no memory" in text and "FedAvg (3 of 4 cells)" in text
    assert not found["rows"]["pooled"]["complete"] and "pooled" not in found["paired"]


def test_every_table_and_figure_says_not_private(tmp_path) -> None:
    found = results(ours=0.5, fedavg=0.4, prior=0.3)
    json.dumps(found, allow_nan=False)
    for text in (markdown(found), latex(found)):
        assert "NOT PRIVATE" in text and "Not for clinical use" in text and "phantoms" in text
    paths = write_plots(tmp_path, found)
    assert set(paths) == {"forest", "hospitals", "bytes"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())


def test_latex_escapes_what_latex_would_read_as_commands() -> None:
    assert escape(r"a_b & 5% $x$ {c} \d ~ ^ #1") == (
        r"a\_b \& 5\% \$x\$ \{c\} \textbackslash{}d \textasciitilde{} \textasciicircum{} \#1"
    )
    body = latex(results(ours=0.5)).splitlines()[7]
    assert not re.search(r"(?<!\\)[%_#$]", body)


@pytest.mark.parametrize("name", ["cpu", "gpu", "smoke"])
def test_every_distilled_row_has_the_same_number_of_student_updates(name: str) -> None:
    profile = get_profile(name)
    for key in DISTILLED:
        schedule = recipe(key, profile).schedule
        assert schedule.rounds * schedule.student_steps == profile.rounds * profile.student_steps, key
        assert schedule.student_batch == recipe("ours", profile).schedule.student_batch, key


def test_a_design_of_the_discriminator_is_all_that_its_row_changes() -> None:
    profile = get_profile("cpu")
    ours = recipe("ours", profile)
    assert ours.critic.plain
    designs = {
        part: recipe(f"ours_with_{part}", profile) for part in ("scales", "augment", "penalty", "spectral", "joint")
    }
    for part, row in designs.items():
        assert replace(row, critic=ours.critic) == ours
        changed = {name for name, value in asdict(row.critic).items() if value != asdict(ours.critic)[name]}
        assert changed == {part}
    assert designs["penalty"].critic.penalty == pytest.approx(7.3728)  # .0002 x 4 x 48^3 / 3 / 2 / 2
    at_1_mm = recipe("ours_with_penalty", get_profile("gpu")).critic.penalty
    assert at_1_mm == pytest.approx(8 * 7.3728)  # twice the edge, eight times the values


def test_rows_have_words_and_can_be_chosen_by_pattern() -> None:
    every = all_rows(["a", "b"])
    assert len(every) == len(set(every)) and every[:3] == ("prior", "site:a", "site:b")
    assert all(row_kind(key).name and row_kind(key).leaves for key in every)
    assert chosen_rows(["fedavg*", "prior"], ["a"]) == ("prior", "fedavg", "fedavg_tuned")
    assert set(every) - set(chosen_rows([], ["a", "b"])) == {
        row for row in every if row.startswith("ours_with_") or row.endswith("_generations")
    }
    assert chosen_rows(["*"], ["a", "b"]) == every
    assert chosen_rows(["ours_with_m*"], ["a"]) == ("ours_with_mirrors", "ours_with_mixup")
    assert chosen_rows(["ours_without_generator"], ["a"]) == ("kd_phantoms",)
    with pytest.raises(SettingsError, match="fedx"):
        chosen_rows(["fedx"], ["a"])
