"""Sequences, classes, regions and label schemes: the one place where their order and values are written.

Inside the package a label map holds four exclusive classes (0 background, 1 NCR, 2 ED, 3 ET); regions are unions of
classes (Menze et al. 2015, IEEE TMI 34(10); Bakas et al. 2017, Sci Data 4). On disk each site states its scheme; it is
never guessed, because 4 means enhancing tumour up to BraTS 2022 and resection cavity in BraTS 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fediod_med.errors import LabelError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

SEQUENCES = ("T1c", "T1", "T2", "FLAIR")
CLASSES = ("background", "NCR", "ED", "ET")
REGIONS = ("TC", "WT", "ET")
REGION_CLASSES: Mapping[str, tuple[int, ...]] = {"TC": (1, 3), "WT": (1, 2, 3), "ET": (3,)}


@dataclass(frozen=True)
class LabelScheme:
    """How label values on disk map to classes.

    Attributes:
        name: as written in `site.yaml`.
        to_class: class index (0 to 3) by value on disk.
        to_value: value on disk by class index; the inverse, with what a written map uses.
    """

    name: str
    to_class: Mapping[int, int]
    to_value: Mapping[int, int]


SCHEMES: Mapping[str, LabelScheme] = {
    scheme.name: scheme
    for scheme in (
        LabelScheme("brats2018", {0: 0, 1: 1, 2: 2, 4: 3}, {0: 0, 1: 1, 2: 2, 3: 4}),
        LabelScheme("brats2023", {0: 0, 1: 1, 2: 2, 3: 3}, {0: 0, 1: 1, 2: 2, 3: 3}),
        # Post-operative cases: the resection cavity (4) is not tumour and is read as background.
        LabelScheme("brats2024", {0: 0, 1: 1, 2: 2, 3: 3, 4: 0}, {0: 0, 1: 1, 2: 2, 3: 3}),
        LabelScheme("msd", {0: 0, 1: 2, 2: 1, 3: 3}, {0: 0, 1: 2, 2: 1, 3: 3}),
    )
}


def get_scheme(name: str) -> LabelScheme:
    """Look up a label scheme by name; `SettingsError` lists the known ones."""
    try:
        return SCHEMES[name]
    except KeyError:
        raise SettingsError(
            f"label scheme: expected one of {', '.join(SCHEMES)}, found {name!r}; state the scheme the files use"
        ) from None


def to_classes(values: np.ndarray, scheme: LabelScheme, where: str) -> np.ndarray:
    """Translate label values on disk into classes.

    Args:
        values: label map of any shape; floats are accepted when they are whole numbers (BraTS 2023 stores float32).
        scheme: the scheme its site declared.
        where: file named in the error.

    Returns:
        `uint8` array of the same shape with values 0 to 3.

    Raises:
        LabelError: a value is not a whole number or not in the scheme.
    """
    found = np.unique(values)
    unknown = [v for v in found.tolist() if v not in scheme.to_class]
    if unknown:
        shown = ", ".join(f"{v:g}" for v in unknown[:8])
        raise LabelError(
            f"{where}: expected label values {sorted(scheme.to_class)} (scheme {scheme.name}), found {shown}; "
            f"declare the scheme the file uses ({', '.join(SCHEMES)}) or correct the file",
            code="E190",
        )
    classes = np.zeros(values.shape, dtype=np.uint8)
    for value, label in scheme.to_class.items():
        classes[values == value] = label
    return classes


def from_classes(classes: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """Translate classes (0 to 3, any shape) into `uint8` label values of a scheme."""
    lut = np.zeros(len(CLASSES), dtype=np.uint8)
    for label, value in scheme.to_value.items():
        lut[label] = value
    return np.asarray(lut[classes], dtype=np.uint8)


def region_masks(classes: np.ndarray) -> dict[str, np.ndarray]:
    """Boolean mask of each region (TC, WT, ET) from a class map of any shape."""
    return {region: np.isin(classes, members) for region, members in REGION_CLASSES.items()}


def region_probabilities(probs: Tensor, dim: int = 1) -> Tensor:
    """Region probabilities as sums of class probabilities.

    Args:
        probs: `(B, 4, ...)`, softmax over the exclusive classes.
        dim: position of the class axis.

    Returns:
        The same shape with three entries along `dim`: TC, WT, ET.
    """
    import torch

    def members(region: str) -> Any:
        index = torch.tensor(REGION_CLASSES[region], device=probs.device)
        return probs.index_select(dim, index).sum(dim)

    return torch.stack([members(region) for region in REGIONS], dim=dim)
