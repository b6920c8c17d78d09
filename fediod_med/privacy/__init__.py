"""Patient-level differential privacy: mechanisms, accounting, calibration, noise, policy, ledger, gate, verification.

The unit is the patient and the adjacency is null replacement: two data sets are neighbours when one patient's data are
replaced by a null that contributes nothing, so the number of patients is public and costs nothing.
"""
