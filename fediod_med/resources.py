"""Where the files that ship beside the code are found: bundle templates and the public prior's weights."""

from __future__ import annotations

from pathlib import Path

from fediod_med.errors import SettingsError

NOT_FOR_CLINICAL_USE = "Research software. Not for clinical use."


def bundle_dir(name: str) -> Path:
    """Folder of the MONAI bundle `name` (`teacher` or `central`), in the source tree or in the installed package."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "bundles" / name, package / "bundles" / name):
        if (folder / "configs").is_dir():
            return folder
    raise SettingsError(f"bundle {name!r}: not found beside the package in {package.parent}; reinstall fediod-med")


def public_prior() -> Path:
    """Weights of the public prior: a small student trained on phantoms only, on no patient."""
    path = Path(__file__).resolve().parent / "weights" / "public_prior.safetensors"
    if not path.is_file():
        raise SettingsError(f"public prior: expected {path}, found nothing; run `fediod prior` or reinstall")
    return path
