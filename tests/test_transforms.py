"""From files to the working grid and back: geometry, anti-aliasing, normalisation, augmentation."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, RandCropByPosNegLabeld
from monai.transforms.utils import map_binary_to_indices

from fediod_med.data.layouts import Subject, find_subject
from fediod_med.data.nifti.writing import write_segmentation, write_volumes
from fediod_med.data.transforms import (
    DIVISOR,
    CropPlacesd,
    LoadSubjectd,
    augmentation,
    flip_together,
    jitter,
    mix_pairs,
    normalise,
    preprocessing,
    to_native,
    to_working_grid,
)
from fediod_med.errors import InputError, SettingsError
from fediod_med.labels import SEQUENCES, get_scheme

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LAS = np.diag([-1.0, 1.0, 1.0, 1.0])


def affine_of(name: str, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Voxel to world matrix of an orientation, with an origin that is no round number."""
    turn = np.eye(4)
    if name == "oblique":
        a, b = np.deg2rad(12.0), np.deg2rad(-7.0)
        about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        turn[:3, :3] = about_z @ about_x @ np.diag([-1, -1, 1])
    elif name == "axes swapped":  # third file axis runs left to right
        turn[:3, :3] = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    else:
        turn = {"LPS": LPS, "LAS": LAS, "RAS": np.eye(4)}[name].copy()
    affine = turn @ np.diag([*spacing, 1.0])
    affine[:3, 3] = (41.3, -17.2, 5.5)
    return affine


def ball(shape: tuple[int, int, int], radius: float) -> np.ndarray:
    """Mask of a centred ball; radius relative to each half edge."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    squares = np.add.outer(np.add.outer(axes[0] ** 2, axes[1] ** 2), axes[2] ** 2)
    return np.asarray(squares <= radius**2)


def scan(shape: tuple[int, int, int], affine: np.ndarray, seed: int = 0) -> tuple[MetaTensor, MetaTensor]:
    """A ball of a brain with nested classes in it."""
    rng = np.random.default_rng(seed)
    brain = ball(shape, 0.8)
    image = (rng.normal(100, 10, (4, *shape)) * brain).astype(np.float32)
    classes = np.zeros(shape, dtype=np.uint8)
    for label, radius in ((2, 0.5), (3, 0.38), (1, 0.22)):
        classes[ball(shape, radius)] = label
    geometry = torch.as_tensor(affine)
    return MetaTensor(image, affine=geometry), MetaTensor(classes[None], affine=geometry)


def one_hot(label: MetaTensor) -> MetaTensor:
    shares = torch.nn.functional.one_hot(label.as_tensor()[0].long(), 4).movedim(-1, 0).float()
    return MetaTensor(shares, affine=label.affine)


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "axes swapped", "oblique"])
@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_labels_come_back_to_the_native_grid(orientation: str, spacing: float) -> None:
    shape = (52, 60, 44)
    affine = affine_of(orientation)
    image, label = scan(shape, affine)
    moved, moved_label = to_working_grid(image, spacing=spacing, label=label)
    assert moved_label is not None and moved.shape[1:] == moved_label.shape[1:]
    back = to_native(one_hot(moved_label), affine=affine, shape=shape)
    assert back.shape == (4, *shape)
    found, expected = back.argmax(dim=0), label.as_tensor()[0].long()
    if spacing == 1.0:
        assert torch.equal(found, expected)
    for label_class in (1, 2, 3):
        assert dice(found == label_class, expected == label_class) > 0.85
    assert dice(found > 0, expected > 0) > 0.94


@pytest.mark.parametrize("orientation", ["LPS", "LAS", "axes swapped", "oblique"])
def test_a_voxel_keeps_its_place_in_the_world(orientation: str) -> None:
    """An image that is a linear function of the place in mm is the same function on the working grid."""
    shape, affine = (48, 40, 56), affine_of(orientation, (1.0, 1.5, 0.8))

    def place(matrix: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        index = np.stack([*np.indices(size), np.ones(size)])
        return np.tensordot(matrix, index, axes=1)[:3]

    image = np.concatenate([place(affine, shape) + 500, np.full((1, *shape), 500.0)]).astype(np.float32)
    moved, _ = to_working_grid(MetaTensor(image, affine=torch.as_tensor(affine)), spacing=2.0)
    found = moved.as_tensor().numpy()
    expected = place(np.asarray(moved.affine), found.shape[1:]) + 500
    inner = tuple(slice(first + 2, last - 1) for first, last in _extent(found[3] != 0))
    assert np.abs(found[:3][(slice(None), *inner)] - expected[(slice(None), *inner)]).max() < 0.05
    directions = np.asarray(moved.affine)[:3, :3]
    assert np.allclose(directions.T @ directions, 4.0 * np.eye(3), atol=1e-6), "isotropic, no shear"
    assert (np.diag(directions) > 0).all(), "nearest to right, anterior, superior"


def _extent(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and last index along each axis."""
    return [(int(hit.min()), int(hit.max())) for hit in np.nonzero(mask)]


