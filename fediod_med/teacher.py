"""A hospital's own training and evaluation: runs the teacher bundle in process, and holds the parts its configs name.

The schedule is fixed and the averaged weights of the last step are kept: nothing is selected on a hospital's patients.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.data import Dataset
from torch import nn
from torch.utils.data import WeightedRandomSampler

from fediod_med.checkpoints import Provenance, current_commit, load_into, load_weights, save_weights
from fediod_med.data.layouts import Subject
from fediod_med.data.nifti.reading import read_label
from fediod_med.data.sampler import PublicSampler
from fediod_med.errors import FediodError, SettingsError
from fediod_med.labels import LabelScheme, get_scheme
from fediod_med.privacy.gate import Gate
from fediod_med.resources import bundle_dir, public_prior
from fediod_med.sites import SITE_FILE, Site, check_settings, load_site

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_NOISY_LOGGERS = (
    "monai.data.nvimgcodec_pydicom_plugin",  # a DICOM decoder that nothing here uses is absent
    "monai.bundle.workflows",  # the logging file is left out on purpose: a library does not configure logging
    "ignite.engine.engine",  # our handlers report epochs; ignite's copy of every error would come before ours
)


def labelled(subjects: Sequence[Subject], scheme: str) -> list[dict[str, Any]]:
    """Subjects as the bundle's data list: `{"subject": Subject, "scheme": name}` each."""
    return [{"subject": subject, "scheme": scheme} for subject in subjects]


def check_site_file(site_dir: str) -> None:
    """Read `site.yaml` of a folder as plain data, if there is one, and refuse what it may not hold.

    First step of the bundle, for runs that MONAI's own command line starts with a site file.
    """
    folder = Path(site_dir)
    if (folder / SITE_FILE).is_file():
        load_site(folder)


def check_plain_training(site_name: str, privacy_mode: str) -> None:
    """Refuse to train without privacy at a site that promises private training.

    Raises:
        SettingsError: the mode is `dp-sgd`.
    """
    if privacy_mode == "dp-sgd":
        raise SettingsError(
            f"site {site_name}: privacy_mode dp-sgd is trained by train_private.yaml, and train.yaml protects nobody; "
            f"use `fediod site train {site_name}`, or name train_private.yaml"
        )


def written_classes(folder: str | Path, scheme: str) -> Callable[[Subject], np.ndarray]:
    """Reader of the label maps `<id>_seg.nii.gz` that a bundle wrote to `folder`, for scoring what is on disk."""

    def read(subject: Subject) -> np.ndarray:
        written = Path(folder) / f"{subject.subject_id}_seg.nii.gz"
        return read_label(dataclasses.replace(subject, label=written), get_scheme(scheme))

    return read


def scored_cases(data: Sequence[Mapping[str, Any]], site_name: str) -> list[tuple[str, Subject, LabelScheme]]:
    """A bundle's data list as the cases of `evaluation.evaluate_predictor`.

    Raises:
        SettingsError: the list is empty, because the site holds out nobody.
    """
    if not data:
        raise SettingsError(f"site {site_name}: no held-out fold to evaluate on; set folds: 2 or more in {SITE_FILE}")
    return [(site_name, item["subject"], get_scheme(item["scheme"])) for item in data]


def warm_start(network: nn.Module, *, init: str, spec: Mapping[str, Any]) -> nn.Module:
    """Load the public prior into a network, in place.

    Args:
        network: just built from `spec`.
        init: `prior` (must fit), `auto` (if it fits) or `random` (leave as it is).
        spec: keywords of `networks.build_segmenter`.

    Raises:
        SettingsError: `prior` was asked for and has another architecture.
    """
    if init == "random":
        return network
    path = public_prior()
    weights, provenance = load_weights(path)
    if dict(provenance.network) == dict(spec):
        load_into(network, weights, path)
        return network
    if init == "prior":
        raise SettingsError(
            f"init: the public prior is a {dict(provenance.network)}, this network a {dict(spec)}; "
            f"choose the same backbone, width and depth, or init: random"
        )
    return network


def public_pool(*, rehearsal: float, spacing: float, roi: int, count: int, seed: int) -> PublicSampler | None:
    """Phantoms for rehearsal, or `None` when no share of the draw is public."""
    if rehearsal == 0:
        return None
    return PublicSampler(spacing=spacing, roi=roi, count=count, seed=seed + 17)


