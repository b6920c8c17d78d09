"""Segmenting new scans: what `fediod segment` and `fediod_med.segment` do."""
