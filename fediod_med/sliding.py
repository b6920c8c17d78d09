"""Runs a network over a volume window by window, and with less memory when memory runs out.

MONAI's window positions and importance map; the loop is our own, because it skips windows without brain, adds up in one
pair of float32 arrays on the device of the network, and so needs about half of the time (`benchmarks/inference.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer
from torch import Tensor, nn

from fediod_med.devices import autocast
from fediod_med.errors import FediodError, SettingsError
from fediod_med.labels import CLASSES

logger = logging.getLogger(__name__)

_SMALLEST_WINDOW = 32
_SIGMA = 0.125  # of the window's edge, MONAI's default for Gaussian blending
# Of CUDA and its libraries, of torch on a CPU (two systems), of C++, and of oneDNN, which gives no other reason when
# its scratch space does not fit (measured under an address-space limit).
_SIGNS_OF_NO_MEMORY = (
    *("out of memory", "alloc_failed", "not enough memory", "can't allocate memory", "bad_alloc"),
    *("could not create a primitive", "could not create a memory object", "could not execute a primitive"),
)
_SURE = 20.0  # logit of the background where no window looked: probability 1 to within 1e-8


@dataclass(frozen=True)
class Window:
    """How to cut a volume.

    Attributes:
        roi: edge of a window in voxels, at least 8.
        overlap: share of a window covered by its neighbour, in [0, 1).
        batch: windows in one pass of the network.
    """

    roi: int = 64
    overlap: float = 0.25
    batch: int = 1

    def __post_init__(self) -> None:
        """`SettingsError` for a value out of range."""
        if self.roi < 8 or not 0 <= self.overlap < 1 or self.batch < 1:
            raise SettingsError(
                f"sliding window: expected roi >= 8, 0 <= overlap < 1 and batch >= 1, found {self.roi}, {self.overlap} "
                f"and {self.batch}"
            )


def sliding_logits(
    image: Tensor, network: Callable[[Tensor], Tensor] | nn.Module, window: Window, *, device: torch.device
) -> Tensor:
    """Logits of a whole volume, windows blended by a Gaussian (Isensee et al. 2021, Nat Methods 18; MONAI's map).

    Args:
        image: `(C, d, h, w)`; zero outside the brain. A volume smaller than the window is padded with zeros.
        network: `(B, C, roi, roi, roi)` to logits `(B, 4, roi, roi, roi)` of `labels.CLASSES`, on `device`.
        window: how to cut.
        device: where the network runs and the logits are added up.

    Returns:
        `(4, d, h, w)` float32 on `device`. Where no window holds any brain the background is certain.
    """
    roi = window.roi
    shape = tuple(int(n) for n in image.shape[1:])
    padded = tuple(max(n, roi) for n in shape)
    before = [(p - n) // 2 for p, n in zip(padded, shape, strict=True)]
    if padded != shape:
        pads = [side for p, n, b in reversed(list(zip(padded, shape, before, strict=True))) for side in (b, p - n - b)]
        image = torch.nn.functional.pad(image, pads)
    image = (image.as_tensor() if isinstance(image, MetaTensor) else image).to(device)
    importance = compute_importance_map(
        (roi,) * 3, mode="gaussian", sigma_scale=_SIGMA, device=device, dtype=torch.float32
    )
    total = torch.zeros((len(CLASSES), *padded), device=device)
    weight = torch.zeros(padded, device=device)
    for batch in _batches(_windows_with_brain(image, window), window.batch):
        with autocast(device):
            logits = network(torch.stack([image[(slice(None), *place)] for place in batch]))
        for place, found in zip(batch, logits.float(), strict=True):
            total[(slice(None), *place)] += found * importance
            weight[place] += importance
    unseen = weight == 0
    total /= weight.clamp_min_(torch.finfo(torch.float32).tiny)
    total[0].masked_fill_(unseen, _SURE)
    return total[(slice(None), *(slice(b, b + n) for b, n in zip(before, shape, strict=True)))]


class SlidingInferer(Inferer):
    """`sliding_logits` in the form that MONAI's engines and bundles call."""

    def __init__(self, window: Window) -> None:
        """Cut as `window` says."""
        self.window = window

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor] | nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Logits `(B, 4, d, h, w)` float32 of volumes `(B, C, d, h, w)`, each on its own."""
        volumes = [
            sliding_logits(volume, lambda x: network(x, *args, **kwargs), self.window, device=inputs.device)
            for volume in inputs
        ]
        found = torch.stack(volumes)
        if not isinstance(inputs, MetaTensor):
            return found
        located = MetaTensor(found)  # as MONAI's own inferers: the logits lie where the volume lies
        located.is_batch = inputs.is_batch
        located.copy_meta_from(inputs)
        return located


def with_less_memory(
    run: Callable[[Window, torch.device], Tensor], window: Window, device: torch.device, *, step: int = 16
) -> tuple[Tensor, tuple[str, ...]]:
    """Run with one window at a time, then smaller windows, then on the CPU, until memory suffices.

    Args:
        run: the computation; it raises what torch raises when memory runs out.
        window: to begin with.
        device: to begin with.
        step: windows stay multiples of this.

    Returns:
        What `run` returned, and one sentence for each retreat, for the record.

    Raises:
        FediodError: the smallest window on the CPU did not fit either.
    """
    notes: list[str] = []
    last: BaseException | None = None
    attempts = list(_attempts(window, device, step))
    for number, (smaller, where) in enumerate(attempts):
        try:
            return run(smaller, where), tuple(notes)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            last = error.with_traceback(None)  # its frames hold the arrays that did not fit
        if where.type == "cuda":
            torch.cuda.empty_cache()
        if number + 1 < len(attempts):
            following, place = attempts[number + 1]
            notes.append(
                f"out of memory on {where} with {smaller.batch} window(s) of {smaller.roi}; went on on {place} with "
                f"{following.batch} of {following.roi}"
            )
            logger.warning("%s", notes[-1])
    raise FediodError(
        f"segmentation: expected enough memory for windows of {attempts[-1][0].roi} voxels on {attempts[-1][1]}, found "
        "too little; close other programs, or use --fast"
    ) from last


def _windows_with_brain(image: Tensor, window: Window) -> list[tuple[slice, ...]]:
    """Places of the windows that hold at least one voxel that is not zero."""
    interval = tuple(max(1, int(window.roi * (1 - window.overlap))) for _ in range(3))
    places = dense_patch_slices(tuple(image.shape[1:]), (window.roi,) * 3, interval)
    brain = (image != 0).any(dim=0).cpu()  # one wait for a GPU instead of one per window
    return [tuple(place) for place in places if bool(brain[tuple(place)].any())]


def _batches(places: Sequence[tuple[slice, ...]], size: int) -> Iterator[Sequence[tuple[slice, ...]]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _attempts(window: Window, device: torch.device, step: int) -> Iterator[tuple[Window, torch.device]]:
    yield window, device
    if window.batch > 1:
        yield replace(window, batch=1), device
    smaller = replace(window, batch=1)
    while (half := max(_SMALLEST_WINDOW, smaller.roi // 2 // step * step)) < smaller.roi:
        smaller = replace(smaller, roi=half)
        yield smaller, device
    if device.type != "cpu":
        cpu = torch.device("cpu")
        yield replace(window, batch=1), cpu
        yield smaller, cpu


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return any(sign in words for sign in _SIGNS_OF_NO_MEMORY)
