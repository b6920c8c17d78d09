"""fediod-med: one 3D brain-tumour segmenter from hospitals that share neither scans nor weights.

Research software. Not for clinical use.
"""

from __future__ import annotations

__version__ = "0.1.0"
