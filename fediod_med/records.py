"""What a run leaves in writing: `run.json` and other JSON, versions of the software, hashes of the inputs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fediod_med.durable import write_atomically
from fediod_med.errors import InputError
from fediod_med.resources import NOT_FOR_CLINICAL_USE

_PACKAGES = (
    *("fediod-med", "torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "pytorch-ignite", "safetensors"),
    *("opacus", "nvflare", "nilearn", "matplotlib"),
)


def run_record(
    *,
    command: str,
    device: str,
    commit: str | None,
    options: Mapping[str, Any],
    privacy: Mapping[str, Any] | str,
    seeds: Mapping[str, int] | None = None,
    seconds: Mapping[str, float] | None = None,
    inputs: Sequence[Path] = (),
    relative_to: Path | None = None,
    cases: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Content of `run.json`: what ran, with which software, on what, from which inputs, and how each case ended.

    Args:
        command: verb of the command line.
        device: as used, for example `cpu`.
        commit: of the source tree.
        options: as given; paths become text.
        privacy: per hospital, or a banner.
        seeds: by purpose.
        seconds: by stage.
        inputs: files whose SHA-256 is recorded.
        relative_to: folder that input paths are written relative to, so that records compare between machines.
        cases: status, seconds and messages by case.

    Raises:
        InputError: an input cannot be read.
    """
    hashes: dict[str, str] = {}
    for file in inputs:
        base = relative_to.resolve() if relative_to is not None else None
        inside = base is not None and file.resolve().is_relative_to(base)
        name = file.resolve().relative_to(base).as_posix() if base is not None and inside else file.name
        hashes[name if name not in hashes else str(file)] = sha256(file)
    record = {
        "notice": NOT_FOR_CLINICAL_USE,
        "privacy": privacy,
        "command": command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": software_versions(),
        "commit": commit,
        "device": device,
        "options": options,
        "seeds": seeds or {},
        "inputs_sha256": hashes,
        "cases": cases or {},
        "seconds": {name: round(spent, 3) for name, spent in (seconds or {}).items()},
    }
    plain: dict[str, Any] = _jsonable(record)
    return plain


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write JSON atomically; numbers of numpy become plain ones, paths text; a number that is not finite is refused.

    Raises:
        InputError: a value has no JSON form.
    """
    try:
        text = json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: expected plain, finite values, found one that JSON cannot hold ({error})") from error
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def software_versions() -> dict[str, str]:
    """Installed versions of Python and the packages that can change a result."""
    versions = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; `InputError` when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: expected a file to record, could not read it ({error})") from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value
