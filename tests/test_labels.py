from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fediod_med.errors import LabelError, SettingsError
from fediod_med.labels import (
    REGIONS,
    SCHEMES,
    SEQUENCES,
    from_classes,
    get_scheme,
    region_masks,
    region_probabilities,
    to_classes,
)


def test_sequences_and_regions_keep_the_order_everything_relies_on():
    assert SEQUENCES == ("T1c", "T1", "T2", "FLAIR")
    assert REGIONS == ("TC", "WT", "ET")


@pytest.mark.parametrize(
    ("name", "values", "classes"),
    [
        ("brats2018", [0, 1, 2, 4], [0, 1, 2, 3]),
        ("brats2023", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("brats2024", [0, 1, 2, 3, 4], [0, 1, 2, 3, 0]),  # the resection cavity is no tumour
        ("msd", [0, 1, 2, 3], [0, 2, 1, 3]),  # 1 is oedema, 2 is non-enhancing
    ],
)
def test_values_on_disk_become_the_documented_classes(name, values, classes):
    found = to_classes(np.array(values), SCHEMES[name], "file")
    assert found.dtype == np.uint8
    assert found.tolist() == classes


@pytest.mark.parametrize(
    ("name", "values"),
    [("brats2018", [0, 1, 2, 4]), ("brats2023", [0, 1, 2, 3]), ("brats2024", [0, 1, 2, 3]), ("msd", [0, 2, 1, 3])],
)
def test_classes_become_the_documented_values(name, values):
    written = from_classes(np.arange(4), SCHEMES[name])
    assert written.dtype == np.uint8
    assert written.tolist() == values


@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    classes=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.integers(0, 3)),
    dtype=st.sampled_from([np.uint8, np.int16, np.float32, np.float64]),
)
def test_classes_survive_the_round_trip_through_any_scheme_and_type(scheme, classes, dtype):
    values = from_classes(classes, SCHEMES[scheme]).astype(dtype)
    assert np.array_equal(to_classes(values, SCHEMES[scheme], "file"), classes)


@pytest.mark.parametrize(
    ("scheme", "value", "shown"),
    [
        ("brats2018", 3, "found 3"),  # a BraTS 2023 file read as an older one
        ("brats2023", 4, "found 4"),
        ("msd", 4, "found 4"),
        ("brats2023", 1.5, "found 1.5"),
        ("brats2023", -1, "found -1"),
        ("brats2023", float("nan"), "found nan"),
    ],
)
def test_a_value_outside_the_scheme_names_file_value_and_scheme(scheme, value, shown):
    with pytest.raises(LabelError, match=shown) as caught:
        to_classes(np.array([0, 1, value]), SCHEMES[scheme], "case_seg.nii.gz")
    assert "case_seg.nii.gz" in str(caught.value)
    assert scheme in str(caught.value)


def test_many_unknown_values_are_not_all_listed():
    with pytest.raises(LabelError) as caught:
        to_classes(np.arange(1000), SCHEMES["brats2018"], "file")
    assert len(str(caught.value)) < 300


def test_an_unknown_scheme_lists_the_known_ones():
    with pytest.raises(SettingsError, match="brats2018, brats2023, brats2024, msd"):
        get_scheme("BraTS")
    assert get_scheme("msd") is SCHEMES["msd"]


def test_region_masks_are_the_unions_of_their_classes():
    masks = region_masks(np.array([0, 1, 2, 3]))
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "TC": [False, True, False, True],
        "WT": [False, True, True, True],
        "ET": [False, False, False, True],
    }
    assert list(masks) == list(REGIONS)


@pytest.mark.parametrize("dim", [1, 0])
def test_region_probabilities_sum_their_classes_along_any_axis(dim):
    torch = pytest.importorskip("torch")
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    shape = [1, 1, 1]
    shape[dim] = 4
    found = region_probabilities(probs.reshape(shape), dim=dim)
    assert found.shape[dim] == 3
    torch.testing.assert_close(found.flatten(), torch.tensor([0.4, 0.6, 0.1]))


def test_region_probabilities_of_a_hard_map_equal_its_region_masks():
    torch = pytest.importorskip("torch")
    classes = np.random.default_rng(0).integers(0, 4, (2, 3, 4, 5))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(classes), 4).movedim(-1, 1).float()
    regions = region_probabilities(one_hot)
    for i, mask in enumerate(region_masks(classes).values()):
        assert np.array_equal(regions[:, i].numpy() > 0.5, mask)


def test_labels_import_without_torch():
    code = "import sys, fediod_med.labels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