def training_items(
    data: Sequence[Mapping[str, Any]], preprocessing: Callable[[Any], Any], public: PublicSampler | None
) -> list[dict[str, Any]]:
    """Preprocess every patient once, and append the public phantoms; each item `image`, `label` and `public`.

    Phantoms stay in the pool's float16: in float32, 48 heads at 1 mm would take 6 GB in every process that trains.
    """
    items = [{**{k: loaded[k] for k in ("image", "label")}, "public": False} for loaded in map(preprocessing, data)]
    for image, classes in () if public is None else public.volumes():
        items.append({"image": image, "label": classes[None], "public": True})
    return items


def rehearsal_sampler(dataset: Dataset, *, rehearsal: float, draws: int, seed: int) -> WeightedRandomSampler:
    """Draws with replacement: patients uniformly with probability `1 - rehearsal`, else a phantom."""
    public = torch.tensor([bool(item["public"]) for item in dataset.data])
    share = rehearsal if bool(public.any()) else 0.0
    weights = torch.where(public, share / public.sum().clamp_min(1), (1 - share) / (~public).sum().clamp_min(1))
    return WeightedRandomSampler(
        weights.tolist(), num_samples=draws, replacement=True, generator=torch.Generator().manual_seed(seed)
    )


class CosineRate:
    """Handler: learning rate from `peak` to 0 over the whole schedule, each step, after a short linear warm-up."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, peak: float, steps: int) -> None:
        """`steps`: of the whole training."""
        for group in optimizer.param_groups:
            group["lr"] = peak  # the schedule takes its base from here, and sets the rate of the first step
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, steps))

    def attach(self, engine: Engine) -> None:
        """Step after each iteration."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self._schedule.step())


