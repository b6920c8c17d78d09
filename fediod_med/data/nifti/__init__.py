"""Reads and writes NIfTI volumes without ever changing where a voxel lies in the patient."""
