"""The training of the public prior: the student's network on phantoms only, on no patient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fediod_med.checkpoints import Provenance, current_commit, save_weights
from fediod_med.data.sampler import PublicSampler
from fediod_med.devices import pick_device
from fediod_med.networks import STUDENT, build_segmenter
from fediod_med.prior import train_prior
from fediod_med.progress import Progress, silent
from fediod_med.runs.stages import on_count


def run_prior(
    *,
    out: Path,
    steps: int,
    pool: int,
    seed: int,
    device: str = "auto",
    grids: Sequence[tuple[float, int]] = ((4.0, 48), (2.0, 64)),
    progress: Progress = silent,
) -> Path:
    """Train the public prior on phantoms only and write its weights (fp16) to `out`.

    Args:
        out: `.safetensors` file.
        steps: optimiser steps, shared by the grids in turn.
        pool: phantoms per grid.
        seed: of everything.
        device: see `devices.pick_device`.
        grids: (spacing mm, crop voxels) pairs that one network learns.
        progress: see `Progress`.
    """
    samplers = [
        PublicSampler(
            spacing=spacing,
            roi=roi,
            count=pool,
            seed=seed,
            progress=on_count(progress, f"phantoms at {spacing:g} mm"),
        )
        for spacing, roi in grids
    ]
    torch.manual_seed(seed)
    network = train_prior(
        build_segmenter(**STUDENT),
        samplers,
        steps=steps,
        batch=2,
        learning_rate=2e-3,
        seed=seed,
        device=pick_device(device),
        on_step=lambda step, loss: progress("train the public prior", step, steps, f"loss {loss:.3f}"),
    )
    provenance = Provenance(
        kind="public prior",
        network=STUDENT,
        spacing=grids[-1][0],
        label_scheme="brats2018",
        sites=(),
        privacy={},
        trained_on="no patient (public phantoms only); for trying the tool",
        seed=seed,
        settings={"roi": grids[-1][1], "steps": steps, "pool": pool, "grids": [list(g) for g in grids]},
        commit=current_commit(),
    )
    halved = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_weights(out, halved, provenance)
    return out