def cosine_rate(step: int, steps: int) -> float:
    """Share of the peak rate at `step` (from 0) of `steps`: a short linear warm-up, cosine to 0 over all of them."""
    warm_up = max(1, min(50, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


class ProgressHandler:
    """Handler: logs each epoch's mean loss and, where given, calls `callback(epoch, epochs, loss)`."""

    def __init__(self, callback: Callable[[int, int, float], None] | None = None) -> None:
        """`callback` as above."""
        self._callback = callback
        self._losses: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Collect the loss of each step, report after each epoch."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        # Read at the end of the epoch: reading each one would make a GPU wait for the processor at every step.
        self._losses.append(torch.as_tensor((output[0] if isinstance(output, list) else output)["loss"]).detach())

    def _report(self, engine: Engine) -> None:
        loss = sum(float(found) for found in self._losses) / max(len(self._losses), 1)
        self._losses.clear()
        epochs = int(engine.state.max_epochs or 0)
        logger.info("epoch %d of %d, loss %.4f", engine.state.epoch, epochs, loss)
        if self._callback is not None:
            self._callback(engine.state.epoch, epochs, loss)


class ScoreHandler:
    """Handler: logs the scores of the held-out fold after each validation.

    MONAI's `StatsHandler` would take over the logger it is given: no propagation, level INFO.
    """

    def attach(self, engine: Engine) -> None:
        """Report when the validation is through."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _report(self, engine: Engine) -> None:
        for name, value in engine.state.metrics.items():
            logger.info("held-out fold, %s %.4f", name, float(value))


class WeightsSaver:
    """Handler: at the end of training, write the averaged weights with their provenance."""

    def __init__(
        self,
        average: Any,
        *,
        path: str,
        site_name: str,
        network: Mapping[str, Any],
        spacing: float,
        roi: int,
        label_scheme: str,
        privacy_mode: str,
        seed: int,
        steps: int,
        kind: str = "teacher",
        trained_on: str = "patients of one hospital",
    ) -> None:
        """`average`: ignite's `EMAHandler`; `path`: the file to write; the rest is provenance."""
        self._average = average
        self._path = Path(path)
        self._provenance = Provenance(
            kind=kind,
            network=dict(network),
            spacing=float(spacing),
            label_scheme=label_scheme,
            sites=(site_name,),
            privacy={site_name: {"mode": privacy_mode, "epsilon": None, "delta": None}},
            trained_on=trained_on,
            seed=seed,
            settings={"roi": roi, "steps": steps},
            commit=current_commit(),
        )

    def attach(self, engine: Engine) -> None:
        """Write when training completes."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, _: Engine) -> None:
        save_weights(self._path, self._average.ema_model.state_dict(), self._provenance)
        logger.info("wrote %s", self._path)


def train_teacher(
    site: Site,
    *,
    output_dir: Path,
    device: str = "auto",
    data: Sequence[Mapping[str, Any]] | None = None,
    public: PublicSampler | None = None,
    kind: str = "teacher",
    trained_on: str = "patients of one hospital",
    on_epoch: Callable[[int, int, float], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    gate: Gate | None = None,
) -> Path:
    """Train one hospital's teacher by running its bundle in this process.

    A site of mode `dp-sgd` is trained privately, by `train_private.yaml`, and charged to its ledger.

    Args:
        site: settings; use `dataclasses.replace` to override any of them.
        output_dir: receives `model.safetensors`.
        device: see `devices.pick_device`.
        data: `labelled(...)` subjects to train on instead of the site's own training part (the pooled row).
        public: phantoms for rehearsal; made by the bundle when omitted.
        kind: of the provenance.
        trained_on: of the provenance.
        on_epoch: receives (epoch, epochs, loss); never called in a private training.
        on_step: receives (step, steps) of a private training.
        gate: of the site, for a private training; opened by the bundle when omitted.

    Returns:
        The weights file.

    Raises:
        FediodError: settings or data are wrong; the message is that of the cause, not of MONAI's wrapper.
    """
    check_settings(site)
    path = output_dir / WEIGHTS
    override: dict[str, Any] = {
        **_site_values(site),
        "device_name": device,
        "ckpt_dir": str(output_dir),
        "train_data": labelled(site.subjects()[0], site.label_scheme) if data is None else list(data),
    }
    if public is not None:
        override["public"] = public
    if site.privacy_mode == "dp-sgd":
        if data is not None:
            raise SettingsError(f"{site.site_name}: a private training uses the site's own patients, and no others")
        own = {} if gate is None else {"gate": gate}
        _run_bundle("train_private", {**override, **own, "site": site, "on_step": on_step})
    else:
        _run_bundle("train", {**override, "kind": kind, "trained_on": trained_on, "on_epoch": on_epoch})
    return path


def evaluate_teacher(site: Site, *, weights: Path, output_dir: Path, device: str = "auto") -> Path:
    """Segment and score the site's held-out fold through its bundle, on the native grids.

    Returns:
        The folder with `metrics.csv`, `metrics.json` and the label maps in `segmentations/`.

    Raises:
        FediodError: no weights, no held-out fold, or defective data.
    """
    check_settings(site)
    _run_bundle(
        "evaluate",
        {**_site_values(site), "device_name": device, "weights": str(weights), "output_dir": str(output_dir)},
    )
    return output_dir


def _site_values(site: Site) -> dict[str, Any]:
    keys = (
        "site_name", "layout", "label_scheme", "subject_pattern", "partition_id", "folds", "fold", "spacing", "roi",
        "backbone", "width", "depth", "init", "rehearsal", "epochs", "steps_per_epoch", "batch_size",
        "learning_rate", "seed", "num_workers", "privacy_mode",
    )  # fmt: skip
    partition = str(site.folder / site.partition_csv) if site.partition_csv else ""
    return {key: getattr(site, key) for key in keys} | {
        "dataset_dir": str(site.data_root),
        "partition_csv": partition,
    }


def _run_bundle(phase: str, override: Mapping[str, Any]) -> None:
    root = bundle_dir("teacher")
    configs = root / "configs"
    with quiet_monai(), torch.random.fork_rng(devices=[]):  # the caller's random numbers stay its own
        workflow = ConfigWorkflow(
            config_file=[str(configs / "common.yaml"), str(configs / f"{phase}.yaml")],
            meta_file=str(configs / "metadata.json"),
            logging_file=False,
            workflow_type="train" if phase.startswith("train") else "inference",
            bundle_root=str(root),
            **override,
        )
        try:
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        except Exception as error:
            # MONAI wraps each level of a config in another exception; the one that says something is the innermost,
            # or the one that we raised ourselves. Its own traceback stays; the wrappers would only hide it.
            causes = list(_causes(error))
            raise next((cause for cause in causes if isinstance(cause, FediodError)), causes[-1]) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def quiet_monai() -> Iterator[None]:
    """Silence what MONAI says on every run and nobody can act on; nothing else."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [noisy.level for noisy in loggers]
    for noisy in loggers:
        noisy.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.cuda\.amp\.GradScaler", category=FutureWarning)
        warnings.filterwarnings("ignore", message="parsing config_file ", category=UserWarning)
        # A patient without tumour is cropped anywhere, as it should be.
        warnings.filterwarnings("ignore", message="Num foregrounds 0, ", category=UserWarning)
        try:
            yield
        finally:
            for noisy, level in zip(loggers, levels, strict=True):
                noisy.setLevel(level)
