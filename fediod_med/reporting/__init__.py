"""Turns scores and scans into figures and tables; no model in sight, and no display needed."""
