"""`fediod compare`: every row of the comparison on the same patients, with the same compute and the same seeds."""
