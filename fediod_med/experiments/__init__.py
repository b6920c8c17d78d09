"""Experiments behind docs/experiments.md: the method on classification, and the paper's open questions."""
