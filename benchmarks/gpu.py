"""What a GPU brings: steps of training, rounds of the method and segmentation, on both devices in one process.

    python benchmarks/gpu.py [--device cuda] [--quick] [--out gpu.json]

* student step: two volumes, `KL(q || S) + soft Dice`, clipping, AdamW and the average, as `distillation` makes them;
* teacher step: two crops, the loss and optimiser of the teacher's bundle;
* round: one round of `distill` with three hospitals in this process, phantoms drawn and messages packed, two student
  steps; a mean over as many rounds with the generator as without;
* segment: `segment_volume` of a 240 x 240 x 155 case that is in memory, to the native grid; network: its part that runs
  on the device.

48 voxels are a run at 4 mm, 96 one at 2 mm or 1 mm. Precisions: float32 with TensorFloat-32 off; TF32, which cuDNN uses
for convolutions in float32 unless told otherwise; bfloat16 by autocast, the product's own choice where the device has
it. Times are medians after one run apart, with the device idle at both ends; `times faster` is over the CPU (all its
cores) in float32, for whole rounds and cases in its own choice. Peak memory is what torch had allocated on the GPU.
Random weights, phantoms and noise: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fediod_med import sliding
from fediod_med.checkpoints import Provenance
from fediod_med.comparison.local import teacher_loss
from fediod_med.data.sampler import PublicSampler
from fediod_med.data.scans import Volume
from fediod_med.data.transforms import normalise, to_working_grid
from fediod_med.devices import SMALLEST_REDUCED, autocast_dtype, autocast_over, pick_device
from fediod_med.distillation.loop import distill
from fediod_med.distillation.settings import GeneratorObjective, Schedule
from fediod_med.federation.critic import PlainCritic
from fediod_med.federation.embedded import EmbeddedFederation
from fediod_med.federation.node import SiteNode
from fediod_med.inference import probabilities_in_memory, segment_volume
from fediod_med.losses import soft_dice, transfer_divergence
from fediod_med.networks import STUDENT, Generator, build_segmenter
from fediod_med.privacy.gate import Gate
from fediod_med.sliding import Window

FLOAT32, TF32, BFLOAT16 = "float32", "TF32", "bfloat16"
ENOUGH_S = 0.6  # of repetitions of one cell
MOST = 12


@dataclass(frozen=True)
class Row:
    """One cell of the table.

    Attributes:
        work: what was done.
        device: where.
        precision: how.
        seconds: median.
        peak_gib: on the GPU.
    """

    work: str
    device: str
    precision: str
    seconds: float
    peak_gib: float | None


def measured(work: str, device: torch.device, precision: str, run: Callable[[], object]) -> Row:
    """One run apart, then repetitions until there are enough; a first run that is slow counts itself."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with computing_in(precision):
        first = once()
        times: list[float] = [first] if first > ENOUGH_S and device.type == "cpu" else []
        while not times or (sum(times) < ENOUGH_S and len(times) < MOST):
            times.append(once())
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    row = Row(work, device.type, precision, statistics.median(times), peak)
    print(f"  {row.work}, {row.device}, {row.precision}: {row.seconds:.4f} s", flush=True)
    return row


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """cuDNN's convolutions and the windows of segmentation in a precision."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=precision != FLOAT32))
        if precision != BFLOAT16:
            stack.enter_context(mock.patch.object(sliding, "autocast", return_value=contextlib.nullcontext()))
        yield


def precisions(device: torch.device) -> tuple[str, ...]:
    """Those that the device has."""
    reduced = (BFLOAT16,) if autocast_dtype(device) is torch.bfloat16 else ()
    return (FLOAT32, TF32, *reduced) if device.type == "cuda" else (FLOAT32, *reduced)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def student_step(size: int, device: torch.device, precision: str) -> Callable[[], None]:
    """One step of the student on two volumes that lie on the CPU, as the replay buffer's do."""
    student = build_segmenter(**STUDENT).to(device).train()
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    volumes, answers = noise(2, 4, size, size, size), torch.softmax(noise(2, 4, size, size, size), dim=1)

    def step() -> None:
        x, target = volumes.to(device), answers.to(device)
        with autocast_over(device, x.shape[2:], enabled=precision == BFLOAT16):
            logits = student(x)
        logits = logits.float()
        loss = transfer_divergence(target, logits) + soft_dice(torch.softmax(logits, dim=1), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        average.update_parameters(student)

    return step


def teacher_step(size: int, device: torch.device, precision: str) -> Callable[[], None]:
    """One step of a teacher on two crops that lie on the CPU, augmented already."""
    network = build_segmenter(**STUDENT).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    loss_function = teacher_loss()
    images = noise(2, 4, size, size, size)
    labels = torch.randint(0, 4, (2, 1, size, size, size), generator=torch.Generator().manual_seed(1)).float()

    def step() -> None:
        x, truth = images.to(device), labels.to(device)
        with autocast_over(device, x.shape[2:], enabled=precision == BFLOAT16):
            logits = network(x)
        optimizer.zero_grad(set_to_none=True)
        loss_function(logits.float(), truth).backward()
        optimizer.step()

    return step


def round_seconds(sampler: PublicSampler, size: int, device: torch.device, rounds: int) -> list[float]:
    """Wall clock of each round of a distillation from three hospitals, the first round left out."""
    volumes = [image.float() for image, _ in sampler.volumes()]
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        nodes = {
            name: SiteNode(
                name,
                build_segmenter(**STUDENT),
                torch.ones(5, 4),
                critic=PlainCritic(name, volumes, state_dir=Path(folder) / name, seed=1, device=device),
                gate=Gate.unprotected(name),
                device=device,
            )
            for name in ("north", "south", "west")
        }
        distill(
            EmbeddedFederation(nodes),
            student=build_segmenter(**STUDENT),
            generator=Generator("conditional", size=size),
            sampler=sampler,
            objective=GeneratorObjective(),
            schedule=Schedule(rounds=rounds + 1, student_steps=2),
            size=size,
            seed=0,
            run_id="bench",
            device=device,
            on_round=lambda record: stamps.append(time.perf_counter()),
        )
    return [float(seconds) for seconds in np.diff(stamps)]


def head(shape: tuple[int, int, int]) -> Volume:
    """Noise inside an ellipsoid of the size of a brain, zeros outside, at 1 mm."""
    axes = [np.linspace(-1, 1, edge) / share for edge, share in zip(shape, (0.62, 0.75, 0.9), strict=True)]
    inside = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True)) < 1
    array = np.random.default_rng(0).normal(100, 20, (4, *shape)).astype(np.float32) * inside
    return Volume(array.astype(np.float32), np.diag([1.0, 1.0, 1.0, 1.0]), Path("head.nii.gz"))


