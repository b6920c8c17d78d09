"""fediod-med: one 3D brain-tumour segmenter from hospitals that share neither scans nor model weights.

    import fediod_med
    found = fediod_med.segment("CASE_FOLDER", model="runs/brats18")
    found.classes, found.volumes_ml, found.findings

Research software. Not for clinical use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fediod_med.segmentation.api import segment, segment_scans

__version__ = "0.1.0"
__all__ = ["__version__", "segment", "segment_scans"]


def __getattr__(name: str) -> Any:
    """Load the heavy parts when they are first used, so that `import fediod_med` is quick."""
    if name in ("segment", "segment_scans"):
        from fediod_med.segmentation import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
