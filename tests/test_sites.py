"""Site files: plain data with known keys, refused by name otherwise; which patients belong to a hospital."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fediod_med.data.layouts import find_subjects
from fediod_med.data.phantoms import Grid, write_cohort
from fediod_med.errors import InputError, SettingsError
from fediod_med.networks import build_segmenter
from fediod_med.plain_yaml import read_plain
from fediod_med.sites import SITE_FILE, Site, check_disjoint, check_settings, load_site, load_sites

ROOT = Path(__file__).resolve().parent.parent
FIELDS = [field.name for field in dataclasses.fields(Site) if field.name != "folder"]
MINIMAL = "site_name: north\nlayout: brats2018\nlabel_scheme: brats2018\n"


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SITE_FILE).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven phantom patients of two institutions in one tree."""
    root = tmp_path_factory.mktemp("data")
    for prefix, count in (("NORTH", 4), ("SOUTH", 3)):
        write_cohort(root, count=count, seed=1, grid=Grid((16, 16, 16), 12.0), prefix=prefix)
    return root


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_minimal_file_gets_the_defaults(tmp_path: Path) -> None:
    site = load_site(written(tmp_path, MINIMAL))
    assert site == Site(folder=tmp_path.resolve(), site_name="north", layout="brats2018", label_scheme="brats2018")


def test_values_get_the_type_of_their_key(tmp_path: Path) -> None:
    site = load_site(
        written(tmp_path, MINIMAL + "spacing: 2\nlearning_rate: 1.0e-3\npartition_id: 7\npartition_csv: p.csv\n")
    )
    assert (site.spacing, type(site.spacing)) == (2.0, float)
    assert site.learning_rate == 0.001
    assert site.partition_id == "7"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("subject_pattern: $__import__('os').system('true')", "subject_pattern"),
        ("subject_pattern: '  $1+1'", "subject_pattern"),
        ("dataset_dir: '%other.yaml::secret'", "dataset_dir"),
        ("partition_csv: '@weights'", "partition_csv"),
        ("_target_: os.system", "_target_"),
        ("_requires_: os", "_requires_"),
        ("+imports: $import os", "+imports"),
        ("train#trainer: 1", "train#trainer"),
        ("train::trainer: 1", "train::trainer"),
        ("$key: 1", "$key"),
        ("7: seven", "7"),
        ("backbone: {_target_: os.system}", "backbone"),
        ("roi: [48, 48, 48]", "roi"),
        ("learning_rte: 0.1", "learning_rte"),
        ("folder: elsewhere", "folder"),
        ("seed: 1\nseed: 2", "seed"),
        ("site_name: south", "site_name"),
    ],
)  # fmt: skip
def test_what_is_not_plain_data_is_refused_by_name(tmp_path: Path, line: str, named: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(repr(named))) as caught:
        load_site(written(tmp_path, MINIMAL + line + "\n"))
    assert str(tmp_path / SITE_FILE) in str(caught.value)


def test_tags_that_build_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected YAML"):
        load_site(written(tmp_path, MINIMAL + "seed: !!python/object/apply:os.getpid []\n"))