def segmentation(volume: Volume, spacing: float, roi: int, device: torch.device) -> list[Row]:
    """A whole case in the product's own precision, and its part on the device in each."""
    network = build_segmenter(**STUDENT).to(device).eval()
    provenance = Provenance(
        kind="student",
        network=STUDENT,
        spacing=spacing,
        label_scheme="brats2018",
        sites=(),
        privacy={},
        trained_on="nothing",
        seed=0,
        settings={"roi": roi},
    )
    image = MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine))
    working = normalise(to_working_grid(image, spacing=spacing)[0])
    what = f"{spacing:g} mm, windows of {roi}"

    def whole() -> object:
        return segment_volume(volume, network, provenance, subject_id="head", device=device)

    def on_device() -> object:
        return probabilities_in_memory(network, working, window=Window(roi), device=device)

    return [
        *(measured(f"network, {what}", device, precision, on_device) for precision in precisions(device)),
        measured(f"segment, {what}", device, precisions(device)[-1], whole),
    ]


def table(rows: list[Row]) -> str:
    """Markdown; `times faster` is over the CPU's first row of the same work."""
    reference = {row.work: row.seconds for row in reversed(rows) if row.device == "cpu"}
    lines = ["| work | device | precision | seconds | times faster | peak GiB |", "|---|---|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: row.work):
        base = reference.get(row.work)
        faster = "" if base is None else f"{base / row.seconds:.1f}"
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        lines.append(f"| {row.work} | {row.device} | {row.precision} | {row.seconds:.4f} | {faster} | {peak} |")
    return "\n".join(lines)


def steps(device: torch.device, sizes: tuple[int, ...]) -> Iterator[Row]:
    """Steps of student and teacher; a CPU needs seconds for one at 96, so it makes few."""
    for precision in precisions(device):
        on_cpu = device.type == "cpu"
        for size in (sizes[:2] if precision == FLOAT32 else sizes[:1]) if on_cpu else sizes:
            edges = f"2 x {size}^3"
            yield measured(f"student step, {edges}", device, precision, student_step(size, device, precision))
            if size == sizes[0] or not on_cpu:
                yield measured(f"teacher step, {edges}", device, precision, teacher_step(size, device, precision))


def rounds(device: torch.device, sampler: PublicSampler, size: int) -> Row:
    """Rounds of the whole method in the product's own precision."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = round_seconds(sampler, size, device, 2 if device.type == "cpu" else 6)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    own = precisions(device)[-1] if size >= SMALLEST_REDUCED else FLOAT32
    return Row(f"round, 3 hospitals, 2 x {size}^3", device.type, own, statistics.mean(found), peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cpu, other = torch.device("cpu"), pick_device(arguments.device)
    devices = [cpu] if other.type == "cpu" else [cpu, other]
    sizes = (32, 48) if arguments.quick else (48, 96, 128)
    shape = (60, 60, 40) if arguments.quick else (240, 240, 155)
    grids = ((2.0, 32),) if arguments.quick else ((2.0, 96), (1.0, 96), (1.0, 128))
    began, rows = time.perf_counter(), []
    case = head(shape)
    for device in devices:
        rows += steps(device, sizes)
        for spacing, roi in grids[:1] if device.type == "cpu" else grids:
            rows += segmentation(case, spacing, roi, device)
    for number, (spacing, size) in enumerate(((12.0, 16),) if arguments.quick else ((4.0, 48), (2.0, 96))):
        sampler = PublicSampler(spacing=spacing, roi=size, count=2, seed=0)
        rows += [rounds(device, sampler, size) for device in (devices if number == 0 else devices[1:])]
    card = torch.cuda.get_device_name() if other.type == "cuda" else "no GPU"
    print(f"\n{card}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads\n\n{table(rows)}")
    print(f"\n{time.perf_counter() - began:.0f} s in all. Phantoms and noise only.")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"card": card, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