def test_a_scan_already_on_the_grid_keeps_its_values() -> None:
    image, label = scan((36, 44, 30), affine_of("RAS", (4.0, 4.0, 4.0)))
    moved, moved_label = to_working_grid(image, spacing=4.0, label=label)
    assert moved_label is not None
    inside = image.as_tensor()[image.as_tensor() != 0]
    assert torch.equal(moved.as_tensor()[moved.as_tensor() != 0], inside)
    assert int(moved_label.as_tensor().sum()) == int(label.as_tensor().sum())


@pytest.mark.parametrize("factor", [3, 5])
def test_coarsening_averages_instead_of_picking_voxels(factor: int) -> None:
    """Output voxel i lies on input voxel `factor * i`; the mean of an odd block around it is the other route."""
    rng = np.random.default_rng(3)
    coarse = torch.as_tensor(rng.normal(100, 30, (1, 4, 10, 10, 10)).astype(np.float32))
    fine = torch.nn.functional.interpolate(coarse, scale_factor=9, mode="trilinear")[0]
    fine += torch.as_tensor(rng.normal(0, 8, fine.shape).astype(np.float32))
    moved, _ = to_working_grid(MetaTensor(fine, affine=torch.eye(4, dtype=torch.float64)), spacing=float(factor))
    kernel = torch.full((1, 1, *[factor] * 3), factor**-3.0)
    means = torch.nn.functional.conv3d(fine[:, None], kernel, padding=factor // 2)[:, 0]
    first = torch.round(-moved.affine[:3, 3] / factor).int().tolist()
    inner = (slice(None), *[slice(f + 2, f + 90 // factor - 2) for f in first])
    edge = slice(2 * factor, 90 - 2 * factor, factor)
    found, block, picked = moved.as_tensor()[inner], means[:, edge, edge, edge], fine[:, edge, edge, edge]
    assert found.shape == block.shape
    assert float(found.mean()) == pytest.approx(float(block.mean()), abs=0.2)
    assert float((found - block).std()) < 0.2 * float((picked - block).std())


@given(
    shape=st.tuples(*[st.integers(20, 40)] * 3),
    native=st.tuples(*[st.floats(0.8, 4.5)] * 3),
    spacing=st.floats(1.5, 6.0),
    orientation=st.sampled_from(["LPS", "LAS", "oblique", "axes swapped"]),
)
@settings(max_examples=15, deadline=None)
def test_the_working_grid_is_isotropic_divisible_and_holds_the_brain(
    shape: tuple[int, int, int], native: tuple[float, float, float], spacing: float, orientation: str
) -> None:
    image, label = scan(shape, affine_of(orientation, native))
    moved, moved_label = to_working_grid(image, spacing=spacing, label=label)
    assert all(edge % DIVISOR == 0 for edge in moved.shape[1:])
    assert np.allclose(moved.pixdim.numpy(), spacing, rtol=2e-3)
    assert moved_label is not None and torch.allclose(moved_label.affine, moved.affine)
    brain_ml = float((image.as_tensor()[0] != 0).sum()) * np.prod(native)
    kept_ml = float((moved.as_tensor()[0] != 0).sum()) * spacing**3
    assert kept_ml == pytest.approx(brain_ml, rel=0.2)


def test_each_sequence_is_scored_by_its_own_brain_voxels() -> None:
    image, _ = scan((20, 20, 20), np.eye(4))
    image[3, 10:] = 0.0  # one sequence covers half of the brain, as in Brats18_2013_20
    image[1] *= 32767 / float(image[1].max())
    scored = normalise(image).as_tensor()
    assert torch.equal(scored == 0, image.as_tensor() == 0)
    for sequence in scored:
        inside = sequence[sequence != 0]
        assert float(inside.mean()) == pytest.approx(0, abs=1e-4)
        assert float(inside.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_outside_the_working_grid_is_background() -> None:
    probs = torch.zeros(4, 8, 8, 8)
    probs[3] = 1.0
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = 10
    back = to_native(MetaTensor(probs, affine=affine), affine=np.eye(4), shape=(28, 28, 28))
    assert torch.allclose(back.sum(dim=0), torch.ones(28, 28, 28))
    assert bool((back[3, 10:18, 10:18, 10:18] == 1).all())
    assert bool((back[0, :9] == 1).all()) and bool((back[0, 19:] == 1).all())


def write_subject(folder: Path, shape: tuple[int, int, int] = (32, 36, 28)) -> Subject:
    image, label = scan(shape, affine_of("LPS", (3.0, 3.0, 3.0)))
    images = {}
    for sequence, values in zip(SEQUENCES, image.as_tensor().numpy(), strict=True):
        images[sequence] = folder / f"case_{sequence}.nii.gz"
        write_volumes(images[sequence], values, np.asarray(image.affine))
    seg = folder / "case_seg.nii.gz"
    write_segmentation(seg, label.as_tensor()[0].numpy(), reference=images["T1c"], scheme=get_scheme("brats2018"))
    return Subject("case", images, None, seg, None)


def test_files_become_a_training_item(tmp_path: Path) -> None:
    subject = write_subject(tmp_path)
    item = preprocessing(spacing=4.0, with_label=True)({"subject": subject, "scheme": "brats2018"})
    assert item["image"].dtype == torch.float32 and item["label"].dtype == torch.uint8
    assert set(np.unique(item["label"].numpy())) == {0, 1, 2, 3}
    assert item["subject_id"] == "case" and tuple(item["native_shape"].tolist()) == (32, 36, 28)
    assert np.allclose(item["native_affine"].numpy(), affine_of("LPS", (3.0, 3.0, 3.0)))
    unlabelled = preprocessing(spacing=4.0, with_label=False)({"subject": subject, "scheme": "brats2018"})
    assert "label" not in unlabelled and torch.equal(unlabelled["image"].as_tensor(), item["image"].as_tensor())


def test_image_and_label_are_augmented_alike() -> None:
    """The image carries its label as a sequence: where they are cropped, turned and flipped alike, they still agree."""
    image, label = scan((40, 40, 40), np.eye(4))
    coded = MetaTensor((label.as_tensor() > 0).float().expand(4, -1, -1, -1) * 5 + 1.0, affine=image.affine)
    steps = augmentation(roi=24)
    assert isinstance(steps, Compose)
    without_contrast = Compose(steps.transforms[:-1]).set_random_state(4)
    steps.set_random_state(5)
    for _ in range(6):
        (item,) = without_contrast({"image": coded, "label": label})
        assert item["image"].shape == (4, 24, 24, 24) and item["label"].shape == (1, 24, 24, 24)
        tumour = item["label"][0] > 0
        assert dice(item["image"][0] > 3.5, tumour) > 0.95
        assert set(torch.unique(item["label"]).tolist()) <= {0, 1, 2, 3}
        (full,) = steps({"image": coded, "label": label})
        assert bool(torch.isfinite(full["image"]).all())


def test_half_of_the_crops_are_centred_on_tumour() -> None:
    image, label = scan((64, 64, 64), np.eye(4))
    label[:] = 0
    label[0, 50:52, 50:52, 50:52] = 3
    steps = augmentation(roi=16).set_random_state(0)
    hits = sum(bool((steps({"image": image, "label": label})[0]["label"] > 0).any()) for _ in range(60))
    assert 18 <= hits <= 45


def test_crop_places_are_those_that_monai_would_list() -> None:
    """Else every crop of every earlier training would be another one."""
    label = scan((20, 24, 16), np.eye(4))[1].to(torch.uint8)
    tumour, background = map_binary_to_indices(label)
    found = CropPlacesd()({"label": label})
    assert found["tumour"].tolist() == tumour.tolist() and 0 < len(tumour) < label.numel()
    assert [found["anywhere"][place] for place in range(len(found["anywhere"]))] == background.tolist()


def test_crops_are_those_of_monai_without_the_places() -> None:
    image, label = scan((40, 44, 36), np.eye(4))
    item = {"image": image, "label": label.to(torch.uint8)}
    steps = augmentation(roi=16)
    plain = RandCropByPosNegLabeld(("image", "label"), label_key="label", spatial_size=16, num_samples=1)
    places, crop = steps.transforms[1:3]
    for seed in range(8):
        (one,), (other,) = (
            cut(found)
            for cut, found in (
                (plain.set_random_state(seed), item),
                (crop.set_random_state(seed), places(item)),
            )
        )
        plainly = {key: torch.as_tensor(value) for key, value in one.items()}
        assert all(torch.equal(plainly[key], torch.as_tensor(other[key])) for key in ("image", "label"))
        assert one.keys() == other.keys()


def test_half_precision_is_widened_after_the_crop_without_a_change() -> None:
    image, label = scan((40, 40, 40), np.eye(4))
    half = MetaTensor(normalise(image).as_tensor().half(), affine=image.affine)
    wide = MetaTensor(half.as_tensor().float(), affine=image.affine)
    for seed in range(3):
        steps = augmentation(roi=24)
        (one,) = steps.set_random_state(seed)({"image": half, "label": label})
        (other,) = steps.set_random_state(seed)({"image": wide, "label": label})
        assert one["image"].dtype == torch.float32 and torch.equal(one["image"].as_tensor(), other["image"].as_tensor())
        assert torch.equal(one["label"].as_tensor(), other["label"].as_tensor())


def test_a_seed_fixes_the_augmentation() -> None:
    image, label = scan((40, 40, 40), np.eye(4))

    def draw(seed: int) -> torch.Tensor:
        steps = augmentation(roi=24).set_random_state(seed)
        return torch.stack([steps({"image": image, "label": label})[0]["image"].as_tensor() for _ in range(3)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_jitter_changes_contrast_but_not_background() -> None:
    image, _ = scan((16, 16, 16), np.eye(4))
    x = normalise(image).as_tensor()[None]
    changed = jitter(x, torch.Generator().manual_seed(0))
    assert torch.equal(changed == 0, x == 0) and not torch.equal(changed, x)
    assert torch.equal(jitter(x, torch.Generator().manual_seed(0), strength=0.0), x)
    correlation = torch.corrcoef(torch.stack([x[x != 0], changed[x != 0]]))[0, 1]
    assert float(correlation) > 0.9


def test_flip_together_keeps_tensors_aligned() -> None:
    x = torch.arange(2 * 4 * 5 * 6.0).reshape(1, 2, 4, 5, 6)
    seen = set()
    for seed in range(20):
        a, b = flip_together([x, x[:, :1]], torch.Generator().manual_seed(seed))
        assert torch.equal(a[:, :1], b)
        assert torch.equal(a.flatten().sort().values, x.flatten())
        seen.add(float(a[0, 0, 0, 0, 0]))
    assert len(seen) > 4


def test_a_small_scan_is_padded_to_the_crop_with_background() -> None:
    image, label = scan((12, 40, 10), np.eye(4))
    (item,) = augmentation(roi=24).set_random_state(1)({"image": image, "label": label})
    assert item["image"].shape == (4, 24, 24, 24) and item["label"].shape == (1, 24, 24, 24)
    found, classes = item["image"].as_tensor(), item["label"].as_tensor()[0]
    near_brain = torch.nn.functional.max_pool3d((found != 0).any(dim=0)[None, None].float(), 3, 1, 1)[0, 0] > 0
    assert not bool(classes[~near_brain].any()), "no label where there is no image"
    assert float((found == 0).float().mean()) > 0.5


@pytest.mark.filterwarnings("ignore:Num foregrounds 0, :UserWarning")  # MONAI says so, and crops anywhere
def test_a_scan_without_tumour_can_be_cropped() -> None:
    image, label = scan((32, 32, 32), np.eye(4))
    (item,) = augmentation(roi=16)({"image": image, "label": MetaTensor(label * 0)})
    assert item["image"].shape == (4, 16, 16, 16) and not bool(item["label"].any())


def test_the_brain_box_holds_negative_intensities_too() -> None:
    image = torch.zeros(4, 40, 40, 40)
    image[:, 8:20, 8:32, 8:32] = -5.0
    image[:, 20:32, 8:32, 8:32] = 5.0
    moved, _ = to_working_grid(MetaTensor(image, affine=torch.eye(4, dtype=torch.float64)), spacing=2.0)
    assert int((moved[0] < 0).sum()) == int((moved[0] > 0).sum()) > 0


def test_a_scan_that_leaves_nothing_is_refused() -> None:
    empty = MetaTensor(torch.zeros(4, 16, 16, 16), affine=torch.eye(4, dtype=torch.float64))
    with pytest.raises(InputError, match="zeros only"):
        to_working_grid(empty, spacing=2.0)
    speck = empty.clone()
    speck[:, 8, 8, 8] = 1.0
    with pytest.raises(SettingsError, match="smaller than the brain, found 9 mm"):
        to_working_grid(MetaTensor(speck.as_tensor(), affine=empty.affine), spacing=9.0)


@pytest.mark.parametrize("spacing", [0.0, -1.0])
def test_a_spacing_that_is_no_size_is_refused(spacing: float) -> None:
    image, _ = scan((16, 16, 16), np.eye(4))
    with pytest.raises(SettingsError, match="spacing: expected a positive"):
        to_working_grid(image, spacing=spacing)


def test_a_real_scan_is_preprocessed_in_seconds(shared_data: Path) -> None:
    subject = find_subject(shared_data / "brats18" / "HGG" / "Brats18_CBICA_ABM_1")
    loaded = LoadSubjectd()({"subject": subject, "scheme": "brats2018"})
    began = time.process_time()
    moved, label = to_working_grid(loaded["image"], spacing=2.0, label=loaded["label"])
    normalise(moved)
    assert time.process_time() - began < 6.0  # about 1 s alone; a wide bound, this machine may be busy
    assert label is not None
    classes = to_native(one_hot(label), affine=loaded["native_affine"], shape=(240, 240, 155)).argmax(dim=0)
    assert dice(classes > 0, loaded["label"].as_tensor()[0] > 0) > 0.92


def test_mixed_pairs_keep_images_and_targets_together() -> None:
    x = torch.tensor([[1.0], [2.0], [4.0]])
    mixed, target = mix_pairs([x, 10 * x], torch.Generator().manual_seed(0))
    share = float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    assert 0 < share < 1
    expected = [share * 1 + (1 - share) * 4, share * 2 + (1 - share) * 1, share * 4 + (1 - share) * 2]
    assert mixed.flatten().tolist() == pytest.approx(expected)
    assert torch.allclose(target, 10 * mixed)
