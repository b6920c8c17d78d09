"""From files to a label map on the scan's own grid, with networks whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from fediod_med.checkpoints import Provenance
from fediod_med.data.layouts import Subject, find_cases
from fediod_med.data.nifti.writing import write_volumes
from fediod_med.data.phantoms import Grid, write_cohort
from fediod_med.data.transforms import to_native
from fediod_med.devices import autocast_dtype
from fediod_med.errors import GeometryError, SettingsError
from fediod_med.inference import (
    AutocastInferer,
    case_items,
    default_roi,
    native_classes,
    predict_probabilities,
    segment_subject,
    sliding_window,
    volumes_ml,
    write_case,
)
from fediod_med.labels import SEQUENCES, get_scheme
from fediod_med.networks import build_segmenter

CPU = torch.device("cpu")
OBLIQUE = np.array([[-1.4, 0.2, 0.1, 30], [0.2, -1.4, 0.3, 25], [0.1, 0.3, 2.0, -20], [0, 0, 0, 1.0]])
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * (1.4, 1.5, 2.0)


def provenance(spacing: float = 4.0, **settings: int) -> Provenance:
    return Provenance(
        kind="student",
        network={"backbone": "unet", "width": 4, "depth": 3, "in_channels": 4, "out_channels": 4},
        spacing=spacing,
        label_scheme="brats2018",
        sites=("north", "south"),
        privacy={"north": {"mode": "none"}, "south": {"mode": "none"}},
        trained_on="phantoms",
        seed=0,
        settings=settings,
    )


class BrightIsEnhancing(nn.Module):
    """Calls a voxel ET where T1c is above the brain's mean, oedema where FLAIR is, background elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros_like(x)
        logits[:, 3] = 40 * (x[:, 0] > 0.2)
        logits[:, 2] = 30 * (x[:, 3] > 0.2)
        logits[:, 0] = 10
        return logits


