"""Turns a scan into a label map: sliding window, softmax, and the way back to the native grid."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Transform
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes
from scipy import ndimage
from torch import Tensor, nn

from fediod_med.checkpoints import Provenance
from fediod_med.data.layouts import Subject, find_cases
from fediod_med.data.nifti.reading import read_subject
from fediod_med.data.nifti.writing import write_segmentation
from fediod_med.data.scans import Volume
from fediod_med.data.transforms import normalise, to_native, to_working_grid
from fediod_med.devices import autocast_over
from fediod_med.durable import write_atomically
from fediod_med.labels import CLASSES, LabelScheme, get_scheme, region_masks
from fediod_med.metrics import bounding_box
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.sliding import SlidingInferer, Window, sliding_logits, with_less_memory

DEFAULT_ROI = 64
DEFAULT_OVERLAP = 0.25

logger = logging.getLogger(__name__)


class AutocastInferer(Inferer):
    """Another inferer, run under autocast, with float32 results.

    MONAI's engines know only `amp` on CUDA; wrapping the inferer gives bfloat16 on CPU as well.
    """

    def __init__(self, inferer: Inferer, *, enabled: bool = True) -> None:
        """Wrap `inferer`; with `enabled=False` it runs in float32."""
        self.inferer = inferer
        self.enabled = enabled

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor] | nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run the wrapped inferer on `inputs` `(B, C, D, H, W)` and return its float32 output."""
        with autocast_over(inputs.device, inputs.shape[2:], enabled=self.enabled):
            output: Tensor = self.inferer(inputs, network, *args, **kwargs)
        return output.float()


@dataclass(frozen=True)
class Segmentation:
    """A segmented scan on its own grid.

    Attributes:
        subject_id: as found on disk.
        classes: `(X, Y, Z)` uint8, 0 background, 1 NCR, 2 ED, 3 ET; axes are those of the NIfTI file.
        volumes_ml: millilitres of NCR, ED, ET, TC and WT, counted on `classes`.
        affine: voxel to world matrix `(4, 4)`, mm.
        reference: file whose geometry the label map takes over.
        seconds: wall time of reading, inference and resampling.
        image: `(4, X, Y, Z)` float32, the scan as read, for previews.
        probabilities: `(4, X, Y, Z)` float32 class probabilities, when asked for.
        working: `(4, x, y, z)` float32 class probabilities on the working grid, with its affine.
        notes: what happened on the way, such as smaller windows after a lack of memory.
    """

    subject_id: str
    classes: np.ndarray
    volumes_ml: Mapping[str, float]
    affine: np.ndarray
    reference: Path
    seconds: float
    image: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    working: MetaTensor | None = None
    notes: tuple[str, ...] = ()


def sliding_window(roi: int = DEFAULT_ROI, overlap: float = DEFAULT_OVERLAP) -> SlidingInferer:
    """Cubes of edge `roi` (voxels) with Gaussian blending, under autocast, for bundles; see `sliding.sliding_logits`.

    Raises:
        SettingsError: `roi` below 8, or `overlap` outside [0, 1).
    """
    return SlidingInferer(Window(roi, overlap))


