"""From files to tensors: layouts, partitions, NIfTI, transforms, and the phantom simulator."""
