"""Hospitals on machines of their own, over NVIDIA FLARE: the same `distill`, the same `SiteNode`, the same messages."""