def default_roi(provenance: Provenance) -> int:
    """Window edge in voxels: the patch size of training, else 64; rounded up to what the network can halve."""
    step = 1 << (int(provenance.network.get("depth", 4)) - 1)
    return -(-int(provenance.settings.get("roi", DEFAULT_ROI)) // step) * step


def predict_probabilities(
    network: nn.Module,
    image: MetaTensor,
    *,
    roi: int = DEFAULT_ROI,
    overlap: float = DEFAULT_OVERLAP,
    device: torch.device,
) -> MetaTensor:
    """Class probabilities of one preprocessed scan; `probabilities_in_memory` without the record of retreats."""
    return probabilities_in_memory(network, image, window=Window(roi, overlap), device=device)[0]


def probabilities_in_memory(
    network: nn.Module, image: MetaTensor, *, window: Window, device: torch.device
) -> tuple[MetaTensor, tuple[str, ...]]:
    """Class probabilities of one preprocessed scan, with smaller windows or on the CPU where memory runs out.

    Args:
        network: `(B, 4, d, h, w)` to logits `(B, 4, d, h, w)`; in evaluation mode, on `device`.
        image: `(4, x, y, z)` on the working grid, z-scored.
        window: how to cut.
        device: where the network runs.

    Returns:
        `(4, x, y, z)` float32 softmax over background, NCR, ED, ET, on the CPU, with the affine of `image`; and one
        sentence per retreat.
    """

    def run(smaller: Window, where: torch.device) -> Tensor:
        runner = network if where == device else copy.deepcopy(network).to(where)
        with torch.inference_mode():
            return torch.softmax(sliding_logits(image, runner, smaller, device=where), dim=0).cpu()

    probabilities, notes = with_less_memory(run, window, device)
    return MetaTensor(probabilities, affine=image.affine), notes


def native_classes(probs: MetaTensor, *, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Label map on the native grid: probabilities resampled linearly, then the most probable class.

    Only the part of the native grid that tumour can reach is resampled, with the same result: a voxel leaves the
    background only if its background probability is at most 1/2, and a linear interpolation cannot fall to 1/2 unless
    one of its eight neighbours does. Where the two grids differ by turns of the axes and whole voxels alone (a 1 mm
    scan on a 1 mm working grid), nothing is interpolated at all.

    Args:
        probs: `(4, x, y, z)` on the working grid, with its affine.
        affine: native voxel to world matrix, mm.
        shape: native `(X, Y, Z)`.

    Returns:
        `(X, Y, Z)` uint8 classes.
    """
    classes = np.zeros(tuple(shape), dtype=np.uint8)
    turned = _turned_only(np.asarray(probs.affine, dtype=np.float64), np.asarray(affine, dtype=np.float64))
    if turned is not None:
        _place(_most_probable(probs.as_tensor()), *turned, into=classes)
        return classes
    near = bounding_box(probs[0].numpy() <= 0.5 + 1e-4, margin=1)
    if near is None:
        return classes
    # Border voxels of the working grid reach half a voxel outwards: one more voxel on each side covers it.
    corners = np.array([(*c, 1.0) for c in product(*((s.start - 1, s.stop) for s in near))])
    working_affine = np.asarray(probs.affine, dtype=np.float64)
    native = (np.linalg.inv(np.asarray(affine, dtype=np.float64)) @ working_affine @ corners.T)[:3]
    start = np.clip(np.floor(native.min(axis=1)).astype(int), 0, shape)
    stop = np.clip(np.ceil(native.max(axis=1)).astype(int) + 1, 0, shape)
    if (stop <= start).any():
        return classes
    box_affine = np.array(affine, dtype=np.float64)
    box_affine[:3, 3] = (box_affine @ (*start, 1.0))[:3]
    box = to_native(probs, affine=box_affine, shape=tuple(int(n) for n in stop - start))
    classes[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = _most_probable(box)
    return classes


def volumes_ml(classes: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    """Millilitres per class (NCR, ED, ET) and region (TC, WT; ET is both) of a class map.

    Args:
        classes: `(X, Y, Z)` with values 0 to 3.
        affine: voxel to world matrix, mm; a voxel measures `|det|` cubic millimetres.
    """
    voxel_ml = abs(float(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3]))) / 1000.0
    counts = {name: int(np.count_nonzero(classes == index)) for index, name in enumerate(CLASSES) if index}
    counts |= {region: int(np.count_nonzero(mask)) for region, mask in region_masks(classes).items()}
    return {name: count * voxel_ml for name, count in counts.items()}


def segment_subject(
    subject: Subject,
    network: nn.Module,
    provenance: Provenance,
    *,
    device: torch.device,
    roi: int | None = None,
    overlap: float = DEFAULT_OVERLAP,
    keep_probabilities: bool = False,
) -> Segmentation:
    """Read and segment one scan; nothing is written. Arguments as for `segment_volume`.

    Raises:
        InputError: a file cannot be read, or (`GeometryError`) the sequences do not share one grid.
    """
    began = time.perf_counter()
    volume = read_subject(subject)
    reading = time.perf_counter() - began
    found = segment_volume(
        volume,
        network,
        provenance,
        subject_id=subject.subject_id,
        device=device,
        roi=roi,
        overlap=overlap,
        keep_probabilities=keep_probabilities,
    )
    return replace(found, seconds=reading + found.seconds)


def segment_volume(
    volume: Volume,
    network: nn.Module,
    provenance: Provenance,
    *,
    subject_id: str,
    device: torch.device,
    roi: int | None = None,
    overlap: float = DEFAULT_OVERLAP,
    batch: int = 1,
    fast: bool = False,
    keep_probabilities: bool = False,
) -> Segmentation:
    """Segment a scan that is in memory already.

    Args:
        volume: the four sequences on one grid; zero outside the brain.
        network: logits of four classes; moved to `device` and set to evaluation mode.
        provenance: of the network's weights; gives the working grid and the window.
        subject_id: of the result.
        device: where the network runs.
        roi: window edge in voxels; `default_roi(provenance)` when omitted.
        overlap: share of a window covered by its neighbour.
        batch: windows in one pass.
        fast: on a coarser working grid, `coarser_grid(provenance)`.
        keep_probabilities: also return the class probabilities on the native grid.

    Raises:
        InputError: zeros only.
        SettingsError: `roi`, `overlap` or `batch` out of range.
    """
    began = time.perf_counter()
    shape = volume.array.shape[1:]
    spacing, edge = coarser_grid(provenance) if fast else (provenance.spacing, default_roi(provenance))
    window = Window(edge if roi is None else roi, overlap, batch)
    image = MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine))
    working = normalise(to_working_grid(image, spacing=spacing)[0])
    probs, notes = probabilities_in_memory(network.to(device).eval(), working, window=window, device=device)
    if fast:
        notes = (f"fast: working grid of {spacing:g} mm instead of {provenance.spacing:g} mm", *notes)
    classes = native_classes(probs, affine=volume.affine, shape=shape)
    kept = to_native(probs, affine=volume.affine, shape=shape).numpy() if keep_probabilities else None
    seconds = time.perf_counter() - began
    logger.info("%s: segmented in %.1f s on %s", subject_id, seconds, device)
    return Segmentation(
        subject_id=subject_id,
        classes=classes,
        volumes_ml=volumes_ml(classes, volume.affine),
        affine=volume.affine,
        reference=volume.path,
        seconds=seconds,
        image=volume.array,
        probabilities=kept,
        working=probs,
        notes=notes,
    )


def coarser_grid(provenance: Provenance) -> tuple[float, int]:
    """Spacing (mm) and window edge of `--fast`: the next coarser grid the model was trained on, else 1.5 x its own."""
    grids = [(float(spacing), int(roi)) for spacing, roi in provenance.settings.get("grids", ())]
    coarser = sorted(grid for grid in grids if grid[0] > provenance.spacing)
    return coarser[0] if coarser else (1.5 * provenance.spacing, default_roi(provenance))


def write_case(
    segmentation: Segmentation, out_dir: Path, *, scheme: LabelScheme, provenance: Provenance, statistics: bool = True
) -> dict[str, Path]:
    """Write `<id>_seg.nii.gz` (geometry of the scan, re-read and compared) and `<id>_stats.json`.

    Returns:
        Paths by kind: `segmentation` and, unless switched off, `statistics`.

    Raises:
        InputError: the written file reads back differently.
    """
    paths = {"segmentation": out_dir / f"{segmentation.subject_id}_seg.nii.gz"}
    write_segmentation(paths["segmentation"], segmentation.classes, reference=segmentation.reference, scheme=scheme)
    if statistics:
        paths["statistics"] = out_dir / f"{segmentation.subject_id}_stats.json"
        text = json.dumps(case_statistics(segmentation, scheme, provenance), indent=2) + "\n"
        write_atomically(paths["statistics"], lambda temporary: temporary.write_text(text))
    return paths


def case_statistics(segmentation: Segmentation, scheme: LabelScheme, provenance: Provenance) -> dict[str, Any]:
    """Numbers of one segmented scan, ready for JSON: volumes, lesions, geometry, and which model said so."""
    whole = region_masks(segmentation.classes)["WT"]
    box = bounding_box(whole)
    lesions = 0 if box is None else int(ndimage.label(whole[box], structure=np.ones((3, 3, 3)))[1])
    affine = segmentation.affine
    return {
        "notice": NOT_FOR_CLINICAL_USE,
        "subject": segmentation.subject_id,
        "volumes_ml": {name: round(ml, 3) for name, ml in segmentation.volumes_ml.items()},
        "lesions": lesions,
        "labels": {name: scheme.to_value[index] for index, name in enumerate(CLASSES)},
        "label_scheme": scheme.name,
        "grid": {
            "shape": list(segmentation.classes.shape),
            "spacing_mm": [round(float(s), 6) for s in voxel_sizes(affine)],
            "orientation": "".join(aff2axcodes(affine)),
        },
        "model": {
            "kind": provenance.kind,
            "trained_on": provenance.trained_on,
            "sites": list(provenance.sites),
            "privacy": {site: dict(terms) for site, terms in provenance.privacy.items()},
            "privacy_banner": privacy_banner(provenance),
            "working_spacing_mm": provenance.spacing,
            "version": provenance.version,
            "commit": provenance.commit,
        },
        "seconds": round(segmentation.seconds, 3),
    }


def privacy_terms(terms: Mapping[str, Any] | None) -> str:
    """One hospital's privacy in plain words, from `{"mode", "epsilon", "delta"}`; what is unknown counts as none."""
    mode = (terms or {}).get("mode", "unknown")
    if terms is None or mode not in ("dp-sgd", "gradient") or terms.get("epsilon") is None:
        return f"NOT PRIVATE (mode {mode}): nothing bounds what the answers reveal about a patient"
    return f"{mode}, epsilon {terms['epsilon']:.3g} at delta {terms.get('delta', float('nan')):.1e}, per patient"


def privacy_banner(provenance: Provenance) -> str:
    """One line for every output of a model: `NOT PRIVATE` as soon as one hospital is not, else the largest epsilon."""
    if not provenance.sites:
        return f"No hospital's patients: trained on {provenance.trained_on}"
    terms = {site: provenance.privacy.get(site) for site in provenance.sites}
    bare = [site for site, known in terms.items() if privacy_terms(known).startswith("NOT PRIVATE")]
    if bare:
        return f"NOT PRIVATE: {', '.join(bare)}"
    return f"Differentially private per patient: epsilon at most {max(t['epsilon'] for t in terms.values() if t):.3g}"


def case_items(root: str | Path) -> list[dict[str, Subject]]:
    """`data.layouts.find_cases` as the data list of a MONAI dataset: `{"subject": Subject}` per scan."""
    return [{"subject": subject} for subject in find_cases(Path(root))]


class WriteSegmentationd(Transform):
    """Last step of the central bundle: logits on the working grid become files on the native grid.

    The same functions as `segment_subject` and `write_case`, so bundle and library give equal voxels.
    """

    def __init__(self, output_dir: str | Path, *, provenance: Provenance, scheme: str | None = None) -> None:
        """Write below `output_dir`, in the label scheme of the weights unless told otherwise."""
        self.output_dir = Path(output_dir)
        self.provenance = provenance
        self.scheme = get_scheme(scheme or provenance.label_scheme)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Take `image` and logits `pred` `(4, x, y, z)` with what `LoadSubjectd` adds; add the file as `written`."""
        began = time.perf_counter()
        affine = np.asarray(data["native_affine"], dtype=np.float64)
        shape = tuple(int(n) for n in data["native_shape"])
        logits = MetaTensor(data["pred"].as_tensor(), affine=data["image"].affine)
        classes = native_classes(_softmax(logits), affine=affine, shape=shape)
        case = Segmentation(
            subject_id=data["subject_id"],
            classes=classes,
            volumes_ml=volumes_ml(classes, affine),
            affine=affine,
            reference=Path(data["reference"]),
            seconds=time.perf_counter() - began,
        )
        paths = write_case(case, self.output_dir, scheme=self.scheme, provenance=self.provenance)
        return {**data, "written": str(paths["segmentation"])}


def _turned_only(working: np.ndarray, native: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The map from working to native voxels as a signed permutation `(3, 3)` and whole offsets, or `None` if it is not.

    A deviation of 0.001 voxels over the grid counts as rounding of the headers.
    """
    move = np.linalg.inv(native) @ working
    turn, offset = np.rint(move[:3, :3]), np.rint(move[:3, 3])
    if np.abs(move[:3, :3] - turn).max() > 1e-5 or np.abs(move[:3, 3] - offset).max() > 1e-3:
        return None
    if not (np.abs(turn).sum(axis=0) == 1).all() or not (np.abs(turn).sum(axis=1) == 1).all():
        return None
    return turn.astype(int), offset.astype(int)


def _place(values: np.ndarray, turn: np.ndarray, offset: np.ndarray, *, into: np.ndarray) -> None:
    """Copy `values` into an array whose voxel `turn @ v + offset` is its voxel `v`; what falls outside is left out."""
    order = np.abs(turn).argmax(axis=1)  # axis of `values` that runs along each axis of `into`
    moved = values.transpose(order)
    source, target = [], []
    for axis, along in enumerate(order):
        sign, length = turn[axis, along], moved.shape[axis]
        first = offset[axis] if sign > 0 else offset[axis] - (length - 1)
        if sign < 0:
            moved = np.flip(moved, axis)
        start, stop = max(first, 0), min(first + length, into.shape[axis])
        source.append(slice(start - first, max(stop - first, start - first)))
        target.append(slice(start, max(stop, start)))
    into[tuple(target)] = moved[tuple(source)]


def _most_probable(probs: Tensor) -> np.ndarray:
    """Class `(x, y, z)` uint8 from probabilities `(C, x, y, z)` on the CPU; of equal ones the first."""
    # numpy's argmax over a leading axis takes a fifth of torch's time on a CPU.
    return np.asarray(probs.numpy().argmax(axis=0), dtype=np.uint8)


def _softmax(logits: MetaTensor) -> MetaTensor:
    """Class probabilities `(4, x, y, z)` float32 on the CPU from logits of that shape."""
    return MetaTensor(torch.softmax(logits.as_tensor().float(), dim=0).cpu(), affine=logits.affine)
