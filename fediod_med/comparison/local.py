"""One hospital's local training in federated averaging: the teacher's loss, data and optimiser, cut into rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from torch import nn

from fediod_med.comparison.averaging import proximal_penalty
from fediod_med.data.layouts import Subject
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import augmentation, preprocessing
from fediod_med.devices import autocast_over
from fediod_med.resources import bundle_dir
from fediod_med.sites import Site
from fediod_med.teacher import cosine_rate, labelled, quiet_monai, rehearsal_sampler, training_items


@dataclass(frozen=True)
class HospitalClient:
    """A hospital that trains a global network on its own patients; an `averaging.Client`.

    Attributes:
        site: settings, those of its teacher.
        items: preprocessed patients and phantoms, see `teacher.training_items`.
        patients: its weight in the average.
        seed: of crops, augmentation and order.
        device: where to compute.
    """

    site: Site
    items: Sequence[dict[str, Any]]
    patients: int
    seed: int
    device: torch.device

    @property
    def steps(self) -> int:
        """Local steps of the whole training: those of the hospital's teacher."""
        return self.site.epochs * self.site.steps_per_epoch

    def train(self, network: nn.Module, *, first: int, last: int, rate: float, mu: float) -> None:
        """Steps `first` to `last` of one warmed-up cosine schedule; see `averaging.Client.train`.

        AdamW starts afresh in each round, because no hospital keeps state between rounds.
        """
        network.to(self.device).train()
        anchor = [p.detach().clone() for p in network.parameters()]
        peak = self.site.learning_rate * rate
        optimizer = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=1e-4)
        loss_function = teacher_loss()
        for step, batch in enumerate(self._batches(first, last), start=first):
            for group in optimizer.param_groups:
                group["lr"] = peak * cosine_rate(step, self.steps)
            x = batch["image"].as_tensor().to(self.device)
            with autocast_over(x.device, x.shape[2:]):
                logits = network(x)
            loss = loss_function(logits.float(), batch["label"].to(self.device))
            if mu:
                loss = loss + proximal_penalty(network, anchor, mu)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def _batches(self, first: int, last: int) -> DataLoader:
        """Augmented batches `image` `(B, 4, r, r, r)` and `label` `(B, 1, r, r, r)`; the same for the same steps."""
        seed = (self.seed * 1_000_003 + first) % 2**32
        dataset = Dataset(list(self.items), augmentation(roi=self.site.roi))
        draws = (last - first) * self.site.batch_size
        sampler = rehearsal_sampler(dataset, rehearsal=self.site.rehearsal, draws=draws, seed=seed)
        source = torch.Generator().manual_seed(seed)  # MONAI's loader seeds the augmentation from it
        return DataLoader(dataset, batch_size=self.site.batch_size, sampler=sampler, num_workers=0, generator=source)


def open_client(
    site: Site, subjects: Sequence[Subject], *, public: PublicSampler | None, device: torch.device
) -> HospitalClient:
    """Read and preprocess a hospital's training subjects.

    Args:
        site: settings; its seed is that of the training.
        subjects: to train on.
        public: phantoms for rehearsal.
        device: where to compute.

    Raises:
        InputError: a scan or label map is defective.
    """
    steps = preprocessing(spacing=site.spacing, with_label=True)
    items = training_items(labelled(subjects, site.label_scheme), steps, public if site.rehearsal else None)
    return HospitalClient(site, items, len(subjects), site.seed, device)


def teacher_loss() -> nn.Module:
    """The loss of the teacher's bundle, read from its training configuration."""
    parser = ConfigParser()
    with quiet_monai():
        parser.read_config(str(bundle_dir("teacher") / "configs" / "train.yaml"))
        loss: nn.Module = parser.get_parsed_content("loss")
    return loss
