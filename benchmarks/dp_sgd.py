"""What privacy costs in time: one DP-SGD step against one plain step, same process, same rows.

    OMP_NUM_THREADS=1 python benchmarks/dp_sgd.py [--precision bfloat16] [--out dp_sgd.json]

Plain: one forward and backward pass of the whole batch and one Adam step. Private: the same rows, one patient after the
other, clipping, noise, and one Adam step. `projected` is the default of a site: the same on the span of 60 public
gradients, with the cost of a new span spread over the ten steps that use it. `hooks` is Opacus' `GradSampleModule` on
the same batch, where it can run. The smallest time of several interleaved repetitions is reported, because other load
only ever adds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from fediod_med.networks import PatchDiscriminator, build_segmenter
from fediod_med.privacy.discriminator import DiscriminatorPlan, PrivateDiscriminator
from fediod_med.privacy.mechanisms import Mechanism
from fediod_med.privacy.optimizer import PatientOptimizer
from fediod_med.privacy.row_loss import per_row_dice_ce
from fediod_med.privacy.training import PrivateSchedule, PrivateTrainer, autocast

EVERYBODY = Mechanism(noise_multiplier=1.0, sample_rate=1.0, steps=100_000)  # q = 1: each step holds the whole batch
SUBSPACE = 60
TEACHERS = (("unet", 16), ("segresnet", 8), ("dynunet", 16))


def smallest_times(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Smallest wall-clock time of each step, seconds; the steps take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def hooked_step(network: nn.Module, loss: Callable[[nn.Module], Tensor], patients: int) -> Callable[[], None] | None:
    """One step with Opacus' per-sample gradients of the same batch, or `None` where its hooks cannot run."""
    hooked = GradSampleModule(network, loss_reduction="sum")
    optimizer = PatientOptimizer(
        torch.optim.Adam(network.parameters()), noise_multiplier=1.0, clip_norm=1.0, expected_patients=patients
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(hooked).backward()
        # The rows of one patient are summed before clipping.
        for p in optimizer.params:
            p.grad_sample = p.grad_sample.reshape(patients, -1, *p.shape).mean(1)
        optimizer.pre_step()
        optimizer.descend()

    try:
        step()
    except RuntimeError:
        return None
    return step


def teacher(backbone: str, width: int, *, patients: int, crops: int, roi: int, precision: str, repeats: int) -> dict:
    """Times of a segmenter's step."""
    image = torch.randn(patients, crops, 4, roi, roi, roi)
    label = torch.randint(0, 4, (patients, crops, roi, roi, roi))

    def loss(network: nn.Module) -> Tensor:
        with autocast(precision, torch.device("cpu")):
            logits = network(image.flatten(0, 1))
        return per_row_dice_ce(logits, label.flatten(0, 1)).sum()

    plain_network = build_segmenter(backbone, width=width)
    plain_optimizer = torch.optim.Adam(plain_network.parameters())

    def plain() -> None:
        plain_optimizer.zero_grad(set_to_none=True)
        loss(plain_network).backward()
        plain_optimizer.step()

    trainer = PrivateTrainer(
        build_segmenter(backbone, width=width),
        PrivateSchedule(EVERYBODY, precision=precision),
        patients=patients,
        per_row_loss=per_row_dice_ce,
    )
    steps = {"plain": plain, "private": lambda: trainer.step(lambda i: (image[i], label[i]))}
    hooked = hooked_step(build_segmenter(backbone, width=width), loss, patients) if precision == "float32" else None
    if hooked is not None:
        steps["hooks"] = hooked
    shape = {"network": f"{backbone} {width}", "patients": patients, "crops": crops, "roi": roi}
    if backbone != "unet":
        return shape | report(steps, repeats)

    def projected(refresh: int) -> Callable[[], None]:
        private = PrivateTrainer(
            build_segmenter(backbone, width=width),
            PrivateSchedule(EVERYBODY, subspace=SUBSPACE, refresh=refresh, precision=precision),
            patients=patients,
            per_row_loss=per_row_dice_ce,
        )
        rows, truth = torch.randn(SUBSPACE, 4, roi, roi, roi), torch.randint(0, 4, (SUBSPACE, roi, roi, roi))
        return lambda: private.step(lambda i: (image[i], label[i]), lambda _, count: (rows[:count], truth[:count]))

    steps |= {"kept_span": projected(10**9), "new_span": projected(1)}
    found = report(steps, repeats)
    spread = found["kept_span_s"] + (found["new_span_s"] - found["kept_span_s"]) / PrivateSchedule(EVERYBODY).refresh
    return shape | found | {"projected_ratio": round(spread / found["plain_s"], 2)}


def discriminator(*, patients: int, crops: int, roi: int, precision: str, repeats: int) -> dict:
    """Times of a discriminator's update: as many synthetic as real rows."""
    real, fake = torch.randn(patients, crops, 4, roi, roi, roi), torch.randn(patients * crops, 4, roi, roi, roi)
    plain_network = PatchDiscriminator(width=16, layers=2)
    plain_optimizer = torch.optim.Adam(plain_network.parameters())

    def plain() -> None:
        plain_optimizer.zero_grad(set_to_none=True)
        with autocast(precision, torch.device("cpu")):
            halves = plain_network(fake), plain_network(real.flatten(0, 1))
        (softplus(halves[0].float()).mean() + softplus(-halves[1].float()).mean()).backward()
        plain_optimizer.step()

    private = PrivateDiscriminator(
        PatchDiscriminator(width=16, layers=2),
        DiscriminatorPlan(EVERYBODY, precision=precision),
        patients=patients,
        real_loss=lambda logits: softplus(-logits).flatten(1).mean(1),
        fake_loss=lambda logits: softplus(logits).mean(),
    )
    steps = {"plain": plain, "private": lambda: private.update(fake, lambda i: real[i])}
    shape = {"network": "discriminator 16", "patients": patients, "crops": crops, "roi": roi}
    return shape | report(steps, repeats)


def report(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Times and their ratios to the plain step."""
    times = smallest_times(steps, repeats)
    ratios = {f"{name}_ratio": round(t / times["plain"], 2) for name, t in times.items() if name != "plain"}
    return {f"{name}_s": round(t, 4) for name, t in times.items()} | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--crops", type=int, default=2, help="per patient; one alone meets a slower float32 kernel")
    parser.add_argument("--roi", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    shape = {name: getattr(arguments, name) for name in ("patients", "crops", "roi", "precision", "repeats")}
    found = []
    for measure in (*(lambda b=b, w=w: teacher(b, w, **shape) for b, w in TEACHERS), lambda: discriminator(**shape)):
        found.append(measure())
        print(" ".join(f"{name}={value}" for name, value in found[-1].items()), flush=True)
    if arguments.out is not None:
        machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": arguments.threads}
        settings = {"precision": arguments.precision, **machine}
        arguments.out.write_text(json.dumps({"settings": settings, "steps": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