@given(
    prefix=st.text(alphabet=" \t", max_size=3),
    mark=st.sampled_from("$%@"),
    rest=st.text(alphabet="ab(1+ '", max_size=6),
)
def test_no_spacing_hides_an_expression(
    tmp_path_factory: pytest.TempPathFactory, prefix: str, mark: str, rest: str
) -> None:
    folder = tmp_path_factory.mktemp("site")
    value = (prefix + mark + rest).replace("\t", "\\t").replace("'", "")
    with pytest.raises(SettingsError, match="subject_pattern"):
        load_site(written(folder, MINIMAL + f'subject_pattern: "{value}"\n'))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("roi: 48.5", "key 'roi': expected int, found 48.5"),
        ("roi: true", "key 'roi': expected int, found True"),
        ("learning_rate: 1e-3", "write 1.0e-3 or 0.001"),
        ("learning_rate: .nan", "learning_rate: expected a positive number"),
        ("subject_pattern: 1.5", "key 'subject_pattern': expected str"),
        ("spacing:", "key 'spacing': expected float, found None"),
        ("roi: 50", "roi: expected a multiple of 8 from 16, found 50"),
        ("roi: 8", "roi: expected a multiple of 8 from 16, found 8"),
        ("spacing: -1", "spacing: expected a positive number"),
        ("epochs: 0", "epochs: expected a positive number"),
        ("rehearsal: 1.0", "rehearsal: expected a share from 0 to below 1"),
        ("depth: 5", "depth: expected 2 to 4 levels"),
        ("backbone: dynunet\ndepth: 2", "depth: expected 3 to 4 levels for dynunet, found 2"),
        ("backbone: segresnet\nwidth: 12", "width: expected a multiple of 8 for segresnet, found 12"),
        ("width: 2", "width: expected 4 or more channels"),
        ("backbone: vnet", "key 'backbone': expected one of unet, segresnet, dynunet, found 'vnet'"),
        ("init: warm", "key 'init': expected one of auto, prior, random"),
        ("privacy_mode: dp-sgd", "privacy_mode dp-sgd needs a budget"),
        ("privacy_mode: dp", "key 'privacy_mode': expected one of none, dp-sgd, gradient, found 'dp'"),
        ("privacy_mode: none\nepsilon: 8", "epsilon 8 with privacy_mode none would promise what nothing keeps"),
        ("epsilon: -1", "epsilon: expected a finite budget"),
        ("epsilon: .inf", "epsilon: expected a finite budget"),
        ("epsilon: 8\ndelta: 1.0e-3", "delta: expected above 0 and at most 1e-05"),
        ("epsilon: 8\ndelta: 0", "delta: expected above 0"),
        ("epsilon: 8\nclip_norm: 0", "clip_norm: expected a positive number"),
        ("epsilon: 8\nprivate_rate: 0", "private_rate: expected a positive number"),
        ("epsilon: 8\nsample_rate: 1.5", "sample_rate: expected above 0 and at most 1"),
        ("epsilon: 8\nprivate_steps: 0", "private_steps: expected 1 or more"),
        ("epsilon: 8\ntrainable: encoder", "key 'trainable': expected one of all, decoder, ends, head, norms"),
        ("epsilon: 8\ncounts_share: .9\ndiscriminator_share: .2", "leave some for the teacher"),
        ("epsilon: 8\nkey_dir: privacy", "key_dir: expected a folder outside ledger_dir"),
        ("epsilon: 8\nkey_dir: privacy/keys", "key_dir: expected a folder outside ledger_dir"),
        ("folds: 3\nfold: 3", "0 <= fold < folds, found 3 and 3"),
        ("partition_csv: parts.csv", "partition_csv and partition_id belong together"),
        ("num_workers: -1", "num_workers and seed: expected 0 or more"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_site(written(tmp_path, MINIMAL + line + "\n"))


@pytest.mark.parametrize(
    ("lines", "mode"),
    [
        ("", "none"),
        ("epsilon: 8\n", "dp-sgd"),
        ("epsilon: 8\nprivacy_mode: gradient\n", "gradient"),
        ("epsilon: 0\n", "none"),
    ],
)
def test_a_budget_without_a_mode_means_private_training(tmp_path: Path, lines: str, mode: str) -> None:
    site = load_site(written(tmp_path, MINIMAL + lines))
    assert site.privacy_mode == mode and site.private == (mode != "none")


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("backbone", ["unet", "segresnet", "dynunet"])
def test_what_the_check_lets_through_can_be_built(tmp_path: Path, backbone: str, depth: int) -> None:
    site = dataclasses.replace(load_site(written(tmp_path, MINIMAL)), backbone=backbone, depth=depth, width=8)
    try:
        check_settings(site)
    except SettingsError:
        assert (backbone, depth) == ("dynunet", 2)
        return
    build_segmenter(**site.network())


@pytest.mark.parametrize("name", ["", "north hospital", "north/south", "-north", "north-", "../north", "nörth"])
def test_names_that_are_no_folder_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="site_name: expected letters, digits and dashes"):
        load_site(written(tmp_path, MINIMAL.replace("north", f'"{name}"')))


@pytest.mark.parametrize("key", ["site_name", "layout", "label_scheme"])
def test_required_keys_are_asked_for(tmp_path: Path, key: str) -> None:
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(f"{key}:")]
    with pytest.raises(SettingsError, match=f"expected key '{key}'"):
        load_site(written(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize("key", ["layout", "label_scheme"])
def test_an_unknown_layout_or_scheme_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        load_site(written(tmp_path, MINIMAL.replace(f"{key}: brats2018", f"{key}: nowhere")))


@pytest.mark.parametrize("text", ["", "just words\n", "- a\n- b\n", "a: [1\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=SITE_FILE):
        load_site(written(tmp_path, text))


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="fediod site init north"):
        load_site(tmp_path / "north")


# --- where the data lie -----------------------------------------------------------------------------------------------


def test_a_relative_data_folder_starts_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "sites" / "north", MINIMAL + "dataset_dir: ../../scans\n")
    monkeypatch.chdir(tmp_path.parent)
    assert load_site(folder).data_root == (tmp_path / "scans").resolve()
    monkeypatch.chdir(folder)
    assert load_site(Path()).data_root == (tmp_path / "scans").resolve()


def test_the_data_root_of_the_caller_wins_and_starts_where_the_caller_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "north", MINIMAL + "dataset_dir: data\n")
    monkeypatch.chdir(tmp_path)
    assert load_site(folder, data_root=Path("scans")).data_root == (tmp_path / "scans").resolve()


def test_no_data_folder_at_all_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"site north: no data folder; set dataset_dir .* or --data-root"):
        load_site(written(tmp_path, MINIMAL)).subjects()


# --- patients ---------------------------------------------------------------------------------------------------------


