"""A hospital's training: what is drawn, how the rate runs, what is written, and that a seed fixes all of it."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from ignite.handlers import EMAHandler
from monai.data import Dataset
from torch import Tensor, nn

from fediod_med.checkpoints import current_commit, load_segmenter, load_weights, read_provenance
from fediod_med.data.layouts import find_subjects
from fediod_med.data.phantoms import Grid, load_anatomy, write_cohort
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import preprocessing
from fediod_med.errors import InputError, SettingsError
from fediod_med.evaluation import read_scores
from fediod_med.networks import build_segmenter
from fediod_med.resources import public_prior
from fediod_med.sites import SITE_FILE, Site
from fediod_med.teacher import (
    CosineRate,
    ScoreHandler,
    check_site_file,
    evaluate_teacher,
    labelled,
    public_pool,
    quiet_monai,
    rehearsal_sampler,
    scored_cases,
    train_teacher,
    training_items,
    warm_start,
    written_classes,
)

GRID = Grid((32, 32, 32), 6.0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Three phantom patients, one of them held out, and settings that train within a second."""
    folder = tmp_path_factory.mktemp("hospitals") / "north"
    write_cohort(folder / "data", count=3, seed=5, grid=GRID, prefix="NORTH")
    return Site(
        folder=folder,
        site_name="north",
        layout="brats2018",
        label_scheme="brats2018",
        dataset_dir="data",
        folds=3,
        fold=1,
        spacing=6.0,
        roi=16,
        width=4,
        depth=3,
        init="random",
        rehearsal=0.0,
        epochs=2,
        steps_per_epoch=3,
        batch_size=1,
    )


@pytest.fixture(scope="module")
def phantoms() -> PublicSampler:
    """Three public phantoms."""
    return PublicSampler(spacing=6.0, roi=16, count=3, seed=2, anatomy=load_anatomy(GRID))


