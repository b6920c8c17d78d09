"""DICOM in and out: series, recognised sequences, volumes, and segmentations that are read back before kept."""