def test_a_pattern_picks_the_institution_and_the_fold_is_held_out(tmp_path: Path, data: Path) -> None:
    site = load_site(
        written(tmp_path, MINIMAL + "subject_pattern: Brats18_NORTH_\nfolds: 3\nfold: 1\n"), data_root=data
    )
    train, test = site.subjects()
    assert [s.subject_id for s in test] == ["Brats18_NORTH_2_1"]
    assert [s.subject_id for s in train] == [f"Brats18_NORTH_{n}_1" for n in (1, 3, 4)]
    assert all(s.label is not None for s in (*train, *test))


def test_every_patient_is_held_out_in_exactly_one_fold(tmp_path: Path, data: Path) -> None:
    site = load_site(written(tmp_path, MINIMAL + "folds: 3\n"), data_root=data)
    parts = [dataclasses.replace(site, fold=fold).subjects() for fold in range(3)]
    held_out = sorted(s.subject_id for _, test in parts for s in test)
    assert held_out == sorted(s.subject_id for s in find_subjects(data, "brats2018"))
    assert all({s.subject_id for s in train}.isdisjoint(s.subject_id for s in test) for train, test in parts)


def test_a_table_says_which_patients_are_the_hospitals(tmp_path: Path, data: Path) -> None:
    ids = [s.subject_id for s in find_subjects(data, "brats2018")]
    rows = "".join(f"{1 + n % 2},{name}\n" for n, name in enumerate(ids))
    text = MINIMAL + "partition_csv: parts.csv\npartition_id: 2\n"
    folder = written(tmp_path, text)
    (folder / "parts.csv").write_text("Partition_ID,Subject_ID\n" + rows)
    site = load_site(folder, data_root=data)
    assert [s.subject_id for s in site.subjects()[0]] == ids[1::2]
    with pytest.raises(SettingsError, match="expected Partition_ID '9', found 1, 2"):
        dataclasses.replace(site, partition_id="9").subjects()


def test_a_pattern_without_patients_is_an_error(tmp_path: Path, data: Path) -> None:
    site = load_site(written(tmp_path, MINIMAL + "subject_pattern: Brats18_WEST_\n"), data_root=data)
    with pytest.raises(InputError, match="WEST"):
        site.subjects()


def test_a_patient_may_belong_to_one_hospital_only(tmp_path: Path, data: Path) -> None:
    north = load_site(written(tmp_path / "north", MINIMAL + "subject_pattern: Brats18_NORTH_\n"), data_root=data)
    south = load_site(
        written(tmp_path / "south", MINIMAL.replace("north", "south") + "subject_pattern: Brats18_SOUTH_\n"),
        data_root=data,
    )
    check_disjoint([north, south])
    both = dataclasses.replace(south, subject_pattern="Brats18_(SOUTH|NORTH_3)_")
    with pytest.raises(InputError, match=r"patient Brats18_NORTH_3: found at north and south"):
        check_disjoint([north, both])


# --- the folder of hospitals ------------------------------------------------------------------------------------------


def test_hospitals_are_read_in_order_without_the_template(tmp_path: Path, data: Path) -> None:
    for name in ("south", "north", "template"):
        written(tmp_path / name, MINIMAL.replace("north", name))
    (tmp_path / "README.md").write_text("words")
    sites = load_sites(tmp_path, data_root=data)
    assert [site.site_name for site in sites] == ["north", "south"]
    assert {site.data_root for site in sites} == {data.resolve()}


def test_one_name_for_two_hospitals_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", MINIMAL)
    written(tmp_path / "b", MINIMAL)
    with pytest.raises(SettingsError, match="'north' is used by two site files"):
        load_sites(tmp_path)
    with pytest.raises(SettingsError, match=r"expected folders with a site\.yaml"):
        load_sites(tmp_path / "empty")


def test_shipped_hospitals_split_the_real_cohort_without_overlap(shared_data: Path) -> None:
    sites = load_sites(ROOT / "sites", data_root=shared_data / "brats18_2mm")
    check_disjoint(sites)
    sizes = {site.site_name: tuple(len(part) for part in site.subjects()) for site in sites}
    assert sum(sum(size) for size in sizes.values()) == len(find_subjects(shared_data / "brats18_2mm", "brats2018"))
    assert all(train >= 2 and test >= 1 for train, test in sizes.values()), sizes


# --- documentation ----------------------------------------------------------------------------------------------------


def test_the_manual_lists_exactly_the_keys_that_exist() -> None:
    table = (ROOT / "sites" / "README.md").read_text().partition("| key |")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(key for cell in cells for key in re.findall(r"`(\w+)`", cell)) == sorted(FIELDS)


def test_the_template_is_a_valid_site_file() -> None:
    values = read_plain(ROOT / "sites" / "template" / SITE_FILE)
    assert set(values) <= set(FIELDS)
    site = load_site(ROOT / "sites" / "template")
    assert site.site_name == "your-hospital" and site.privacy_mode == "none"
    steps = re.findall(r"^(\d)\. ", (ROOT / "sites" / "template" / "README.md").read_text(), re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]
