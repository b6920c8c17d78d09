"""Time, memory and agreement of segmenting full-resolution scans, against plainer recipes in one process.

    python benchmarks/inference.py CASE_FOLDER [CASE_FOLDER ...] [--model RUN] [--threads 2] [--repeat 3]

Three recipes on the same scans:

* ours: what `fediod segment` does, from paths to a label map that was read back; with the given model on its own
  working grid, and with a network of the same size (random weights, for time only) on a 1 mm grid, windows of 96;
* plain: the same models in float32, overlap .5, MONAI's own loop, without cropping to the brain;
* zoo: the recipe of MONAI's model zoo for BraTS (SegResNet of 16 filters, float32, windows of 240x240x160, overlap .5,
  z-score per sequence; random weights, for time only), reading and network passes only.

Times are medians over repetitions, the first run apart (files are in the cache then): wall clock, and seconds of
processor time of all threads, which another load on the machine disturbs less. Peak memory is the process's after each
recipe. Agreement is the mean Dice (TC, WT, ET) against the expert's map: ours, float32 with overlap .5 on
the same brain crop, and the same without the crop. The crop is no approximation: networks are trained on it, and their
instance norm sees the share of empty voxels in a window.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet
from torch import nn

from fediod_med.checkpoints import Provenance, load_segmenter
from fediod_med.data.layouts import Subject, find_subject
from fediod_med.data.nifti.reading import read_label, read_subject
from fediod_med.data.nifti.writing import write_segmentation
from fediod_med.data.transforms import normalise, to_working_grid
from fediod_med.export import find_weights
from fediod_med.inference import (
    DEFAULT_OVERLAP,
    default_roi,
    native_classes,
    probabilities_in_memory,
    segment_subject,
    write_case,
)
from fediod_med.labels import get_scheme
from fediod_med.metrics import region_scores
from fediod_med.networks import build_segmenter
from fediod_med.sliding import Window

CPU = torch.device("cpu")


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Wall clock and processor time of all threads."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} (processor {self.cpu:.2f})"

    def over(self, other: Seconds) -> str:
        """How many times `other` this is, by both clocks."""
        return f"{self.wall / other.wall:.1f} (processor {self.cpu / other.cpu:.1f})"


def median(run: Callable[[], object], repeat: int) -> Seconds:
    """Median of `repeat` runs after one that is not counted."""
    run()
    wall, cpu = [], []
    for _ in range(repeat):
        began = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return Seconds(statistics.median(wall), statistics.median(cpu))


def stages(subject: Subject, network: nn.Module, provenance: Provenance, out: Path, repeat: int) -> dict[str, Seconds]:
    """The parts of `ours` in their order, each repeated on its own."""
    window = Window(default_roi(provenance), DEFAULT_OVERLAP)
    volume = read_subject(subject)
    shape = volume.array.shape[1:]
    image = MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine))
    working = normalise(to_working_grid(image, spacing=provenance.spacing)[0])
    probs = probabilities_in_memory(network, working, window=window, device=CPU)[0]
    classes = native_classes(probs, affine=volume.affine, shape=shape)
    scheme = get_scheme(provenance.label_scheme)
    parts: dict[str, Callable[[], object]] = {
        "read": lambda: read_subject(subject),
        "working grid": lambda: normalise(to_working_grid(image, spacing=provenance.spacing)[0]),
        "network": lambda: probabilities_in_memory(network, working, window=window, device=CPU),
        "native grid": lambda: native_classes(probs, affine=volume.affine, shape=shape),
        "write and verify": lambda: write_segmentation(
            out / "stage.nii.gz", classes, reference=volume.path, scheme=scheme
        ),
    }
    return {name: median(run, repeat) for name, run in parts.items()}


def ours(subject: Subject, network: nn.Module, provenance: Provenance, out: Path) -> np.ndarray:
    """From paths to a verified file."""
    found = segment_subject(subject, network, provenance, device=CPU)
    write_case(found, out, scheme=get_scheme(provenance.label_scheme), provenance=provenance)
    return found.classes


def plain(subject: Subject, network: nn.Module, provenance: Provenance, *, crop: bool = False) -> np.ndarray:
    """Float32, overlap .5, MONAI's loop; from paths to the label map in memory."""
    volume = read_subject(subject)
    image = MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine))
    working = normalise(to_working_grid(image, spacing=provenance.spacing, crop=crop)[0])
    windows = SlidingWindowInferer((default_roi(provenance),) * 3, sw_batch_size=1, overlap=0.5, mode="gaussian")
    with torch.inference_mode():
        logits = windows(working.as_tensor()[None], network.eval())[0]
    probabilities = MetaTensor(torch.softmax(logits, dim=0), affine=working.affine)
    return native_classes(probabilities, affine=volume.affine, shape=volume.array.shape[1:])