@pytest.fixture(scope="module")
def trained(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(site, output_dir=tmp_path_factory.mktemp("models"), device="cpu")


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_weights(path)[0]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_seed_fixes_the_weights_to_the_last_bit(site: Site, trained: Path, tmp_path: Path) -> None:
    torch.rand(7)  # what the caller drew before must not matter
    np.random.rand(3)
    again = train_teacher(site, output_dir=tmp_path / "again", device="cpu")
    assert equal(weights_of(trained), weights_of(again))
    other = train_teacher(dataclasses.replace(site, seed=1), output_dir=tmp_path / "other", device="cpu")
    assert not equal(weights_of(trained), weights_of(other))


def test_training_leaves_the_random_numbers_of_its_caller_alone(site: Site, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    train_teacher(dataclasses.replace(site, epochs=1, steps_per_epoch=1), output_dir=tmp_path, device="cpu")
    assert torch.equal(torch.rand(4), expected)


def test_provenance_says_what_the_teacher_is(site: Site, trained: Path) -> None:
    network, provenance = load_segmenter(trained)
    assert provenance.kind == "teacher" and provenance.trained_on == "patients of one hospital"
    assert dict(provenance.network) == site.network()
    assert provenance.sites == ("north",)
    assert provenance.privacy == {"north": {"mode": "none", "epsilon": None, "delta": None}}
    assert (provenance.spacing, provenance.label_scheme, provenance.seed) == (6.0, "brats2018", 0)
    assert provenance.settings == {"roi": 16, "steps": 6}
    assert provenance.commit == current_commit()
    assert network(torch.zeros(1, 4, 16, 16, 16)).shape == (1, 4, 16, 16, 16)


def test_rehearsal_changes_what_a_teacher_learns(
    site: Site, phantoms: PublicSampler, trained: Path, tmp_path: Path
) -> None:
    with_phantoms = dataclasses.replace(site, rehearsal=0.5)
    path = train_teacher(with_phantoms, output_dir=tmp_path / "a", device="cpu", public=phantoms)
    again = train_teacher(with_phantoms, output_dir=tmp_path / "b", device="cpu", public=phantoms)
    assert equal(weights_of(path), weights_of(again))
    assert not equal(weights_of(path), weights_of(trained))


def test_the_loss_falls_and_each_epoch_is_reported(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    longer = dataclasses.replace(site, epochs=8, steps_per_epoch=6, learning_rate=5e-3, width=8, batch_size=2)
    train_teacher(longer, output_dir=tmp_path, device="cpu", on_epoch=lambda *epoch: seen.append(epoch))
    assert [(done, total) for done, total, _ in seen] == [(n, 8) for n in range(1, 9)]
    assert seen[-1][2] < 0.8 * seen[0][2]


def test_given_patients_replace_those_of_the_site(site: Site, trained: Path, tmp_path: Path) -> None:
    """The pooled row trains on every hospital's patients through the same bundle."""
    everyone = labelled(find_subjects(site.data_root, "brats2018", require_label=True), "brats2018")
    path = train_teacher(
        site, output_dir=tmp_path, device="cpu", data=everyone, kind="pooled", trained_on="patients of all hospitals"
    )
    assert read_provenance(path).kind == "pooled" and read_provenance(path).trained_on == "patients of all hospitals"
    assert not equal(weights_of(path), weights_of(trained))


def test_a_site_without_held_out_patients_can_train_but_not_evaluate(site: Site, trained: Path, tmp_path: Path) -> None:
    whole = dataclasses.replace(site, folds=1, fold=0, epochs=1)
    assert train_teacher(whole, output_dir=tmp_path / "models", device="cpu").is_file()
    with pytest.raises(SettingsError, match=r"north: no held-out fold.*folds: 2 or more"):
        evaluate_teacher(whole, weights=trained, output_dir=tmp_path / "eval", device="cpu")
    assert not (tmp_path / "eval").exists()


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_scores_the_held_out_fold_and_keeps_its_label_maps(
    site: Site, trained: Path, tmp_path: Path
) -> None:
    folder = evaluate_teacher(site, weights=trained, output_dir=tmp_path, device="cpu")
    (held_out,) = site.subjects()[1]
    assert {(s.site, s.subject_id) for s in read_scores(folder / "metrics.csv")} == {("north", held_out.subject_id)}
    classes = written_classes(folder / "segmentations", "brats2018")(held_out)
    assert classes.shape == GRID.shape and set(np.unique(classes)) <= {0, 1, 2, 3}


def test_scoring_needs_patients() -> None:
    with pytest.raises(SettingsError, match="site north: no held-out fold"):
        scored_cases([], "north")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_inside_the_bundle_arrives_as_ours(site: Site, tmp_path: Path) -> None:
    lost = dataclasses.replace(site, dataset_dir="elsewhere")
    with pytest.raises(InputError, match="elsewhere") as caught:
        evaluate_teacher(lost, weights=tmp_path / "none.safetensors", output_dir=tmp_path, device="cpu")
    assert "ConfigExpression" not in str(caught.value) and caught.value.__cause__ is None


def test_a_defective_scan_is_named(site: Site, tmp_path: Path) -> None:
    write_cohort(tmp_path / "data", count=1, seed=5, grid=GRID, prefix="NORTH")
    (scan,) = (tmp_path / "data").rglob("*_t1ce.nii.gz")
    scan.write_bytes(scan.read_bytes()[:400])
    broken = dataclasses.replace(site, folder=tmp_path, folds=1, fold=0)
    with pytest.raises(InputError, match=scan.name):
        train_teacher(broken, output_dir=tmp_path / "models", device="cpu")
    assert not (tmp_path / "models").exists()


def test_replaced_settings_are_checked_before_any_scan_is_read(site: Site, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="roi: expected a multiple of 8"):
        train_teacher(dataclasses.replace(site, roi=20, dataset_dir="elsewhere"), output_dir=tmp_path)
    with pytest.raises(SettingsError, match="device"):
        train_teacher(site, output_dir=tmp_path, device="abacus")


def test_a_site_file_beside_the_bundle_run_is_checked(tmp_path: Path) -> None:
    check_site_file(str(tmp_path))  # no site file: nothing to check
    (tmp_path / SITE_FILE).write_text("site_name: north\nlayout: brats2018\nlabel_scheme: brats2018\nspeed: 3\n")
    with pytest.raises(SettingsError, match="speed"):
        check_site_file(str(tmp_path))


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warm_up"), [(5, 1), (100, 10), (1000, 50)])
def test_the_rate_warms_up_and_ends_near_zero(steps: int, warm_up: int) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=123.0)  # the schedule's peak counts, not the optimizer's rate
    rates: list[float] = []

    def step(engine: Engine, batch: object) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()

    engine = Engine(step)
    CosineRate(optimizer, peak=0.1, steps=steps).attach(engine)
    engine.run(range(steps), max_epochs=1)
    assert rates[0] == pytest.approx(0.1 / warm_up)
    cosine = [0.05 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
    assert rates == pytest.approx([c * min(1, (i + 1) / warm_up) for i, c in enumerate(cosine)])
    assert max(rates) <= 0.1 and rates[-1] < 0.1 * 3 / steps


def test_the_written_weights_are_an_average_of_the_last_ones() -> None:
    """ignite's EMA handler, which train.yaml names: a share of each new step."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = EMAHandler(network, momentum=0.01)
    engine = Engine(lambda _engine, _batch: network.weight.data.fill_(1.0))
    average.attach(engine)
    engine.run(range(3), max_epochs=1)
    assert float(average.ema_model.weight) == pytest.approx(1 - 0.99**3)


def test_half_of_the_draw_is_public(site: Site, phantoms: PublicSampler) -> None:
    train, _ = site.subjects()
    items = training_items(labelled(train, "brats2018"), preprocessing(spacing=6.0, with_label=True), phantoms)
    assert [item["public"] for item in items] == [False, False, True, True, True]
    for item in items:
        assert item["image"].dtype == (torch.float16 if item["public"] else torch.float32)
        assert item["image"].shape[1:] == item["label"].shape[1:] and item["label"].dtype == torch.uint8
    kept = {image.data_ptr() for image, _ in phantoms.volumes()}
    assert {item["image"].data_ptr() for item in items[2:]} == kept, "the pool is not copied"
    drawn = torch.tensor(list(rehearsal_sampler(Dataset(items), rehearsal=0.5, draws=4000, seed=0)))
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    assert share[:2].tolist() == pytest.approx([0.25, 0.25], abs=0.03)
    assert share[2:].tolist() == pytest.approx([1 / 6] * 3, abs=0.03)


@pytest.mark.parametrize("rehearsal", [0.0, 0.5])
def test_without_phantoms_only_patients_are_drawn(rehearsal: float) -> None:
    items = [{"public": False}, {"public": False}]
    drawn = list(rehearsal_sampler(Dataset(items), rehearsal=rehearsal, draws=50, seed=3))
    assert set(drawn) == {0, 1} and len(drawn) == 50
    assert drawn == list(rehearsal_sampler(Dataset(items), rehearsal=rehearsal, draws=50, seed=3))


def test_no_phantoms_are_made_when_none_are_asked_for() -> None:
    assert public_pool(rehearsal=0.0, spacing=4.0, roi=48, count=64, seed=0) is None


def test_warm_start_takes_the_public_prior_where_it_fits() -> None:
    weights, provenance = load_weights(public_prior())
    spec = dict(provenance.network)
    for init in ("prior", "auto"):
        network = warm_start(build_segmenter(**spec), init=init, spec=spec)
        assert equal({k: v.float() for k, v in network.state_dict().items()}, weights)
    torch.manual_seed(0)
    untouched = build_segmenter(**spec)
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    assert equal(dict(warm_start(untouched, init="random", spec=spec).state_dict()), before)


def test_warm_start_names_the_difference_where_the_prior_does_not_fit() -> None:
    spec = {"backbone": "dynunet", "width": 4, "depth": 3, "in_channels": 4, "out_channels": 4}
    network = build_segmenter(**spec)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert equal(dict(warm_start(network, init="auto", spec=spec).state_dict()), before)
    with pytest.raises(SettingsError, match=r"init: the public prior is a .*this network a .*'dynunet'"):
        warm_start(network, init="prior", spec=spec)


def test_scores_of_the_held_out_fold_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda _engine, _batch: None)
    engine.state.metrics = {"val_mean_dice": 0.25}
    ScoreHandler().attach(engine)
    with caplog.at_level(logging.INFO, logger="fediod_med.teacher"):
        engine.run(range(1), max_epochs=1)
    assert "held-out fold, val_mean_dice 0.2500" in caplog.messages


def test_training_does_not_touch_our_loggers(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fediod_med"):
        train_teacher(dataclasses.replace(site, epochs=1), output_dir=tmp_path, device="cpu")
    assert any(message.startswith("epoch 1 of 1, loss ") for message in caplog.messages)
    assert logging.getLogger("fediod_med.teacher").propagate


def test_only_known_noise_is_silenced() -> None:
    noisy = logging.getLogger("monai.bundle.workflows")
    level = noisy.level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_monai():
            assert noisy.level == logging.CRITICAL and logging.getLogger("monai").level != logging.CRITICAL
            warnings.warn("parsing config_file of ours", UserWarning, stacklevel=1)
            warnings.warn("`torch.cuda.amp.GradScaler(args...)` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("something new", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["something new"]
    assert noisy.level == level
