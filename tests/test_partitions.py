from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fediod_med.data.layouts import Subject, find_subjects
from fediod_med.data.partitions import by_csv, by_pattern, by_size, dirichlet, iid, patient_id, split_fold
from fediod_med.errors import InputError, SettingsError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HOSPITALS = {
    "cbica": "Brats18_CBICA_",
    "tcia-hgg": "Brats18_TCIA0[123]_",
    "brats-2013": "Brats18_2013_",
    "tcia-lgg": "Brats18_TCIA1[03]_",
}


def subjects(*ids: str) -> list[Subject]:
    return [Subject(subject_id, {}) for subject_id in ids]


def ids(part) -> list[str]:
    return [subject.subject_id for subject in part]


# Patients 00000 to 00029 with one to three visits each, in any order.
@st.composite
def cohorts(draw, min_patients=1):
    visits = draw(st.lists(st.integers(1, 3), min_size=min_patients, max_size=30))
    names = [f"BraTS-GLI-{p:05d}-{v:03d}" for p, count in enumerate(visits) for v in range(count)]
    return subjects(*draw(st.permutations(names)))


def assert_exact_cover(parts, everyone):
    """Every subject once, no patient in two parts, each part sorted and not empty."""
    assert Counter(s for part in parts for s in ids(part)) == Counter(ids(everyone))
    homes = [{patient_id(s) for s in ids(part)} for part in parts]
    assert sum(map(len, homes)) == len(set().union(*homes))
    assert all(ids(part) == sorted(ids(part)) for part in parts)
    assert all(parts)


# ---------------------------------------------------------------- patients


