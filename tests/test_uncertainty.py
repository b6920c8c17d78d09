"""Entropy and disagreement against values computed by hand and against the terms of the training loss."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fediod_med import uncertainty
from fediod_med.data.nifti.writing import write_volumes
from fediod_med.errors import InputError
from fediod_med.losses import teacher_divergence
from fediod_med.uncertainty import class_entropy, teacher_disagreement


def random_map(rng: np.random.Generator, shape=(5, 4, 3)) -> np.ndarray:
    return np.moveaxis(rng.dirichlet([0.3] * 4, size=shape), -1, 0).astype(np.float32)


def constant(*values: float) -> np.ndarray:
    return np.tile(np.array(values, dtype=np.float32).reshape(4, 1, 1, 1), (1, 2, 2, 2))


def test_entropy_of_known_distributions() -> None:
    assert class_entropy(constant(1, 0, 0, 0)) == pytest.approx(0, abs=1e-4)
    assert class_entropy(constant(0.25, 0.25, 0.25, 0.25)) == pytest.approx(np.log(4), abs=1e-5)
    assert class_entropy(constant(0.5, 0, 0.5, 0)) == pytest.approx(np.log(2), abs=1e-4)


def test_half_precision_and_blocks_give_the_same_map(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = random_map(rng)
    whole = class_entropy(probs)
    assert whole.dtype == np.float32 and whole.shape == (5, 4, 3)
    assert np.allclose(class_entropy(probs.astype(np.float16)), whole, atol=5e-3)
    others = [random_map(rng), random_map(rng)]
    apart = teacher_disagreement([probs, *others])
    monkeypatch.setattr(uncertainty, "_BLOCK", 7)
    assert np.array_equal(class_entropy(probs), whole)
    assert np.array_equal(teacher_disagreement([probs, *others]), apart)


def test_disagreement_of_known_predictions() -> None:
    sure, other = constant(1, 0, 0, 0), constant(0, 0, 1, 0)
    assert teacher_disagreement([sure, other]) == pytest.approx(np.log(2), abs=1e-4)
    assert teacher_disagreement([sure, sure.copy()]) == pytest.approx(0, abs=1e-6)
    weighted = teacher_disagreement([sure, other], weights=[3, 1])
    assert weighted == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), abs=1e-4)


def test_its_mean_is_the_divergence_of_the_loss(rng: np.random.Generator) -> None:
    maps = [random_map(rng) for _ in range(3)]
    weights = torch.tensor([0.5, 0.3, 0.2])
    expected = teacher_divergence(torch.from_numpy(np.stack(maps))[:, None], weights)
    found = teacher_disagreement(iter(maps), weights=[5, 3, 2])
    assert found.mean() == pytest.approx(float(expected), abs=1e-6)
    assert (found >= 0).all()


def test_written_maps_read_back_on_their_grid(tmp_path: Path, rng: np.random.Generator) -> None:
    affine = np.array([[0, 0, 2.0, 5], [-1.5, 0, 0, 8], [0, 1.0, 0, -3], [0, 0, 0, 1]])
    entropy = class_entropy(random_map(rng))
    write_volumes(tmp_path / "case_entropy.nii.gz", entropy, affine)
    image = nib.load(tmp_path / "case_entropy.nii.gz")
    assert image.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(image.dataobj), entropy)
    assert np.allclose(image.affine, affine)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 3, 3, 3), np.float32),
        np.full((4, 3, 3, 3), np.nan, np.float32),
        np.full((3, 3, 3, 3), 1 / 3, np.float32),
        np.ones((4, 3, 3, 3), np.uint8),
    ],
)
def test_what_is_no_probability_is_refused(values: np.ndarray) -> None:
    with pytest.raises(InputError, match="probabilities"):
        class_entropy(values)


def test_maps_and_weights_must_fit(rng: np.random.Generator) -> None:
    one, two = random_map(rng), random_map(rng)
    for maps, weights, words in [
        ([one], None, "at least two"),
        ([], None, "found 0"),
        ([one, two], [1, 1, 1], "3 maps"),
        ([one, two, one], [1, 1], "2 maps, one per weight, found 3"),
        ([one, random_map(rng, (4, 4, 3))], None, "shape"),
        ([one, two], [-1, 2], "not negative"),
    ]:
        with pytest.raises(InputError, match=words):
            teacher_disagreement(maps, weights)
