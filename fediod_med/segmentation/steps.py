"""One case from files to verified outputs, in three steps that a cohort can overlap: read, compute, write."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from fediod_med.data.transforms import normalise, to_working_grid
from fediod_med.findings import Severity
from fediod_med.inference import default_roi, probabilities_in_memory, segment_volume, volumes_ml
from fediod_med.lesions import without_small_lesions
from fediod_med.quality import assess
from fediod_med.segmentation.inputs import Case
from fediod_med.segmentation.options import Model, SegmentOptions, setting_of
from fediod_med.segmentation.reading import Loaded, read_case
from fediod_med.segmentation.writing import Computed, Written, write_outputs
from fediod_med.sliding import Window
from fediod_med.uncertainty import class_entropy, teacher_disagreement


class CaseSegmenter:
    """A model with options and an output folder; its three steps are called once per case.

    Args:
        model: from `segment_options.load_model`.
        options: what to do and to write.
        out: output folder.
        device: where the networks run.
    """

    def __init__(self, model: Model, *, options: SegmentOptions, out: Path, device: torch.device) -> None:
        self.model = model
        self.options = options
        self.out = out
        self.device = device
        self.setting = setting_of(model, options)

    def options_as_json(self) -> dict[str, Any]:
        """Options, for the record."""
        return self.options.as_json()

    def read(self, case: Case) -> Loaded:
        """Read and check one case; errors as in `reading.read_case`."""
        return read_case(case, self.options)

    def compute(self, loaded: Loaded) -> Computed:
        """Segment one case and say how far to trust it; errors as in `inference.segment_volume`."""
        began = time.perf_counter()
        options, provenance = self.options, self.model.provenance
        found = segment_volume(
            loaded.volume,
            self.model.network,
            provenance,
            subject_id=loaded.case.case_id,
            device=self.device,
            roi=options.roi,
            overlap=options.overlap,
            batch=options.batch,
            fast=options.fast,
            keep_probabilities=options.probabilities,
        )
        kept, removed, removed_ml = without_small_lesions(
            found.classes, found.affine, smallest_ml=options.smallest_lesion_ml
        )
        notes = found.notes
        if removed:
            found = replace(found, classes=kept, volumes_ml=volumes_ml(kept, found.affine))
            notes = (
                *notes,
                f"{removed} lesions below {options.smallest_lesion_ml:g} ml taken out, {removed_ml:.2f} ml together; "
                "--smallest-lesion 0 keeps them",
            )
        working = found.working
        assert working is not None, "segment_volume keeps it"
        probabilities = working.as_tensor().numpy()
        affine = np.asarray(working.affine, dtype=np.float64)
        entropy = _as_map(class_entropy(probabilities), working) if options.uncertainty else None
        disagreement = self._disagreement(loaded) if options.uncertainty and len(self.model.teachers) > 1 else None
        comparable = disagreement is not None and disagreement.shape[1:] == probabilities.shape[1:]
        quality = assess(
            probabilities,
            affine,
            disagreement=disagreement[0].numpy() if comparable and disagreement is not None else None,
            input_warnings=sum(f.severity is Severity.WARNING for f in loaded.findings),
        )
        if options.uncertainty and disagreement is None:
            notes = (*notes, "no map of the teachers' disagreement: the model has no two teachers beside it")
        return Computed(loaded, found, quality, entropy, disagreement, notes, time.perf_counter() - began)

    def write(self, computed: Computed) -> Written:
        """Write and verify the outputs; errors as in `writing.write_outputs`."""
        return write_outputs(computed, self.out, model=self.model, options=self.options)

    def _disagreement(self, loaded: Loaded) -> MetaTensor:
        """Disagreement of the teachers on the working grid of the first of them, nats."""
        provenance = next(iter(self.model.teachers.values()))[1]
        volume = loaded.volume
        image = MetaTensor(torch.from_numpy(volume.array), affine=torch.from_numpy(volume.affine))
        working = normalise(to_working_grid(image, spacing=provenance.spacing)[0])

        def answers() -> Any:
            for network, own in self.model.teachers.values():
                window = Window(default_roi(own), self.options.overlap, self.options.batch)
                yield (
                    probabilities_in_memory(network, working, window=window, device=self.device)[0].as_tensor().numpy()
                )

        return _as_map(teacher_disagreement(answers()), working)


def _as_map(values: np.ndarray, grid: MetaTensor) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(values))[None], affine=grid.affine)
