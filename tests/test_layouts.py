from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fediod_med.data.layouts import LAYOUTS, Subject, find_cases, find_subject, find_subjects
from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SEQUENCES

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
OLD = ("t1", "t1ce", "t2", "flair", "seg")
NEW = ("t1n", "t1c", "t2w", "t2f", "seg")


def touch(*paths: Path) -> None:
    """Layouts look at names only, so empty files will do."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make_case(folder: Path, suffixes=OLD, separator="_", ending=".nii.gz") -> Path:
    touch(*(folder / f"{folder.name}{separator}{suffix}{ending}" for suffix in suffixes))
    return folder


def names(subject: Subject) -> dict[str, str]:
    return {sequence: path.name for sequence, path in subject.images.items()}


def need(folder: str) -> Path:
    if not (DATA / folder).is_dir():
        pytest.skip(f"real scans absent: shared/data/{folder} beside the repository")
    return DATA / folder


# ---------------------------------------------------------------- file names


@pytest.mark.parametrize(
    ("t1c", "t1", "t2", "flair", "mask"),
    [
        ("x_t1ce", "x_t1", "x_t2", "x_flair", "x_seg"),
        ("x-t1c", "x-t1n", "x-t2w", "x-t2f", "x-seg"),
        ("x-t1c", "x-t1n", "x-t2W", "x-t2f", "x-seg"),
        ("x_T1c", "x_T1", "x_T2", "x_FLAIR", "x_tumor_segmentation"),
        ("x_ce-gadolinium_T1w", "x_T1w", "x_T2w", "x_FLAIR", "x_dseg"),
        ("x_t1gd", "x_T1", "x_T2", "x_Flair", "x_SEG"),
        ("x_T1POST", "x_T1", "x_T2", "x_FLAIR", "x-seg"),
        ("t1ce", "t1", "t2", "flair", "seg"),
        ("ce-gadolinium_T1w", "T1w", "T2w", "FLAIR", "tumor_segmentation"),
        ("a.b-1_t1_t1ce", "a.b-1_t1_t1", "a.b-1_t1_t2", "a.b-1_t1_flair", "a.b-1_t1_seg"),
    ],
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".NII.GZ"])
def test_each_naming_finds_each_sequence(tmp_path, t1c, t1, t2, flair, mask, ending):
    touch(*(tmp_path / "x" / (stem + ending) for stem in (t1c, t1, t2, flair, mask)))
    subject = find_subject(tmp_path / "x")
    assert list(subject.images) == list(SEQUENCES)
    assert list(names(subject).values()) == [stem + ending for stem in (t1c, t1, t2, flair)]
    assert subject.label is not None
    assert subject.label.name == mask + ending
    assert subject.channels is None


SYNONYMS = {
    "T1c": ["t1ce", "t1c", "t1gd", "t1post", "ce-gadolinium_t1w"],
    "T1": ["t1", "t1n", "t1w"],
    "T2": ["t2", "t2w"],
    "FLAIR": ["flair", "t2f"],
}


@given(
    identifier=st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,10}[A-Za-z0-9])?", fullmatch=True),
    chosen=st.fixed_dictionaries({name: st.sampled_from(found) for name, found in SYNONYMS.items()}),
    separator=st.sampled_from("_-"),
    upper=st.booleans(),
)
def test_any_mix_of_synonyms_is_told_apart(tmp_path_factory, identifier, chosen, separator, upper):
    folder = tmp_path_factory.mktemp("case")
    for suffix in chosen.values():
        touch(folder / f"{identifier}{separator}{suffix.upper() if upper else suffix}.nii.gz")
    found = names(find_subject(folder))
    assert {name: stem.lower() for name, stem in found.items()} == {
        name: f"{identifier}{separator}{suffix}.nii.gz".lower() for name, suffix in chosen.items()
    }


def test_files_of_other_kinds_and_hidden_files_are_ignored(tmp_path):
    case = make_case(tmp_path / "UCSF-PDGM-0014_nifti", ())
    stem = "UCSF-PDGM-0014"
    touch(*(case / f"{stem}_{s}.nii.gz" for s in ("T1", "T1c", "T2", "FLAIR", "tumor_segmentation")))
    touch(*(case / f"{stem}_{s}.nii.gz" for s in ("T1_bias", "brain_segmentation", "ADC", "DTI_eddy_FA", "SWI")))
    touch(case / f"._{stem}_T1.nii.gz", case / ".hidden_t1.nii.gz", case / f"{stem}_t1.json", case / "notes_t2.txt")
    (case / "old_t1.nii.gz").mkdir()
    subject = find_subject(case)
    assert subject.subject_id == stem
    assert names(subject)["T1"] == f"{stem}_T1.nii.gz"


# ---------------------------------------------------------------- defects


def test_a_missing_sequence_says_what_is_there_and_what_is_not(tmp_path):
    case = make_case(tmp_path / "c", ("t1", "t2", "seg"))
    touch(case / "c_perfusion.nii.gz")
    with pytest.raises(InputError, match="missing T1c, FLAIR") as caught:
        find_subject(case)
    message = str(caught.value)
    assert "T1 = c_t1.nii.gz, T2 = c_t2.nii.gz, mask = c_seg.nii.gz" in message
    assert "c_perfusion.nii.gz" in message


@pytest.mark.parametrize("other", ["c_t1c.nii.gz", "c_t1ce.nii", "d_t1ce.nii.gz"])
def test_a_doubled_sequence_names_both_files(tmp_path, other):
    case = make_case(tmp_path / "c")
    touch(case / other)
    with pytest.raises(InputError, match="T1c") as caught:
        find_subject(case)
    assert "c_t1ce.nii.gz" in str(caught.value)
    assert other in str(caught.value)


def test_a_doubled_mask_names_both_files(tmp_path):
    case = make_case(tmp_path / "c")
    touch(case / "c_dseg.nii.gz")
    with pytest.raises(InputError, match=r"label map.*c_dseg.nii.gz and c_seg.nii.gz"):
        find_subject(case)


def test_unknown_names_lead_to_the_flags(tmp_path):
    touch(*(tmp_path / f"{s}_N4_regtoMNI.nii.gz" for s in ("FLAIR", "T1", "T1POST", "T2", "GOLD_STANDARD")))
    for function in (find_subject, find_cases):
        with pytest.raises(InputError, match="--t1c FILE --t1 FILE --t2 FILE --flair FILE") as caught:
            function(tmp_path)
        assert "T1POST_N4_regtoMNI.nii.gz" in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_root_is_an_error_in_every_layout(tmp_path, layout):
    with pytest.raises(InputError, match="the folder is empty"):
        find_subjects(tmp_path, layout)
    with pytest.raises(InputError, match="expected a folder, found nothing"):
        find_subjects(tmp_path / "absent", layout)


def test_a_file_is_no_case_folder(tmp_path):
    touch(tmp_path / "c_t1.nii.gz")
    for function in (find_subject, find_cases):
        with pytest.raises(InputError, match="expected a folder, found a file"):
            function(tmp_path / "c_t1.nii.gz")


def test_unknown_layout_and_bad_pattern_are_settings_errors(tmp_path):
    make_case(tmp_path / "c")
    with pytest.raises(SettingsError, match="brats2018, brats2019"):
        find_subjects(tmp_path, "brats2017")
    with pytest.raises(SettingsError, match="regular expression"):
        find_subjects(tmp_path, "brats2021", pattern="(")


def test_defects_of_several_cases_come_in_one_error(tmp_path):
    for i in range(5):
        make_case(tmp_path / f"c{i}", ("t1", "t2"))
    with pytest.raises(InputError, match=r"c0.*c1.*c2.*and 2 more"):
        find_subjects(tmp_path, "brats2021")


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", ["brats2018", "brats2019"])
@pytest.mark.parametrize("above", ["", "training", "MICCAI_BraTS_2018_Data_Training/training"])
def test_graded_layout_gives_sorted_ids_and_groups(tmp_path, layout, above):
    for grade, case in (("LGG", "Brats18_TCIA10_2_1"), ("HGG", "Brats18_CBICA_B_1"), ("HGG", "Brats18_CBICA_A_1")):
        make_case(tmp_path / above / grade / case)
    subjects = find_subjects(tmp_path, layout)
    assert [(s.subject_id, s.group) for s in subjects] == [
        ("Brats18_CBICA_A_1", "HGG"),
        ("Brats18_CBICA_B_1", "HGG"),
        ("Brats18_TCIA10_2_1", "LGG"),
    ]
    assert [s.subject_id for s in find_subjects(tmp_path / above / "HGG", layout)] == [
        s.subject_id for s in subjects[:2]
    ]


def test_brats2020_takes_plain_files_the_misnamed_mask_and_the_grades(tmp_path):
    root = tmp_path / "MICCAI_BraTS2020_TrainingData"
    make_case(root / "BraTS20_Training_001", ending=".nii")
    odd = make_case(root / "BraTS20_Training_355", OLD[:4], ending=".nii")
    touch(odd / "W39_1998.09.19_Segm.nii")
    (root / "name_mapping.csv").write_text(
        "Grade,BraTS_2017_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
        "HGG,Brats17_CBICA_AAB_1,BraTS19_CBICA_AAB_1,BraTS20_Training_001\n"
        "LGG,NA,NA,BraTS20_Training_355\n",
        encoding="utf-8",
    )
    first, second = find_subjects(tmp_path, "brats2020", require_label=True)
    assert (first.subject_id, first.group) == ("BraTS20_Training_001", "HGG")
    assert (second.subject_id, second.group) == ("BraTS20_Training_355", "LGG")
    assert second.label is not None
    assert second.label.name == "W39_1998.09.19_Segm.nii"


def test_brats2021_and_gli_layouts(tmp_path):
    make_case(tmp_path / "a" / "BraTS2021_00000")
    make_case(tmp_path / "b" / "ASNR-MICCAI-BraTS2023-GLI" / "BraTS-GLI-00000-000", NEW, "-")
    make_case(tmp_path / "b" / "ASNR-MICCAI-BraTS2023-GLI" / "BraTS-GLI-00000-001", ("t1n", "t1c", "t2W", "t2f"), "-")
    (only,) = find_subjects(tmp_path / "a", "brats2021")
    assert (only.subject_id, only.group) == ("BraTS2021_00000", None)
    for layout in ("brats2023", "brats2024"):
        first, second = find_subjects(tmp_path / "b", layout)
        assert first.subject_id == "BraTS-GLI-00000-000"
        assert names(second)["T2"] == "BraTS-GLI-00000-001-t2W.nii.gz"
        assert second.label is None


@pytest.mark.parametrize("above", ["", "Task01_BrainTumour"])
def test_msd_maps_four_sequences_to_channels_of_one_file(tmp_path, above):
    base = tmp_path / above
    touch(base / "imagesTr" / "BRATS_002.nii.gz", base / "imagesTr" / "BRATS_001.nii.gz")
    touch(base / "imagesTr" / "._BRATS_001.nii.gz", base / "labelsTr" / "BRATS_001.nii.gz")
    first, second = find_subjects(tmp_path, "msd")
    assert set(first.images.values()) == {base / "imagesTr" / "BRATS_001.nii.gz"}
    assert first.channels == {"T1c": 2, "T1": 1, "T2": 3, "FLAIR": 0}
    assert first.label == base / "labelsTr" / "BRATS_001.nii.gz"
    assert second.label is None
    assert [s.subject_id for s in find_subjects(tmp_path, "msd", pattern="BRATS_002")] == ["BRATS_002"]


def test_msd_believes_a_fitting_description_only(tmp_path):
    touch(tmp_path / "imagesTr" / "BRATS_001.nii.gz")
    order = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": order}), encoding="utf-8")
    assert len(find_subjects(tmp_path, "msd")) == 1
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": order | {"1": "t1gd", "2": "T1w"}}))
    with pytest.raises(InputError, match="0 FLAIR, 1 T1w, 2 T1gd, 3 T2w"):
        find_subjects(tmp_path, "msd")
    for broken in ("{", "[]", '{"modality": {"a": 1}}'):
        (tmp_path / "dataset.json").write_text(broken)
        with pytest.raises(InputError, match=r"dataset\.json"):
            find_subjects(tmp_path, "msd")


def test_flat_folder_is_grouped_by_the_id_before_the_suffix(tmp_path):
    touch(*(tmp_path / f"a_{s}.nii.gz" for s in OLD), *(tmp_path / f"a_1-{s}.nii" for s in NEW[:4]))
    first, second = find_subjects(tmp_path, "flat")
    assert (first.subject_id, second.subject_id) == ("a", "a_1")
    assert names(first)["T1c"] == "a_t1ce.nii.gz"
    assert (first.label is None, second.label is None) == (False, True)


def test_flat_folder_refuses_files_without_id_and_incomplete_cases(tmp_path):
    touch(*(tmp_path / f"a_{s}.nii.gz" for s in OLD), tmp_path / "b_seg.nii.gz")
    with pytest.raises(InputError, match=r"case 'b'.*missing T1c, T1, T2, FLAIR"):
        find_subjects(tmp_path, "flat")
    assert [s.subject_id for s in find_subjects(tmp_path, "flat", pattern="a")] == ["a"]
    touch(tmp_path / "t1.nii.gz")
    with pytest.raises(InputError, match="found no id"):
        find_subjects(tmp_path, "flat")


def test_pattern_matches_at_the_start_and_shields_from_others_defects(tmp_path):
    make_case(tmp_path / "HGG" / "Brats18_CBICA_A_1")
    make_case(tmp_path / "HGG" / "Brats18_TCIA01_1_1", ("t1",))
    assert len(find_subjects(tmp_path, "brats2018", pattern="Brats18_CBICA")) == 1
    with pytest.raises(InputError, match=r"pattern 'CBICA'; found Brats18_CBICA_A_1, Brats18_TCIA01_1_1"):
        find_subjects(tmp_path, "brats2018", pattern="CBICA")
    with pytest.raises(InputError, match="Brats18_TCIA01_1_1"):
        find_subjects(tmp_path, "brats2018")


def test_a_required_label_that_is_absent_names_the_subject(tmp_path):
    make_case(tmp_path / "c1")
    make_case(tmp_path / "c2", OLD[:4])
    assert len(find_subjects(tmp_path, "brats2021")) == 2
    with pytest.raises(InputError, match="found none for c2"):
        find_subjects(tmp_path, "brats2021", require_label=True)


def test_the_same_id_in_two_folders_is_an_error(tmp_path):
    make_case(tmp_path / "HGG" / "c")
    make_case(tmp_path / "LGG" / "c")
    with pytest.raises(InputError, match=r"expected once, found in .*HGG.* and .*LGG"):
        find_subjects(tmp_path, "brats2018")


def test_linked_case_folders_are_followed(tmp_path):
    target = make_case(tmp_path / "store" / "c")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c").symlink_to(target, target_is_directory=True)
    assert [s.subject_id for s in find_subjects(tmp_path / "data", "brats2021")] == ["c"]


# ---------------------------------------------------------------- one case, several cases


def test_find_subject_takes_id_from_folder_argument_or_current_directory(tmp_path, monkeypatch):
    case = tmp_path / "HGG" / "patient7"
    touch(*(case / f"scan_{s}.nii.gz" for s in OLD[:4]))
    subject = find_subject(case)
    assert (subject.subject_id, subject.group, subject.label) == ("patient7", "HGG", None)
    assert find_subject(case, subject_id="study-1").subject_id == "study-1"
    monkeypatch.chdir(case)
    assert find_subject(Path()).subject_id == "patient7"
    assert find_subject(Path(os.curdir)).images == {n: Path(p.name) for n, p in subject.images.items()}


def test_find_cases_takes_a_case_a_folder_of_cases_a_flat_folder_and_bids(tmp_path):
    make_case(tmp_path / "many" / "b")
    make_case(tmp_path / "many" / "a", NEW[:4], "-")
    touch(tmp_path / "many" / "out" / "a_seg.nii.gz")
    assert [s.subject_id for s in find_cases(tmp_path / "many" / "a")] == ["a"]
    assert [s.subject_id for s in find_cases(tmp_path / "many")] == ["a", "b"]
    touch(*(tmp_path / "flat" / f"{i}_{s}.nii.gz" for i in "yx" for s in OLD[:4]))
    assert [s.subject_id for s in find_cases(tmp_path / "flat")] == ["x", "y"]
    for session in ("1", "2"):
        stem = f"sub-01_ses-{session}"
        touch(
            *(
                tmp_path / "bids" / "sub-01" / f"ses-{session}" / "anat" / f"{stem}_{s}.nii.gz"
                for s in ("T1w", "ce-gadolinium_T1w", "T2w", "FLAIR")
            ),
            tmp_path / "bids" / "derivatives" / "masks" / f"{stem}_dseg.nii.gz",
        )
    assert [s.subject_id for s in find_cases(tmp_path / "bids")] == ["sub-01_ses-1", "sub-01_ses-2"]


def test_a_subject_is_hashable_and_travels_to_a_worker(tmp_path):
    subject = find_subject(make_case(tmp_path / "c"))
    assert {subject} == {pickle.loads(pickle.dumps(subject))}


# ---------------------------------------------------------------- real files


def test_real_brats18_folders_list_26_graded_patients_in_order():
    subjects = find_subjects(need("brats18_2mm"), "brats2018", require_label=True)
    assert len(subjects) == 26
    assert [s.subject_id for s in subjects] == sorted(s.subject_id for s in subjects)
    assert sum(s.group == "LGG" for s in subjects) == 3
    for subject in subjects:
        assert [path.name for path in subject.images.values()] == [
            f"{subject.subject_id}_{suffix}.nii.gz" for suffix in ("t1ce", "t1", "t2", "flair")
        ]


def test_real_brats23_case_with_capital_w():
    (subject,) = find_subjects(need("brats23"), "brats2023", require_label=True)
    assert subject.subject_id == "BraTS-GLI-00000-000"
    assert names(subject)["T2"].endswith("t2W.nii.gz")
    assert find_cases(need("brats23")) == (subject,)


def test_real_folder_with_foreign_names_asks_for_flags():
    with pytest.raises(InputError, match="--t1c FILE --t1 FILE --t2 FILE --flair FILE"):
        find_subject(need("ms_lesion"))