@pytest.mark.parametrize(
    ("subject_id", "patient"),
    [
        ("BraTS-GLI-00000-001", "BraTS-GLI-00000"),
        ("BraTS-GLI-00000-000", "BraTS-GLI-00000"),
        ("Brats18_CBICA_ABM_1", "Brats18_CBICA_ABM"),
        ("Brats18_2013_11_1", "Brats18_2013_11"),
        ("BraTS19_TCIA10_637_1", "BraTS19_TCIA10_637"),
        ("sub-01_ses-2", "sub-01"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("FeTS2022_01341", "FeTS2022_01341"),
        ("BRATS_001", "BRATS_001"),
        ("UCSF-PDGM-0014", "UCSF-PDGM-0014"),
        ("phantom-001", "phantom-001"),
    ],
)
def test_patient_id_drops_visits_and_nothing_else(subject_id, patient):
    assert patient_id(subject_id) == patient


# ---------------------------------------------------------------- folds


def test_fold_takes_every_nth_subject_by_id():
    everyone = subjects("e", "b", "a", "d", "c")
    train, test = split_fold(everyone, folds=2, fold=1)
    assert (ids(train), ids(test)) == (["a", "c", "e"], ["b", "d"])
    assert split_fold(everyone, folds=1, fold=0) == (tuple(subjects("a", "b", "c", "d", "e")), ())


def test_fold_counts_by_subject_order_even_where_patient_order_differs():
    # As text, "2013_11_1" sorts before "2013_1_1", but "2013_1" before "2013_11".
    train, test = split_fold(subjects("Brats18_2013_1_1", "Brats18_2013_11_1"), folds=2, fold=0)
    assert (ids(train), ids(test)) == (["Brats18_2013_1_1"], ["Brats18_2013_11_1"])


@given(everyone=cohorts(min_patients=5), folds=st.integers(2, 5))
def test_folds_test_each_subject_once_and_split_no_patient(everyone, folds):
    splits = [split_fold(everyone, folds=folds, fold=fold) for fold in range(folds)]
    for train, test in splits:
        assert_exact_cover((train, test), everyone)
    assert_exact_cover([test for _, test in splits], everyone)


@pytest.mark.parametrize(("folds", "fold"), [(0, 0), (2, 2), (2, -1), (5, 4), (-1, 0)])
def test_impossible_folds_are_refused(folds, fold):
    with pytest.raises(SettingsError, match="folds"):
        split_fold(subjects("a", "b", "c"), folds=folds, fold=fold)


def test_a_single_patient_cannot_be_trained_and_tested():
    with pytest.raises(SettingsError, match="0 patients to train and 1 to test"):
        split_fold(subjects("BraTS-GLI-00000-000", "BraTS-GLI-00000-001"), folds=2, fold=0)


# ---------------------------------------------------------------- patterns


def test_pattern_assigns_by_prefix_and_names_who_is_left_out(caplog):
    everyone = subjects("x2", "y1", "x1", "z1")
    with caplog.at_level(logging.WARNING):
        assert {k: ids(v) for k, v in by_pattern(everyone, {"b": "y", "a": "x"}).items()} == {
            "b": ["y1"],
            "a": ["x1", "x2"],
        }
    assert "1 subjects belong to no site and are left out: z1" in caplog.text
    assert list(by_pattern(everyone, {"b": "y", "a": "x"})) == ["b", "a"]


def test_rest_collects_who_matches_no_pattern(caplog):
    found = by_pattern(subjects("x1", "y1", "z1"), {"a": "x"}, rest="others")
    assert ids(found["others"]) == ["y1", "z1"]
    assert not caplog.records


def test_pattern_conflicts_and_empty_sites_are_errors():
    everyone = subjects("x1", "y1")
    with pytest.raises(SettingsError, match=r"x1: expected one matching site, found a, b"):
        by_pattern(everyone, {"a": "x", "b": ".1"})
    with pytest.raises(InputError, match="site b: expected at least one subject"):
        by_pattern(everyone, {"a": "x", "b": "q"})
    with pytest.raises(SettingsError, match="not a regular expression"):
        by_pattern(everyone, {"a": "["})


def test_a_patient_at_two_sites_is_refused_by_pattern_and_by_csv(tmp_path):
    visits = subjects("BraTS-GLI-00000-000", "BraTS-GLI-00000-001")
    with pytest.raises(SettingsError, match=r"BraTS-GLI-00000: .*-000 at a, .*-001 at b"):
        by_pattern(visits, {"a": ".*-000$", "b": ".*-001$"})
    with pytest.raises(SettingsError, match="BraTS-GLI-00000"):
        by_pattern(visits, {"a": ".*-000$"}, rest="b")
    table = tmp_path / "p.csv"
    table.write_text("Partition_ID,Subject_ID\n1,BraTS-GLI-00000-000\n2,BraTS-GLI-00000-001\n")
    with pytest.raises(SettingsError, match="BraTS-GLI-00000"):
        by_csv(visits, table)


# ---------------------------------------------------------------- table


def test_csv_assigns_in_the_order_of_the_table(tmp_path, caplog):
    table = tmp_path / "partitioning_1.csv"
    table.write_bytes(b"\xef\xbb\xbfPartition_ID,Subject_ID\r\n2,b\r\n10,c\r\n\r\n2, a \r\n")
    found = by_csv(subjects("a", "b", "c", "d"), table)
    assert {site: ids(part) for site, part in found.items()} == {"2": ["a", "b"], "10": ["c"]}
    assert list(found) == ["2", "10"]
    assert "left out: d" in caplog.text
    assert ids(by_csv(subjects("a", "b", "c", "d"), table, rest="new")["new"]) == ["d"]


def test_csv_columns_are_found_by_name(tmp_path):
    table = tmp_path / "p.csv"
    table.write_text("subject_id,age,partition_id\na,40,north\n")
    assert {site: ids(part) for site, part in by_csv(subjects("a"), table).items()} == {"north": ["a"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Partition_ID,Subject_ID\n1,a\n1,q\n1,r\n", "2 unknown: q, r"),
        ("Partition_ID,Subject_ID\n1,a\n2,a\n", "line 3: a is listed a second time"),
        ("Partition_ID,Subject_ID\n1\n", "line 2: .*empty cell"),
        ("Partition_ID,Subject_ID\n,a\n", "line 2: .*empty cell"),
        ("Partition_ID,Subject_ID\n", "at least one row"),
        ("site,subject\n1,a\n", "header Partition_ID,Subject_ID, found site,subject"),
        ("", "found nothing"),
    ],
)
def test_a_defective_table_says_where_and_what(tmp_path, content, message):
    table = tmp_path / "p.csv"
    table.write_text(content)
    with pytest.raises(InputError, match=message):
        by_csv(subjects("a", "b"), table)


def test_an_absent_or_binary_table_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="could not read"):
        by_csv(subjects("a"), tmp_path / "absent.csv")
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="could not read"):
        by_csv(subjects("a"), tmp_path / "p.csv")


