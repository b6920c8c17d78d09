"""What the interactive viewer in the browser is sent: one image and one label map in 8 bits, cropped and bounded.

The message is `<u32 length of the header, little endian> <header, JSON> <image> <labels>`, the last two as `.nii.gz`:
Streamlit hands a component whole bytes only, no bytes inside a mapping. Grey values are windowed here, so the browser
draws what the PNG slices show and no raw intensity leaves the server.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.review.overlays import Overlay
from fediod_med.review.slices import View, alt_text, windowed
from fediod_med.review.volumes import LoadedVolume, require_same_grid

Index = tuple[int, int, int]
MAX_VOXELS = 12 * 2**20
"""Of each part: a whole BraTS scan has 8.9 million. Larger ones are thinned, every second or third voxel per axis."""
_MARGIN = 2
_HEADER = struct.Struct("<I")


@dataclass(frozen=True)
class Cut:
    """The part of a grid that is sent: from `start`, every `step`-th voxel, `shape` of them per axis."""

    start: Index
    step: int
    shape: Index

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The same as an index of the array."""
        x, y, z = (
            slice(start, start + (count - 1) * self.step + 1, self.step)
            for start, count in zip(self.start, self.shape, strict=True)
        )
        return x, y, z

    def sent(self, voxel: Index) -> Index:
        """The nearest voxel of the part."""
        x, y, z = (
            min(max(round((v - start) / self.step), 0), count - 1)
            for v, start, count in zip(voxel, self.start, self.shape, strict=True)
        )
        return x, y, z

    def whole(self, voxel: Sequence[int]) -> Index:
        """The voxel of the whole grid that a voxel of the part is; clipped to the part."""
        x, y, z = (
            start + min(max(int(v), 0), count - 1) * self.step
            for v, start, count in zip(voxel, self.start, self.shape, strict=True)
        )
        return x, y, z

    def holds(self, voxel: Index) -> bool:
        """Whether a voxel of the whole grid lies in the part, or between two of its voxels."""
        return all(
            start <= v <= start + (count - 1) * self.step
            for v, start, count in zip(voxel, self.start, self.shape, strict=True)
        )

    def affine(self, image: LoadedVolume) -> np.ndarray:
        """Index to world matrix (mm, RAS+) of the part of an image."""
        affine = np.array(image.affine, dtype=np.float64)
        affine[:3, :3] *= self.step
        affine[:3, 3] = image.mm_of((float(self.start[0]), float(self.start[1]), float(self.start[2])))
        return affine


class PartCache:
    """Packed parts by what they were made of, a few of them; safe for several threads."""

    def __init__(self, parts: int = 16) -> None:
        """Keep the `parts` used last."""
        self.parts = parts
        self._held: OrderedDict[tuple[Any, ...], tuple[tuple[np.ndarray, ...], bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, arrays: tuple[np.ndarray, ...], how: tuple[Any, ...], make: Callable[[], bytes]) -> bytes:
        """What `make` gives for these very arrays; they are held, so that their addresses stay theirs."""
        key = (*(id(array) for array in arrays), *how)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][1]
        made = make()
        with self._lock:
            self._held[key] = arrays, made
            while len(self._held) > self.parts:
                self._held.popitem(last=False)
        return made


def cut_of(image: LoadedVolume, *, most: int = MAX_VOXELS) -> Cut:
    """The part of an image that is sent: what is not zero with a small margin, thinned until `most` voxels are left."""
    start, stop = [0, 0, 0], list(image.shape)
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(image.array.any(axis=others))
        if filled.size:
            start[axis] = max(0, int(filled[0]) - _MARGIN)
            stop[axis] = min(image.shape[axis], int(filled[-1]) + 1 + _MARGIN)
    extent = [after - before for before, after in zip(start, stop, strict=True)]
    step = 1
    while np.prod([-(-n // step) for n in extent]) > most:
        step += 1
    x, y, z = (-(-n // step) for n in extent)
    return Cut((start[0], start[1], start[2]), step, (x, y, z))


def message(
    image: LoadedVolume,
    cut: Cut,
    voxel: Index,
    *,
    overlay: Overlay | None,
    view: View,
    cache: PartCache,
) -> bytes:
    """Everything that the viewer in the browser draws.

    Args:
        image: to draw.
        cut: of the image; see `cut_of`.
        voxel: of the image's grid, where the crosshair stands.
        overlay: drawn on top, on the same grid.
        view: window, opacity, style, crosshair and convention, as for PNG slices.
        cache: of parts that were packed before.

    Raises:
        GeometryError: the overlay lies on another grid.
    """
    affine = cut.affine(image)
    window = view.window or image.window
    grey = cache.get(
        (image.array,), ("grey", window, cut), lambda: _nifti(windowed(image.array[cut.slices], window), affine)
    )
    labels, colours = b"", []
    if overlay is not None and overlay.layers:
        require_same_grid(image, overlay.labels)
        arrays = [overlay.labels.array, *([] if overlay.other is None else [overlay.other.array])]
        layers, members = overlay.layers, overlay.members
        labels = cache.get(
            tuple(arrays), ("labels", layers, members, cut), lambda: _nifti(_layers_of(overlay, cut), affine)
        )
        colours = [{"name": layer.name, "colour": layer.colour} for layer in layers]
    at = cut.sent(voxel)
    mm = image.mm_of((float(voxel[0]), float(voxel[1]), float(voxel[2])))
    header = {
        "image": {"id": _name(grey), "bytes": len(grey)},
        "labels": {"id": _name(labels) if labels else "", "bytes": len(labels)},
        "colours": colours,
        "shape": cut.shape,
        "affine": affine.tolist(),
        "voxel": at,
        "crosshair": view.crosshair and cut.holds(voxel),
        "opacity": view.opacity,
        "outline": view.style == "outline",
        "radiological": view.radiological,
        "synthetic": view.synthetic,
        "thinned": cut.step,
        "notice": NOT_FOR_CLINICAL_USE,
        "alt": alt_text(image, "axial", mm, view=view).replace("xial slice of", "xial, coronal and sagittal slices of"),
    }
    told = json.dumps(header, allow_nan=False).encode()
    return b"".join((_HEADER.pack(len(told)), told, grey, labels))


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Header, image and labels of a message, as the browser reads them."""
    (length,) = _HEADER.unpack_from(content)
    header: dict[str, Any] = json.loads(content[_HEADER.size : _HEADER.size + length])
    start = _HEADER.size + length
    middle = start + int(header["image"]["bytes"])
    return header, content[start:middle], content[middle : middle + int(header["labels"]["bytes"])]


def _layers_of(overlay: Overlay, cut: Cut) -> np.ndarray:
    """Number of the layer that is seen at each voxel of the part, from 1 in the order of the layers; 0 for none."""
    table = np.zeros(256, dtype=np.uint8)
    for number, layer in enumerate(overlay.layers, start=1):
        table[list(layer.values)] = number
    return np.asarray(table[overlay.drawn_in(cut.slices)])


def _nifti(array: np.ndarray, affine: np.ndarray) -> bytes:
    import nibabel as nib

    image: Any = nib.Nifti1Image(np.asarray(array, dtype=np.uint8), affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
