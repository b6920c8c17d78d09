"""Whole runs and their folders: teachers, distillation, every row of the comparison, bundle and figures.

`distill.py` reads like the steps of a run; each step lies beside it.
"""