# ---------------------------------------------------------------- size


def test_size_cuts_contiguous_chunks_smallest_first():
    sizes = {"a": 5.0, "b": 1.0, "c": 3.0, "d": 2.0, "e": 4.0}
    found = by_size(subjects(*"abcde"), sizes, 2)
    assert {site: ids(part) for site, part in found.items()} == {"site-1": ["b", "c", "d"], "site-2": ["a", "e"]}


def test_size_of_a_patient_is_the_mean_over_visits():
    everyone = subjects("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00001-000")
    sizes = dict(zip(ids(everyone), (0.0, 10.0, 4.0), strict=True))
    assert ids(by_size(everyone, sizes, 2)["site-1"]) == ["BraTS-GLI-00001-000"]


@given(everyone=cohorts(min_patients=4), n_sites=st.integers(1, 4), data=st.data())
def test_size_orders_sites_and_covers_everyone(everyone, n_sites, data):
    values = data.draw(st.lists(st.floats(0, 1e6), min_size=len(everyone), max_size=len(everyone)))
    by_patient = dict(zip(map(patient_id, ids(everyone)), values, strict=True))
    sizes = {s: by_patient[patient_id(s)] for s in ids(everyone)}
    parts = list(by_size(everyone, sizes, n_sites).values())
    assert len(parts) == n_sites
    assert_exact_cover(parts, everyone)
    for smaller, larger in itertools.pairwise(parts):
        assert max(sizes[s] for s in ids(smaller)) <= min(sizes[s] for s in ids(larger)) + 1e-6
    shuffled = random.Random(0).sample(everyone, len(everyone))
    assert list(by_size(shuffled, sizes, n_sites).values()) == parts


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf")])
def test_missing_and_invalid_sizes_name_the_subject(bad):
    with pytest.raises(InputError, match="found none for b"):
        by_size(subjects("a", "b"), {"a": 1.0}, 1)
    with pytest.raises(InputError, match="found others for b"):
        by_size(subjects("a", "b"), {"a": 1.0, "b": bad}, 1)


# ---------------------------------------------------------------- random partitions


