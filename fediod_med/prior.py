"""Supervised training on public phantoms alone: the public prior that ships and warm-starts every network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import flip_together, jitter
from fediod_med.devices import autocast_over
from fediod_med.losses import soft_dice, transfer_divergence
from fediod_med.networks import one_hot


def train_prior(
    network: nn.Module,
    samplers: list[PublicSampler],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    ema: float = 0.995,
    on_step: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train on phantoms with soft Dice plus cross-entropy; returns the averaged network.

    Args:
        network: segmenter, logits over 4 classes.
        samplers: one per working grid; step i uses sampler `i mod len`, so one network learns several spacings.
        steps: optimiser steps, AdamW with a cosine rate.
        batch: volumes a step.
        learning_rate: peak.
        seed: of augmentation; the samplers carry their own.
        device: where to compute.
        ema: decay of the average.
        on_step: receives (step, loss).
    """
    network = network.to(device).train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    warm_up = max(1, min(100, steps // 20))
    for step in range(1, steps + 1):
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        public = samplers[step % len(samplers)].draw(step, batch)
        truth = one_hot(public.classes.to(device), 4)
        x, truth = flip_together([jitter(public.base.to(device), random), truth], random)
        rate = learning_rate * min(1.0, step / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast_over(x.device, x.shape[2:]):
            logits = network(x)
        logits = logits.float()
        loss = transfer_divergence(truth, logits) + soft_dice(torch.softmax(logits, dim=1), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        average.update_parameters(network)
        if on_step is not None:
            on_step(step, float(loss.detach()))
    averaged: nn.Module = average.module
    return averaged.eval()
