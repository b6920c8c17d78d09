"""Scans and label maps as the viewer needs them: turned to the nearest patient axes, and kept while they are in use.

Turning (`nibabel.as_closest_canonical`) permutes and flips axes only, so no voxel is interpolated: axis 0 runs towards
the patient's right, axis 1 to anterior, axis 2 to superior, each as nearly as the grid allows.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.errors import GeometryError, InputError, LabelError
from fediod_med.labels import SEQUENCES, LabelScheme, to_classes

Point = tuple[float, float, float]
PERCENTILES = (0.5, 99.5)
_ITK_ENDINGS = (".nrrd", ".mha", ".mhd")


@dataclass(frozen=True)
class LoadedVolume:
    """One 3-D image or label map on axes that run right, anterior, superior.

    Attributes:
        array: `(X, Y, Z)`; float32 grey values, or uint8 classes 0 to 3.
        affine: index to world matrix `(4, 4)`, mm, RAS+.
        window: grey values shown as black and white: percentiles 0.5 and 99.5 of the non-zero voxels.
        name: shown in captions; never a path.
    """

    array: np.ndarray
    affine: np.ndarray
    window: tuple[float, float] = (0.0, 1.0)
    name: str = ""
    _inverse: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_inverse", np.linalg.inv(np.asarray(self.affine, dtype=np.float64)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels per axis."""
        x, y, z = self.array.shape
        return x, y, z

    @property
    def spacing(self) -> Point:
        """Voxel size per axis, mm."""
        x, y, z = np.linalg.norm(np.asarray(self.affine, dtype=np.float64)[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def oblique(self) -> float:
        """Largest angle between a grid axis and the patient axis that names it, degrees."""
        axes = np.asarray(self.affine, dtype=np.float64)[:3, :3] / np.asarray(self.spacing)
        return float(np.degrees(np.arccos(np.clip(np.abs(np.diag(axes)), -1, 1))).max())

    def voxel_of(self, mm: Point) -> tuple[int, int, int]:
        """Index of the voxel nearest to a world position (mm), clipped to the grid."""
        x, y, z = self.index_of(mm)
        near = [min(max(round(v), 0), n - 1) for v, n in zip((x, y, z), self.shape, strict=True)]
        return near[0], near[1], near[2]

    def index_of(self, mm: Point) -> Point:
        """Fractional index of a world position, mm; whole at voxel centres, not clipped."""
        x, y, z = (self._inverse @ (*mm, 1.0))[:3]
        return float(x), float(y), float(z)

    def mm_of(self, index: Point) -> Point:
        """World position (mm) of an index, which may be fractional."""
        x, y, z = (np.asarray(self.affine, dtype=np.float64) @ (*index, 1.0))[:3]
        return float(x), float(y), float(z)

    def cut(self, axis: int, index: int) -> np.ndarray:
        """Slice `index` along an axis, 2-D, without copying (`numpy.take` copies a whole volume in Fortran order)."""
        along: list[slice | int] = [slice(None)] * 3
        along[axis] = index
        return np.asarray(self.array[tuple(along)])

    @property
    def centre(self) -> Point:
        """World position of the middle voxel, mm."""
        x, y, z = self.shape
        return self.mm_of((x // 2, y // 2, z // 2))


class VolumeCache:
    """Loaded volumes by file and its state on disk, the least recently used ones dropped beyond a size.

    A file that was rewritten (another time stamp or size) is read again. Safe for several threads; a volume is shared,
    so its array is read-only.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        """Keep up to `max_bytes` of voxels; the volume loaded last is kept however large it is."""
        self.max_bytes = max_bytes
        self._volumes: OrderedDict[tuple[Any, ...], LoadedVolume] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, path: Path, *, channel: int | None = None, name: str = "") -> LoadedVolume:
        """A scan, or one channel of a 4-D file; see `load_image`."""
        return self._get(path, ("image", channel, name), lambda: load_image(path, channel=channel, name=name))

    def classes(self, path: Path, scheme: LabelScheme, *, name: str = "") -> LoadedVolume:
        """A label map; see `load_classes`."""
        return self._get(path, ("classes", scheme.name, name), lambda: load_classes(path, scheme, name=name))

    def made(self, paths: Sequence[Path], how: str, make: Callable[[], LoadedVolume]) -> LoadedVolume:
        """What `make` computes from several files, kept until one of them changes."""
        states = tuple(part for path in paths for part in self._state(path))
        return self._kept((*states, "made", how), make)

    @property
    def held_bytes(self) -> int:
        """Size of all voxels that are held."""
        with self._lock:
            return sum(volume.array.nbytes for volume in self._volumes.values())

    def _get(self, path: Path, how: tuple[Any, ...], load: Callable[[], LoadedVolume]) -> LoadedVolume:
        return self._kept((*self._state(path), *how), load)

    def _state(self, path: Path) -> tuple[Any, ...]:
        try:
            state = path.stat()
        except OSError as error:
            raise InputError(f"{path.name}: expected a volume to show, could not read it ({error.strerror})") from error
        return str(path), state.st_mtime_ns, state.st_size

    def _kept(self, key: tuple[Any, ...], load: Callable[[], LoadedVolume]) -> LoadedVolume:
        with self._lock:
            if key in self._volumes:
                self._volumes.move_to_end(key)
                return self._volumes[key]
        volume = load()  # outside the lock: others may be shown meanwhile
        volume.array.setflags(write=False)
        with self._lock:
            kept = self._volumes.setdefault(key, volume)
            self._volumes.move_to_end(key)
            held = sum(v.array.nbytes for v in self._volumes.values())
            while held > self.max_bytes and len(self._volumes) > 1:
                held -= self._volumes.popitem(last=False)[1].array.nbytes
        return kept


def load_image(path: Path, *, channel: int | None = None, name: str = "") -> LoadedVolume:
    """Read a scan for display.

    Args:
        path: NIfTI, 3-D, or 4-D with a `channel`; or NRRD or MetaImage, 3-D.
        channel: index on the fourth axis.
        name: for captions.

    Raises:
        InputError: unreadable, or not one 3-D volume.
    """
    array, affine = _read(path, channel)
    with np.errstate(over="ignore"):
        image = np.asarray(array, dtype=np.float32)
    # A viewer shows what there is; what cannot be drawn is drawn black. Converting a large double may overflow.
    if not np.isfinite(image).all():
        image = np.nan_to_num(image, posinf=0.0, neginf=0.0)
    return LoadedVolume(image, affine, grey_window(image), name)


def load_classes(path: Path, scheme: LabelScheme, *, name: str = "") -> LoadedVolume:
    """Read a label map of a declared scheme as classes 0 to 3.

    Raises:
        InputError: unreadable, or not one 3-D volume.
        LabelError: a value that the scheme does not know.
    """
    array, affine = _read(path, None)
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise LabelError(f"{path.name}: expected a label map of numbers, found {array.dtype}")
    return LoadedVolume(to_classes(array, scheme, path.name), affine, (0.0, 3.0), name)


def image_channels(path: Path) -> dict[str, int | None]:
    """Names of what a file holds: one unnamed volume, or the four sequences of a 4-D file in the usual order.

    Raises:
        InputError: unreadable, or neither 3-D nor a 4-D file of four volumes.
    """
    shape = _open(path).shape
    if len(shape) == 4 and shape[3] == len(SEQUENCES):
        return {sequence: index for index, sequence in enumerate(SEQUENCES)}
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return {"": None if len(shape) == 3 else 0}
    raise InputError(f"{path.name}: expected a 3-D volume, or four in one 4-D file, found shape {shape}")


def same_grid(first: LoadedVolume, second: LoadedVolume) -> bool:
    """Whether two volumes share shape and, within 0.1 mm at the corners, position."""
    if first.shape != second.shape:
        return False
    corners = np.array([(i, j, k, 1.0) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners[:, :3] *= np.array(first.shape) - 1
    difference = np.asarray(first.affine, dtype=np.float64) - np.asarray(second.affine, dtype=np.float64)
    return float(np.linalg.norm((difference @ corners.T)[:3], axis=0).max()) < 0.1


def require_same_grid(image: LoadedVolume, labels: LoadedVolume) -> None:
    """Refuse to draw a label map over an image of another grid; `GeometryError` says how they differ."""
    if not same_grid(image, labels):
        raise GeometryError(
            f"{labels.name or 'label map'}: expected the grid of {image.name or 'the image'} "
            f"({image.shape} voxels), found {labels.shape} voxels or another position; show an image of the same grid"
        )


def focus_mm(labels: LoadedVolume, members: tuple[int, ...] = (1, 2, 3)) -> Point | None:
    """World position (mm) where the area of some classes is largest on each of the three planes; none if absent."""
    inside = np.isin(labels.array, members)
    if not inside.any():
        return None
    places = []
    for axis in range(3):
        counts = inside.sum(axis=tuple(a for a in range(3) if a != axis))
        places.append(float(np.median(np.flatnonzero(counts == counts.max())) // 1))
    return labels.mm_of((places[0], places[1], places[2]))


def grey_window(image: np.ndarray) -> tuple[float, float]:
    """Grey values shown as black and white: percentiles 0.5 and 99.5 of the non-zero voxels; `(0, 1)` without any."""
    inside = image[image != 0]
    if not inside.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(inside, PERCENTILES))
    return low, high if high > low else low + 1.0


def _open(path: Path) -> Any:
    """A NIfTI image whose voxels are not read yet."""
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    try:
        return nib.load(path)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path.name}: expected NIfTI, could not read it ({error})") from error


def _read(path: Path, channel: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels `(X, Y, Z)` and affine of one volume, on the nearest patient axes."""
    import nibabel as nib

    if path.name.lower().endswith(_ITK_ENDINGS):
        # loads SimpleITK and torch, for inputs that are not NIfTI only
        from fediod_med.data.itk_formats import read_any_scan

        scan = read_any_scan(path, path.name)
        image: Any = nib.Nifti1Image(scan.array, scan.affine)
    else:
        image = _open(path)
    shape = image.shape
    if channel is None and len(shape) == 4 and shape[3] == 1:
        channel = 0
    if (channel is None and len(shape) != 3) or (channel is not None and (len(shape) != 4 or channel >= shape[3])):
        raise InputError(f"{path.name}: expected a 3-D volume, or a channel of a 4-D one, found shape {shape}")
    try:
        voxels = np.asarray(image.dataobj if channel is None else image.dataobj[..., channel])
        if voxels.dtype.fields or np.iscomplexobj(voxels):
            raise InputError(f"{path.name}: expected grey values, found {voxels.dtype}")
        turned: Any = nib.as_closest_canonical(nib.Nifti1Image(voxels, image.affine, dtype=voxels.dtype))
        # a copy: an uncompressed file stays mapped otherwise, and may be rewritten while it is shown
        return np.array(turned.dataobj), np.asarray(turned.affine, dtype=np.float64)
    except (OSError, EOFError, zlib.error, ValueError, np.linalg.LinAlgError) as error:
        raise InputError(f"{path.name}: expected readable voxels, found damage ({error})") from error
