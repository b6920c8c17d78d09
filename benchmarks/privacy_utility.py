"""What privacy costs in Dice: one phantom hospital's teacher by budget, number of patients and warm start.

    OMP_NUM_THREADS=1 python benchmarks/privacy_utility.py --out runs/privacy_utility.json [--patients 20 50 200]

Every row trains the same network for the same number of Poisson draws of the same patients; `inf` trains without
clipping and noise. Half of each step's gradient comes from two public phantoms, private gradients are projected on the
span of 60 public ones, and the teacher has .8 of a row's
budget (of the summed squared mu), both as by a site's default; delta is 1e-5. Scores are mean Dice (TC, WT, ET) on 24
other phantoms of the hospital: phantom scores, no patient.
Rows that the file holds already are kept, so an interrupted call continues.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fediod_med.checkpoints import load_into, load_weights
from fediod_med.data.phantoms import hospital_profiles
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.transforms import flip_together, jitter
from fediod_med.metrics import region_scores
from fediod_med.networks import STUDENT, build_segmenter
from fediod_med.privacy.calibration import Part, plan_noise
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.noise import poisson_draw
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.subspace import public_share
from fediod_med.privacy.trainable import select_trainable
from fediod_med.privacy.training import PrivateSchedule, autocast, rate, train_private
from fediod_med.resources import public_prior

Patient = tuple[Tensor, Tensor]
SPACING, ROI, HELD_OUT, PUBLIC = 4.0, 48, 24, 240
DELTA, TEACHER_SHARE = 1e-5, 0.8
STEPS, REHEARSAL = 60, 0.5
RESULTS = ("noise_multiplier", "dice", "seconds")
EXPECTED = {20: 5, 50: 8, 200: 20}  # patients a step; q is this over n


def crops(patient: Patient, count: int) -> tuple[Tensor, Tensor]:
    """`count` views of one whole phantom, flipped and with changed contrast."""
    image, classes = patient
    images, labels = image.float()[None].repeat(count, 1, 1, 1, 1), classes.long()[None].repeat(count, 1, 1, 1)
    random = torch.Generator().manual_seed(int(np.random.randint(2**31)))
    x, y = flip_together([jitter(images, random), labels[:, None]], random)
    return x, y[:, 0]


def fresh(warm: bool, seed: int) -> nn.Module:
    """The student's network, from the public prior or from nothing."""
    torch.manual_seed(seed)
    network = build_segmenter(**STUDENT)
    if warm:
        path = public_prior()
        load_into(network, load_weights(path)[0], path)
    return network


def phantoms(public: PublicSampler, number: int, count: int = 2) -> Patient:
    """The public batch of a step, or of a basis."""
    drawn = public.draw(number, count)
    return drawn.base, drawn.classes