def zoo(subject: Subject, network: nn.Module) -> None:
    """Network passes of the zoo's recipe on one scan."""
    volume = read_subject(subject)
    image = normalise(MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine)))
    windows = SlidingWindowInferer((240, 240, 160), sw_batch_size=1, overlap=0.5)
    with torch.inference_mode():
        windows(image.as_tensor()[None], network)


def mean_dice(one: np.ndarray, other: np.ndarray, spacing: float = 1.0) -> float:
    """Mean over TC, WT and ET."""
    return float(np.mean([score["dice"] for score in region_scores(one, other, [spacing] * 3).values()]))


def main() -> None:
    """Run the recipes in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="+")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scheme", default="brats2018", help="label scheme of the experts' maps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-zoo", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network, provenance = load_segmenter(find_weights(given.model), CPU)
    fine = dataclasses.replace(provenance, spacing=1.0, settings={"roi": 96})
    torch.manual_seed(0)
    random = build_segmenter(**provenance.network).eval()
    subjects = [find_subject(folder) for folder in given.cases]
    first = subjects[0]
    print(f"{torch.get_num_threads()} threads, {len(subjects)} scans; times in seconds, medians of {given.repeat}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        coarse_s = median(lambda: ours(first, network, provenance, out), given.repeat)
        print(f"ours, {provenance.spacing:g} mm: {coarse_s}, peak {peak_gib():.2f} GiB")
        fine_s = median(lambda: ours(first, random, fine, out), given.repeat)
        print(f"ours, 1 mm, windows of 96 (random weights): {fine_s}, peak {peak_gib():.2f} GiB")
        for name, model, record in (("coarse", network, provenance), ("fine", random, fine)):
            parts = stages(first, model, record, out, given.repeat)
            print(f"  {name}, part by part: " + "; ".join(f"{part} {seconds}" for part, seconds in parts.items()))
        scores: dict[str, list[float]] = {}
        for number, subject in enumerate(subjects):
            if subject.label is None:
                continue
            expert = read_label(subject, get_scheme(given.scheme))
            maps = {
                "ours": ours(subject, network, provenance, out),
                "float32, overlap .5": plain(subject, network, provenance, crop=True),
                "the same, not cropped": plain(subject, network, provenance),
            }
            for name, found in maps.items():
                scores.setdefault(name, []).append(mean_dice(found, expert))
            print(f"scan {number}: " + ", ".join(f"{name} {row[-1]:.4f}" for name, row in scores.items()))
        if scores:
            print("mean: " + ", ".join(f"{name} {statistics.mean(row):.4f}" for name, row in scores.items()))
    plain_s = median(lambda: plain(first, network, provenance), given.repeat)
    print(
        f"plain, {provenance.spacing:g} mm: {plain_s}, times ours {plain_s.over(coarse_s)}, peak {peak_gib():.2f} GiB"
    )
    plain_fine_s = median(lambda: plain(first, random, fine), 1)
    print(f"plain, 1 mm: {plain_fine_s}, times ours {plain_fine_s.over(fine_s)}, peak {peak_gib():.2f} GiB")
    if not given.no_zoo:
        segresnet = SegResNet(
            init_filters=16, in_channels=4, out_channels=3, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1)
        ).eval()
        zoo_s = median(lambda: zoo(first, segresnet), 1)
        print(f"zoo: {zoo_s}, times ours at 1 mm {zoo_s.over(fine_s)}, peak {peak_gib():.2f} GiB")


if __name__ == "__main__":
    main()
