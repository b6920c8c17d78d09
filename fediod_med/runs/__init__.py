"""Whole runs and their folders: teachers, distillation, the rows of its own table, bundle and figures.

`distill.py` reads like the steps of a run; each step lies beside it.
"""