def blobs(*, shape: tuple[int, ...] = (20, 24, 16), affine: np.ndarray | None = None, at: tuple[int, ...] = (6, 7, 5)):
    """Probabilities of a core with a rim, smooth enough for interpolation to matter."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    near = np.exp(-np.square((grid - at) / 3.0).sum(-1))
    probs = np.stack([np.clip(1 - 1.4 * near, 0, 1), 0.3 * near, near - near**2, 0.7 * near**2])
    tensor = torch.from_numpy(probs / probs.sum(0)).float()
    return MetaTensor(tensor, affine=torch.from_numpy(np.diag([4.0, 4, 4, 1]) if affine is None else affine))


@pytest.fixture(scope="module")
def case_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    (folder,) = write_cohort(root, count=1, seed=3, grid=Grid((40, 44, 36), 4.6), prefix="NORTH")
    return folder


def test_autocast_inferer_computes_in_reduced_precision_and_returns_float32() -> None:
    seen: list[torch.dtype] = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.conv3d(x, torch.ones(1, 1, 1, 1, 1))
            seen.append(y.dtype)
            return y

    x = torch.rand(1, 1, 32, 32, 32)
    assert AutocastInferer(SimpleInferer())(x, Probe()).dtype == torch.float32
    assert AutocastInferer(SimpleInferer(), enabled=False)(x, Probe()).dtype == torch.float32
    assert AutocastInferer(SimpleInferer())(x[..., :4], Probe()).dtype == torch.float32
    assert seen == [autocast_dtype(CPU) or torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("shape", [(16, 16, 16), (40, 24, 32), (5, 33, 16)])
def test_probabilities_cover_any_shape_and_sum_to_one(shape: tuple[int, ...]) -> None:
    network = build_segmenter("unet", width=4, depth=3).eval()
    affine = torch.from_numpy(OBLIQUE)
    image = MetaTensor(torch.randn(4, *shape), affine=affine)
    probs = predict_probabilities(network, image, roi=16, device=CPU)
    assert probs.shape == (4, *shape)
    assert probs.dtype == torch.float32
    assert torch.allclose(probs.as_tensor().sum(0), torch.ones(shape), atol=1e-5)
    assert torch.equal(probs.affine, affine)


def test_overlapping_windows_of_a_local_network_equal_one_pass() -> None:
    image = MetaTensor(torch.randn(4, 40, 24, 32), affine=torch.eye(4))
    network = BrightIsEnhancing()
    whole = torch.softmax(network(image.as_tensor()[None])[0], dim=0)
    assert torch.allclose(predict_probabilities(network, image, roi=16, device=CPU).as_tensor(), whole, atol=1e-4)


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(SettingsError, match="roi"):
        sliding_window(4)
    with pytest.raises(SettingsError, match="overlap"):
        sliding_window(32, 1.0)


def test_window_follows_the_training_patch_and_fits_the_network() -> None:
    assert default_roi(provenance()) == 64
    assert default_roi(provenance(roi=32)) == 32
    assert default_roi(provenance(roi=30)) == 32  # depth 3: multiples of 4


@pytest.mark.parametrize("at", [(6, 7, 5), (0, 0, 0), (19, 23, 15)])
@pytest.mark.parametrize("affine", [np.diag([-2.0, -2, 3, 1]), OBLIQUE, np.diag([9.0, 9, 9, 1])])
def test_resampling_near_the_tumour_equals_resampling_everything(at: tuple[int, ...], affine: np.ndarray) -> None:
    probs = blobs(at=at)
    affine = affine.copy()
    shape = (60, 64, 40)
    affine[:3, 3] = np.array([38, 46, 30]) - affine[:3, :3] @ (np.array(shape) / 2)  # centre on centre
    whole = to_native(probs, affine=affine, shape=shape).argmax(0).numpy()
    near = native_classes(probs, affine=affine, shape=shape)
    assert near.dtype == np.uint8
    assert near.any()
    assert np.count_nonzero(near != whole) <= 1  # a voxel on the decision boundary may round either way


def test_a_tumour_outside_the_native_grid_or_no_tumour_gives_background() -> None:
    far = np.eye(4)
    far[:3, 3] = 500
    assert not native_classes(blobs(), affine=far, shape=(8, 8, 8)).any()
    nothing = MetaTensor(torch.eye(4)[:, :1, None, None].expand(4, 6, 6, 6).clone(), affine=torch.eye(4))
    assert not native_classes(nothing, affine=np.eye(4), shape=(8, 8, 8)).any()


def test_volumes_are_voxels_times_the_determinant() -> None:
    classes = np.zeros((10, 10, 10), dtype=np.uint8)
    classes.flat[:6], classes.flat[6:10], classes.flat[10:13] = 1, 2, 3
    volumes = volumes_ml(classes, np.diag([-2.0, 2.0, 2.5, 1.0]))
    assert volumes == pytest.approx({"NCR": 0.06, "ED": 0.04, "ET": 0.03, "TC": 0.09, "WT": 0.13})


def test_a_scan_on_the_working_spacing_comes_back_voxel_by_voxel(tmp_path: Path) -> None:
    """LPS axes, 4 mm: the way there and back is flips and crops only, so the answer is exact."""
    rng = np.random.default_rng(0)
    images = {}
    raw = {}
    affine = np.diag([-4.0, -4.0, 4.0, 1.0])
    affine[:3, 3] = (50, 60, -30)
    for name in SEQUENCES:
        values = np.zeros((30, 28, 26), dtype=np.float32)
        values[4:26, 5:22, 3:20] = rng.uniform(50, 200, size=(22, 17, 17))
        raw[name], images[name] = values, tmp_path / f"{name}.nii.gz"
        write_volumes(images[name], values, affine)
    result = segment_subject(Subject("x", images), BrightIsEnhancing(), provenance(roi=16), device=CPU)
    brain = raw["T1c"] > 0
    score = {n: np.where(brain, (v - v[brain].mean()) / v[brain].std(), 0) for n, v in raw.items()}
    expected = np.where(score["T1c"] > 0.2, 3, np.where(score["FLAIR"] > 0.2, 2, 0))
    assert np.count_nonzero(result.classes != expected) <= 2
    assert result.volumes_ml["ET"] == pytest.approx(np.count_nonzero(result.classes == 3) * 0.064)
    assert result.image is not None
    assert np.array_equal(result.image[0], raw["T1c"])


def test_probabilities_on_the_native_grid_agree_with_the_label_map(case_folder: Path) -> None:
    (subject,) = find_cases(case_folder)
    result = segment_subject(subject, BrightIsEnhancing(), provenance(roi=16), device=CPU, keep_probabilities=True)
    assert result.probabilities is not None
    assert result.probabilities.shape == (4, 40, 44, 36)
    assert np.mean(result.probabilities.argmax(0) != result.classes) < 1e-4


@pytest.mark.parametrize("scheme", ["brats2018", "brats2023", "msd"])
def test_written_case_has_the_scan_grid_and_true_numbers(case_folder: Path, tmp_path: Path, scheme: str) -> None:
    (subject,) = find_cases(case_folder)
    model = provenance(roi=16)
    result = segment_subject(subject, BrightIsEnhancing(), model, device=CPU)
    paths = write_case(result, tmp_path, scheme=get_scheme(scheme), provenance=model)
    written, scan = nib.load(paths["segmentation"]), nib.load(subject.images["T1c"])
    assert paths["segmentation"].name == f"{subject.subject_id}_seg.nii.gz"
    assert written.shape == scan.shape
    assert np.array_equal(written.affine, scan.affine)
    assert written.get_data_dtype() == np.uint8
    values = np.asarray(written.dataobj)
    assert np.count_nonzero(values == get_scheme(scheme).to_value[3]) == np.count_nonzero(result.classes == 3) > 0
    stats = json.loads(paths["statistics"].read_text())
    volumes = stats["volumes_ml"]
    assert volumes["WT"] == pytest.approx(np.count_nonzero(values) * 4.6**3 / 1000, abs=1e-3)
    assert volumes["WT"] == pytest.approx(volumes["NCR"] + volumes["ED"] + volumes["ET"], abs=2e-3)
    assert stats["notice"] == "Research software. Not for clinical use."
    assert stats["labels"]["ET"] == get_scheme(scheme).to_value[3]
    assert stats["model"]["privacy"]["north"] == {"mode": "none"}
    assert stats["grid"] == {"shape": [40, 44, 36], "spacing_mm": [4.6] * 3, "orientation": "RAS"}


def test_statistics_count_lesions_that_touch_at_a_corner_once(tmp_path: Path, case_folder: Path) -> None:
    (subject,) = find_cases(case_folder)
    result = segment_subject(subject, BrightIsEnhancing(), provenance(roi=16), device=CPU)
    result.classes[...] = 0
    result.classes[5, 5, 5] = result.classes[6, 6, 6] = result.classes[20, 20, 20] = 2
    paths = write_case(result, tmp_path, scheme=get_scheme("brats2018"), provenance=provenance())
    assert json.loads(paths["statistics"].read_text())["lesions"] == 2


def test_sequences_on_two_grids_are_refused(tmp_path: Path, case_folder: Path) -> None:
    (subject,) = find_cases(case_folder)
    other = tmp_path / "flair.nii.gz"
    write_volumes(other, np.random.default_rng(0).random((40, 44, 36), dtype=np.float32), np.eye(4))
    moved = Subject("x", {**subject.images, "FLAIR": other})
    with pytest.raises(GeometryError, match="mm"):
        segment_subject(moved, BrightIsEnhancing(), provenance(), device=CPU)


def test_case_items_list_the_scans_of_a_folder(case_folder: Path) -> None:
    items = case_items(str(case_folder.parent.parent))
    assert [item["subject"].subject_id for item in items] == [case_folder.name]


@pytest.mark.parametrize("orientation", [("R", "A", "S"), ("L", "P", "S"), ("L", "A", "S")])
def test_real_scans_keep_their_grid_in_every_orientation(
    shared_data: Path, tmp_path: Path, orientation: tuple[str, ...]
) -> None:
    case = next((shared_data / "brats18_2mm" / "HGG").iterdir())
    (source,) = find_cases(case)
    images = {}
    for name, path in source.images.items():
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
        )
        turned = image.as_reoriented(turn)
        images[name] = tmp_path / f"{name}.nii.gz"
        write_volumes(images[name], np.asarray(turned.dataobj, dtype=np.float32), turned.affine)
    results = [
        segment_subject(Subject("x", paths), BrightIsEnhancing(), provenance(2.0, roi=48), device=CPU)
        for paths in (source.images, images)
    ]
    assert results[1].volumes_ml == pytest.approx(results[0].volumes_ml, rel=1e-3)


TURNS = [
    np.diag([1.0, 1, 1, 1]),
    np.diag([-1.0, 1, -1, 1]),
    np.eye(4)[[1, 2, 0, 3]],
    np.eye(4)[[2, 0, 1, 3]] @ np.diag([1.0, -1, 1, 1]),
]


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("offset", [(0, 0, 0), (3, -2, 1), (-4, 5, 0)])
def test_a_turned_grid_gives_what_interpolation_gives_at_its_voxels(turn, offset):
    generator = np.random.default_rng(5)
    probs = generator.dirichlet([0.5] * 4, size=(7, 8, 9)).astype(np.float32).transpose(3, 0, 1, 2)
    working = np.diag([1.0, 1.0, 1.0, 1.0])
    working[:3, 3] = (-10, 4, 2)
    native = working @ turn
    native[:3, 3] = (working @ [*offset, 1])[:3] + native[:3, :3].clip(max=0).sum(axis=1) * -6
    image = MetaTensor(torch.from_numpy(probs), affine=torch.from_numpy(working))
    found = native_classes(image, affine=native, shape=(8, 7, 9))
    by_hand = np.zeros((8, 7, 9), np.uint8)
    inverse = np.linalg.inv(working) @ native
    for index in np.ndindex(8, 7, 9):
        at = np.rint(inverse @ [*index, 1])[:3].astype(int)
        if (at >= 0).all() and (at < (7, 8, 9)).all():
            by_hand[index] = probs[:, at[0], at[1], at[2]].argmax()
    assert by_hand.any()
    assert np.array_equal(found, by_hand)
