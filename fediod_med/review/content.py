"""What exactly a reviewer saw: hashes of label maps and images, and whether files still are what was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fediod_med.errors import InputError
from fediod_med.review.case_folder import Case, CaseFolder, LabelMapFile


def content_hashes(case: Case, label_map: LabelMapFile | None = None) -> tuple[str, str]:
    """SHA-256 of the label map and of the images, hexadecimal, as they are on disk now; empty where there are none.

    Args:
        case: what is shown.
        label_map: another model's; the segmentation when omitted.

    Raises:
        InputError: a file cannot be read.
    """
    shown = case.label_map if label_map is None else label_map
    mask = "" if shown is None else _sha256(shown.path)
    files = dict.fromkeys(image.path for image in case.images.values())
    if not files:
        return mask, ""
    return mask, hashlib.sha256("".join(_sha256(path) for path in files).encode()).hexdigest()


def changed_outputs(case: Case, folder: CaseFolder) -> tuple[str, ...]:
    """Names of output files that are missing or no longer what the record says; empty when all are as written."""
    changed = []
    for name, expected in case.outputs_sha256.items():
        try:
            if _sha256(_inside(folder.path, name)) != expected:
                changed.append(name)
        except InputError:
            changed.append(name)
    return tuple(changed)


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"{name}: expected a file of the folder, found one outside")
    return path


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path.name}: expected a file to hash, could not read it ({error.strerror})") from error