def train_plain(
    network: nn.Module, patients: list[Patient], public: PublicSampler, *, q: float, learning_rate: float
) -> nn.Module:
    """The same draws, steps, loss, rehearsal and average without clipping and noise."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - min(0.5, 4 / STEPS))
    )
    for step in range(STEPS):
        drawn = [crops(patients[int(i)], 1) for i in poisson_draw(len(patients), q)]
        weighted = [(batch, (1 - REHEARSAL) / len(drawn)) for batch in drawn]
        weighted.append((phantoms(public, step + 1), REHEARSAL / 2))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(step, STEPS)
        optimizer.zero_grad(set_to_none=True)
        for (image, label), weight in weighted:
            with autocast("bfloat16", torch.device("cpu")):
                logits = network(image)
            (per_row_dice_ce(logits.float(), label).sum() * weight).backward()
        optimizer.step()
        average.update_parameters(network)
    averaged: nn.Module = average.module
    return averaged.eval()


@torch.no_grad()
def score(network: nn.Module, held_out: list[Patient]) -> float:
    """Mean Dice over phantoms and regions, on the working grid."""
    network.eval()
    values = []
    for image, classes in held_out:
        guess = network(image[None].float()).argmax(1)[0].numpy()
        values.append(np.mean([s["dice"] for s in region_scores(guess, classes.numpy(), [SPACING] * 3).values()]))
    return float(np.mean(values))


def mechanism(epsilon: float, n: int) -> Mechanism:
    """Noise of the teacher's share of a site's budget."""
    q = EXPECTED.get(n, n / 2) / n
    plan = plan_noise(
        {"teacher": Part(q, STEPS, TEACHER_SHARE), "rest": Part(1.0, 1, 1 - TEACHER_SHARE)},
        epsilon=epsilon,
        delta=DELTA,
    )
    return plan["teacher"]


def one(
    epsilon: float,
    patients: list[Patient],
    public: PublicSampler,
    *,
    warm: bool,
    which: str,
    optimizer: str,
    subspace: int,
    learning_rate: float,
    clip: float,
    seed: int,
) -> nn.Module:
    """Train one row."""
    np.random.seed(seed)
    network = fresh(warm, seed)
    n = len(patients)
    if math.isinf(epsilon):
        return train_plain(network, patients, public, q=EXPECTED.get(n, n / 2) / n, learning_rate=1e-3)
    select_trainable(network, which)
    planned = mechanism(epsilon, n)
    schedule = PrivateSchedule(
        planned,
        clip_norm=clip,
        learning_rate=learning_rate,
        optimizer=optimizer,
        public_weight=public_share(
            REHEARSAL,
            noise_multiplier=planned.noise_multiplier,
            expected_patients=planned.sample_rate * n,
            dimensions=subspace,
        ),
        subspace=subspace,
        precision="bfloat16",
    )
    return train_private(
        network,
        patients,
        schedule=schedule,
        draw=lambda p: crops(p, 1),
        per_row_loss=per_row_dice_ce,
        public=lambda number, count: phantoms(public, number, count),
    )


def main() -> None:
    """Train and score every row; write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[math.inf, 10, 8, 3, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--trainable", default="all")
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--subspace", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--profile", default="inverted-contrast")
    given = parser.parse_args()
    profile = next(p for p in hospital_profiles() if p.name == given.profile)
    rows = json.loads(given.out.read_text()) if given.out.is_file() else []
    fixed = {
        "trainable": given.trainable,
        "optimizer": given.optimizer,
        "subspace": given.subspace,
        "rate": given.learning_rate,
        "clip": given.clip,
    }
    done = [{key: value for key, value in row.items() if key not in RESULTS} for row in rows]
    for seed in given.seeds:
        public = PublicSampler(spacing=SPACING, roi=ROI, count=PUBLIC, seed=900 + seed)
        pool = PublicSampler(
            spacing=SPACING, roi=ROI, count=HELD_OUT + max(given.patients), seed=500 + seed, profile=profile
        )
        volumes = list(pool.volumes())
        held_out, cohort = volumes[:HELD_OUT], volumes[HELD_OUT:]
        for n in given.patients:
            for epsilon in given.epsilons:
                for start in given.starts:
                    key = {"patients": n, "epsilon": str(epsilon), "start": start, "seed": seed, **fixed}
                    if key in done:
                        continue
                    began = time.perf_counter()
                    network = one(
                        epsilon,
                        cohort[:n],
                        public,
                        warm=start == "warm",
                        which=given.trainable,
                        optimizer=given.optimizer,
                        subspace=given.subspace,
                        learning_rate=given.learning_rate,
                        clip=given.clip,
                        seed=seed,
                    )
                    row = {
                        **key,
                        "noise_multiplier": None if math.isinf(epsilon) else mechanism(epsilon, n).noise_multiplier,
                        "dice": score(network, held_out),
                        "seconds": round(time.perf_counter() - began, 1),
                    }
                    rows.append(row)
                    given.out.parent.mkdir(parents=True, exist_ok=True)
                    given.out.write_text(json.dumps(rows, indent=1))
                    print(row, flush=True)
        print("seed", seed, "start scores", score(fresh(True, seed), held_out), flush=True)


if __name__ == "__main__":
    main()