@given(
    everyone=cohorts(min_patients=4),
    n_sites=st.integers(1, 4),
    alpha=st.sampled_from([0.5, 1.0, 100.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50)
def test_dirichlet_covers_everyone_and_repeats_by_seed(everyone, n_sites, alpha, seed):
    grade = {s.subject_id: hash(patient_id(s.subject_id)) % 2 for s in everyone}
    try:
        found = dirichlet(everyone, [grade[s] for s in ids(everyone)], alpha, n_sites, seed)
    except SettingsError as error:
        assert "never filled all" in str(error)  # noqa: PT017 - the only other allowed outcome
        return
    assert list(found) == [f"site-{i + 1}" for i in range(n_sites)]
    assert_exact_cover(list(found.values()), everyone)
    shuffled = random.Random(seed).sample(everyone, len(everyone))
    assert dirichlet(shuffled, [grade[s] for s in ids(shuffled)], alpha, n_sites, seed) == found


def grade_skew(alpha: float) -> float:
    """Mean over sites of the distance between a site's share of the first grade and the global share (one half)."""
    everyone = subjects(*(f"p{i:03d}" for i in range(200)))
    grades = ["HGG" if i % 2 else "LGG" for i in range(200)]
    grade = dict(zip(ids(everyone), grades, strict=True))
    total = 0.0
    for seed in range(20):
        parts = dirichlet(everyone, grades, alpha, 4, seed).values()
        shares = [sum(grade[s] == "HGG" for s in ids(part)) / len(part) for part in parts]
        total += sum(abs(share - 0.5) for share in shares) / len(shares)
    return total / 20


def test_dirichlet_skew_falls_as_alpha_grows():
    strong, middle, weak = grade_skew(0.1), grade_skew(1.0), grade_skew(1000.0)
    assert strong > 1.5 * middle > 3 * weak
    assert weak < 0.05


def test_dirichlet_that_cannot_fill_its_sites_says_so():
    everyone = subjects(*(f"p{i}" for i in range(10)))
    with pytest.raises(SettingsError, match="never filled all 4 sites; use a larger alpha"):
        dirichlet(everyone, ["HGG"] * 10, 1e-3, 4, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_refuses_bad_arguments(alpha):
    with pytest.raises(SettingsError, match="alpha"):
        dirichlet(subjects("a", "b"), ["H", "L"], alpha, 1, 0)
    with pytest.raises(InputError, match=r"one per subject \(2\), found 1"):
        dirichlet(subjects("a", "b"), ["H"], 1.0, 1, 0)


@given(everyone=cohorts(min_patients=4), n_sites=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_iid_deals_equal_numbers_of_patients(everyone, n_sites, seed):
    found = iid(everyone, n_sites, seed)
    assert_exact_cover(list(found.values()), everyone)
    counts = [len({patient_id(s) for s in ids(part)}) for part in found.values()]
    assert max(counts) - min(counts) <= 1
    assert iid(everyone[::-1], n_sites, seed) == found


def test_iid_depends_on_its_seed():
    everyone = subjects(*(f"p{i}" for i in range(20)))
    assert iid(everyone, 2, 0) != iid(everyone, 2, 1)


@pytest.mark.parametrize("n_sites", [0, 3])
def test_more_sites_than_patients_are_refused(n_sites):
    everyone = subjects("a", "b")
    for attempt in (
        lambda: iid(everyone, n_sites, 0),
        lambda: by_size(everyone, {"a": 1.0, "b": 2.0}, n_sites),
        lambda: dirichlet(everyone, ["H", "L"], 1.0, n_sites, 0),
    ):
        with pytest.raises(SettingsError, match=r"expected 1 to 2 \(the number of patients\)"):
            attempt()


def test_a_repeated_subject_is_refused():
    with pytest.raises(InputError, match="found a twice"):
        iid(subjects("a", "b", "a"), 2, 0)


# ---------------------------------------------------------------- real files


def test_real_institutions_give_the_four_hospitals(caplog):
    if not (DATA / "brats18_2mm").is_dir():
        pytest.skip("real scans absent: shared/data/brats18_2mm beside the repository")
    everyone = find_subjects(DATA / "brats18_2mm", "brats2018")
    found = by_pattern(everyone, HOSPITALS)
    assert {site: len(part) for site, part in found.items()} == {
        "cbica": 12,
        "tcia-hgg": 6,
        "brats-2013": 5,
        "tcia-lgg": 3,
    }
    assert_exact_cover(list(found.values()), everyone)
    assert not caplog.records
    assert {s.group for s in found["tcia-lgg"]} == {"LGG"}
    for site, part in found.items():
        assert find_subjects(DATA / "brats18_2mm", "brats2018", pattern=HOSPITALS[site]) == part
