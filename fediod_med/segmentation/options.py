"""What `fediod segment` can be asked for, and the model it is asked of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fediod_med.checkpoints import Provenance, load_segmenter
from fediod_med.errors import SettingsError
from fediod_med.export import find_weights
from fediod_med.labels import SEQUENCES, get_scheme
from fediod_med.preprocess import parse_command
from fediod_med.records import sha256

OUTPUT_TYPES = ("nifti", "dicom-seg", "dicom-labelmap")


@dataclass(frozen=True)
class SegmentOptions:
    """What to do with each case and what to write.

    Attributes:
        scheme: label scheme of written label maps; that of the weights when omitted.
        output_types: of `OUTPUT_TYPES`; the NIfTI label map is always written, the DICOM ones need DICOM input.
        statistics: write `<case>_stats.json`.
        preview: write `<case>_preview.png`.
        report: write `<case>_report.html` and `<case>_report.png`.
        probabilities: write `<case>_probabilities.nii.gz`, classes along the fourth axis.
        uncertainty: write `<case>_entropy.nii.gz`, and `<case>_disagreement.nii.gz` where the run has teachers.
        smallest_lesion_ml: lesions below this volume are taken out of the label map, but for the largest; 0 keeps all.
        fast: coarser working grid.
        roi: window edge in voxels; the model's when omitted.
        overlap: share of a window covered by its neighbour.
        batch: windows in one pass of the network.
        strict: warnings about the input forbid output too.
        coregister: register T1, T2 and FLAIR to T1c first.
        native: sequence whose grid the label map is written on.
        preprocess: external command run on each case first, with `{input}` and `{output}`; see `preprocess`.
        compile_network: run the network through `torch.compile`.
    """

    scheme: str | None = None
    output_types: tuple[str, ...] = ("nifti",)
    statistics: bool = True
    preview: bool = True
    report: bool = False
    probabilities: bool = False
    uncertainty: bool = False
    smallest_lesion_ml: float = 0.5
    fast: bool = False
    roi: int | None = None
    overlap: float = 0.25
    batch: int = 1
    strict: bool = False
    coregister: bool = False
    native: str = "T1c"
    preprocess: str | None = None
    compile_network: bool = False

    def __post_init__(self) -> None:
        """`SettingsError` for what cannot be asked for."""
        unknown = [name for name in self.output_types if name not in OUTPUT_TYPES]
        if unknown or not self.output_types:
            raise SettingsError(
                f"output type: expected some of {', '.join(OUTPUT_TYPES)}, found {', '.join(unknown) or 'none'}"
            )
        if self.native not in SEQUENCES:
            raise SettingsError(f"native grid: expected one of {', '.join(SEQUENCES)}, found {self.native!r}")
        if self.native != "T1c" and not self.coregister:
            raise SettingsError(
                f"native grid {self.native}: without --coregister the four sequences share one grid; add --coregister"
            )
        if not self.smallest_lesion_ml >= 0:
            raise SettingsError(f"smallest lesion: expected 0 ml or more, found {self.smallest_lesion_ml}")
        if self.preprocess is not None:
            parse_command(self.preprocess)
        if self.scheme is not None:
            get_scheme(self.scheme)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for records."""
        return dataclasses.asdict(self) | {"output_types": list(self.output_types)}


@dataclass(frozen=True)
class Model:
    """A central model, ready to segment.

    Attributes:
        network: in evaluation mode, on its device.
        provenance: of its weights.
        path: weights file.
        sha256: of that file.
        teachers: networks and provenances of the hospitals' teachers, where they were asked for and are at hand.
    """

    network: nn.Module
    provenance: Provenance
    path: Path
    sha256: str
    teachers: Mapping[str, tuple[nn.Module, Provenance]] = field(default_factory=dict)


def load_model(model: Path | None, *, device: torch.device, options: SegmentOptions) -> Model:
    """The model behind `--model`: a run folder, a bundle, a weights file, or nothing for the public prior.

    Raises:
        SettingsError: no model there.
        WeightsError: weights without provenance.
    """
    path = find_weights(model)
    network, provenance = load_segmenter(path, device)
    if options.compile_network:
        network.compile()
    wanted = model is not None and options.uncertainty
    found = sorted(model.glob("teachers/*/model.safetensors")) if model is not None and wanted else []
    teachers = {weights.parent.name: load_segmenter(weights, device) for weights in found}
    return Model(network, provenance, path, sha256(path), teachers)


def setting_of(model: Model, options: SegmentOptions) -> str:
    """One number for everything that decides the outputs of a case beside its input: model, teachers and options."""
    content = {
        "model": model.sha256,
        "teachers": sorted(model.teachers),
        "options": options.as_json(),
        "version": model.provenance.version,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
