"""What is drawn over a slice: classes, nested regions, or where two label maps differ.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; classes have the colours of the
figures and reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fediod_med.errors import SettingsError
from fediod_med.labels import CLASSES, REGION_CLASSES
from fediod_med.review.volumes import LoadedVolume, require_same_grid

CLASS_PALETTE = {"NCR": "#56B4E9", "ED": "#009E73", "ET": "#E69F00"}
"""Those of `reporting.style.CLASS_COLOURS`, kept here so that no plotting library is loaded; a test compares them."""
REGION_PALETTE = {"WT": "#009E73", "TC": "#56B4E9", "ET": "#E69F00"}
"""A region has the colour of the class that it adds to the next smaller one; outermost first."""
DIFFERENCE_PALETTE = {"both": "#999999", "first only": "#0072B2", "second only": "#D55E00", "other class": "#CC79A7"}

AGREE, FIRST_ONLY, SECOND_ONLY, OTHER_CLASS = 1, 2, 3, 4


@dataclass(frozen=True)
class Layer:
    """One colour of an overlay.

    Attributes:
        name: in the legend and in alternative texts.
        colour: `#RRGGBB`.
        values: values of the drawn map that have this colour.
    """

    name: str
    colour: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Overlay:
    """A label map and how it is drawn; with a second map, their difference is drawn instead.

    Attributes:
        labels: class map, on the grid of the image below.
        layers: drawn in this order.
        other: second class map on the same grid.
        members: with `other`, the classes that count as inside, or none to compare class by class.
    """

    labels: LoadedVolume
    layers: tuple[Layer, ...]
    other: LoadedVolume | None = None
    members: tuple[int, ...] | None = None

    def drawn(self, axis: int, index: int) -> np.ndarray:
        """Values of the drawn map on slice `index` along `axis`, 2-D uint8, in the order of the remaining axes."""
        along: list[slice | int] = [slice(None)] * 3
        along[axis] = index
        return self.drawn_in(tuple(along))

    def drawn_in(self, where: tuple[slice | int, ...]) -> np.ndarray:
        """Values of the drawn map in a part of its grid, uint8; `where` is an index of its array."""
        first = self.labels.array[where]
        if self.other is None:
            return np.asarray(first, dtype=np.uint8)
        return difference_map(first, self.other.array[where], members=self.members)


def class_overlay(labels: LoadedVolume, shown: Sequence[str] = CLASSES[1:]) -> Overlay:
    """The chosen classes (NCR, ED, ET), each in its colour.

    Raises:
        SettingsError: an unknown class.
    """
    _known(shown, CLASSES[1:], "class")
    layers = [Layer(name, CLASS_PALETTE[name], (CLASSES.index(name),)) for name in CLASSES[1:] if name in shown]
    return Overlay(labels, tuple(layers))


def region_overlay(labels: LoadedVolume, shown: Sequence[str] = ("WT", "TC", "ET")) -> Overlay:
    """The chosen nested regions (WT, TC, ET), larger ones first so that smaller ones lie on top.

    Raises:
        SettingsError: an unknown region.
    """
    _known(shown, tuple(REGION_PALETTE), "region")
    layers = [Layer(name, REGION_PALETTE[name], REGION_CLASSES[name]) for name in REGION_PALETTE if name in shown]
    return Overlay(labels, tuple(layers))


def difference_overlay(
    first: LoadedVolume, second: LoadedVolume, *, region: str | None = None, agreement: bool = False
) -> Overlay:
    """Where two label maps differ.

    Args:
        first: for example the model's.
        second: for example the reference, on the same grid.
        region: compare one region (WT, TC, ET) as inside or outside; class by class when omitted.
        agreement: also draw, in grey, where both see tumour alike.

    Raises:
        SettingsError: an unknown region.
        GeometryError: the grids differ.
    """
    if region is not None:
        _known((region,), tuple(REGION_CLASSES), "region")
    require_same_grid(first, second)
    values = dict(zip(DIFFERENCE_PALETTE, (AGREE, FIRST_ONLY, SECOND_ONLY, OTHER_CLASS), strict=True))
    chosen = [name for name in DIFFERENCE_PALETTE if agreement or name != "both"]
    layers = tuple(
        Layer(_difference_name(name, first, second), DIFFERENCE_PALETTE[name], (values[name],)) for name in chosen
    )
    return Overlay(first, layers, other=second, members=None if region is None else REGION_CLASSES[region])


def difference_map(first: np.ndarray, second: np.ndarray, *, members: Sequence[int] | None = None) -> np.ndarray:
    """Difference of two class maps of one shape.

    Args:
        first: classes 0 to 3, any shape.
        second: the same shape.
        members: classes that count as inside; without them every class but the background does.

    Returns:
        uint8: 0 both outside, `AGREE` 1, `FIRST_ONLY` 2, `SECOND_ONLY` 3, and `OTHER_CLASS` 4 where both see tumour but
        not the same class (never with `members`).
    """
    one = first != 0 if members is None else np.isin(first, members)
    two = second != 0 if members is None else np.isin(second, members)
    found = np.zeros(first.shape, dtype=np.uint8)
    found[one & two] = AGREE
    found[one & ~two] = FIRST_ONLY
    found[two & ~one] = SECOND_ONLY
    if members is None:
        found[one & two & (first != second)] = OTHER_CLASS
    return found


def vote_entropy(maps: Sequence[LoadedVolume], *, name: str = "disagreement") -> LoadedVolume:
    """How far several label maps disagree: entropy of their votes at each voxel, in nats, as an image to draw.

    Args:
        maps: two or more class maps on one grid, such as the answers of the hospitals' teachers.
        name: for captions.

    Returns:
        float32 from 0 (all alike) to `ln 4`; its window spans 0 to the largest entropy that so many maps can reach.

    Raises:
        SettingsError: fewer than two maps.
        GeometryError: the grids differ.
    """
    if len(maps) < 2:
        raise SettingsError(f"disagreement: expected two or more label maps, found {len(maps)}")
    for other in maps[1:]:
        require_same_grid(maps[0], other)
    entropy = np.zeros(maps[0].shape, dtype=np.float32)
    for label in range(len(CLASSES)):
        votes = np.zeros(maps[0].shape, dtype=np.uint8)
        for one in maps:
            votes += one.array == label
        # x ln x by number of votes; none and all give zero
        shares = np.arange(len(maps) + 1) / len(maps)
        entropy += np.array([-s * math.log(s) if s else 0.0 for s in shares], dtype=np.float32)[votes]
    return LoadedVolume(entropy, maps[0].affine, (0.0, math.log(min(len(maps), len(CLASSES)))), name)


def _difference_name(name: str, first: LoadedVolume, second: LoadedVolume) -> str:
    words = {
        "both": "both alike",
        "first only": f"only {first.name or 'the first'}",
        "second only": f"only {second.name or 'the second'}",
        "other class": "both, another class",
    }
    return words[name]


def _known(given: Sequence[str], allowed: Sequence[str], what: str) -> None:
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise SettingsError(f"overlay: expected {what} names among {', '.join(allowed)}, found {', '.join(unknown)}")
