"""Writes the central model as a complete MONAI bundle that says where it comes from, and finds such a bundle again.

The files of `bundles/central` are the template; a run adds weights, versions, scores and the privacy of each hospital.
The weights are safetensors (no pickle), and `inference.yaml` names their SHA-256: a bundle never runs other weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor, nn

from fediod_med.checkpoints import Provenance, load_segmenter, save_weights
from fediod_med.durable import write_atomically
from fediod_med.errors import SettingsError, WeightsError
from fediod_med.inference import privacy_banner, privacy_terms
from fediod_med.labels import REGIONS
from fediod_med.records import sha256
from fediod_med.resources import NOT_FOR_CLINICAL_USE, bundle_dir, public_prior

WEIGHTS = Path("models", "model.safetensors")
_PACKAGES = ("fediod-med", "nibabel", "pytorch-ignite", "safetensors", "scipy")
_UNSET_HASH = 'weights_sha256: ""'


def write_central_bundle(
    out: Path,
    weights: Mapping[str, Tensor],
    provenance: Provenance,
    *,
    summary: Mapping[str, Any] | None = None,
    evaluated_on: str = "held-out patients of the hospitals",
) -> Path:
    """Write a self-contained bundle: weights, configuration, metadata, model card, licence.

    Args:
        out: bundle folder, made when absent; files of an earlier bundle in it are replaced.
        weights: state dict of the network that `provenance.network` describes.
        provenance: of the weights.
        summary: this model's row of the comparison (`evaluation.summarise`), or none when it was not scored.
        evaluated_on: whose scans the scores are about, in the words of the model card.

    Returns:
        `out`.

    Raises:
        SettingsError: `out` is the template itself, or the template is missing.
        WeightsError: the weights do not fit the network.
    """
    template = bundle_dir("central")
    if out.resolve() == template.resolve():
        raise SettingsError(f"{out}: expected a folder for the written bundle, found the template; choose another")
    save_weights(out / WEIGHTS, weights, provenance)
    load_segmenter(out / WEIGHTS)  # an unusable bundle must fail here, not at the first scan
    digest = sha256(out / WEIGHTS)
    for name in ("LICENSE", "configs/logging.conf", "configs/metadata.schema.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template / name, out / name)
    metadata = json.loads((template / "configs" / "metadata.json").read_text(encoding="utf-8"))
    metadata |= _metadata(provenance, summary, digest)
    # Twice what the levels divide: instance norm cannot work on the single voxel that n = 1 would leave at the bottom.
    edge = [f"{1 << int(provenance.network['depth'])}*n"] * 3
    for tensor in (
        metadata["network_data_format"]["inputs"]["image"],
        metadata["network_data_format"]["outputs"]["pred"],
    ):
        tensor["spatial_shape"] = edge
    _write(out / "configs" / "metadata.json", json.dumps(metadata, indent=2, allow_nan=False) + "\n")
    card = Template((template / "docs" / "README.md").read_text(encoding="utf-8"))
    _write(out / "docs" / "README.md", card.substitute(_card(provenance, summary, evaluated_on, digest)))
    config = (template / "configs" / "inference.yaml").read_text(encoding="utf-8")
    if config.count(_UNSET_HASH) != 1:
        raise SettingsError(f"{template}: expected one line `{_UNSET_HASH}` in configs/inference.yaml; reinstall")
    # Last: until this file names the new weights, the bundle does not run.
    _write(out / "configs" / "inference.yaml", config.replace(_UNSET_HASH, f'weights_sha256: "{digest}"'))
    return out


def locate_bundle(weights_sha256: str) -> str:
    """Folder of the bundle whose weights have this hash; evaluated by `configs/inference.yaml`.

    MONAI does not tell a configuration where it lies. Looked at, in this order: `--bundle_root` (never gets here),
    the configuration files named on the command line, the module search path (MONAI puts a running bundle there) and
    the working directory. A candidate counts only if its weights have the hash.

    Raises:
        SettingsError: this is the template, or no candidate has these weights.
    """
    if not weights_sha256:
        raise SettingsError(
            "central bundle: this is the template, which has no weights; run the one that `fediod distill` wrote"
        )
    seen: set[Path] = set()
    for root in _candidates():
        weights = (root / WEIGHTS).resolve()
        if weights in seen or not weights.is_file():
            continue
        seen.add(weights)
        if sha256(weights) == weights_sha256:
            return str(root)
    raise SettingsError(
        f"central bundle: expected {WEIGHTS} with SHA-256 {weights_sha256[:12]}..., found "
        f"{', '.join(map(str, seen)) or 'none'}; give --bundle_root or copy the bundle again"
    )


def load_bundle(root: str | Path) -> tuple[nn.Module, Provenance]:
    """Network on the CPU, in evaluation mode, and provenance of the bundle in `root`; errors as in `load_segmenter`."""
    return load_segmenter(Path(root) / WEIGHTS)


def bundle_weights(root: Path) -> Path:
    """Weights file of a bundle folder, checked against the hash in its configuration.

    Raises:
        WeightsError: there are none, or they were changed after the bundle had been written.
    """
    weights, config = root / WEIGHTS, root / "configs" / "inference.yaml"
    if not weights.is_file():
        raise WeightsError(f"{root}: expected a bundle with {WEIGHTS}, found none")
    if config.is_file() and sha256(weights) not in config.read_text(encoding="utf-8"):
        raise WeightsError(f"{weights}: not the weights that {config} names; copy the bundle again")
    return weights


def find_weights(model: Path | None) -> Path:
    """The weights a `--model` names: a run folder, a bundle, a weights file, or nothing for the public prior."""
    if model is None:
        return public_prior()
    if model.is_file():
        return model
    for root in (model / "bundle", model):
        if (root / "configs" / "inference.yaml").is_file():
            return bundle_weights(root)
    if (model / WEIGHTS).is_file():
        return model / WEIGHTS
    raise SettingsError(f"--model {model}: expected a run folder, a bundle or a .safetensors file, found none of them")


def _candidates() -> Iterator[Path]:
    for argument in sys.argv[1:]:
        for piece in argument.partition("=")[2 if argument.startswith("--") else 0].strip("[]() ").split(","):
            path = Path(piece.strip(" '\""))
            if path.name == "inference.yaml":
                yield path.parent.parent
    yield from (Path(entry) for entry in sys.path if entry)
    yield Path.cwd()


def _metadata(provenance: Provenance, summary: Mapping[str, Any] | None, digest: str) -> dict[str, Any]:
    return {
        "version": provenance.version,
        "changelog": {provenance.version: f"{provenance.kind}, seed {provenance.seed}, written by fediod-med"},
        "monai_version": importlib.metadata.version("monai"),
        "pytorch_version": importlib.metadata.version("torch").partition("+")[0],
        "numpy_version": importlib.metadata.version("numpy"),
        "required_packages_version": {name: _version(name, provenance) for name in _PACKAGES},
        "data_source": f"{provenance.trained_on}; hospitals: {', '.join(provenance.sites) or 'none'}",
        "eval_metrics": {} if summary is None else {f"dice_{k}": float(summary[k]) for k in (*REGIONS, "mean")},
        "fediod": {
            "notice": NOT_FOR_CLINICAL_USE,
            "kind": provenance.kind,
            "network": dict(provenance.network),
            "working_spacing_mm": provenance.spacing,
            "label_scheme": provenance.label_scheme,
            "trained_on": provenance.trained_on,
            "sites": list(provenance.sites),
            "privacy": {site: dict(terms) for site, terms in provenance.privacy.items()},
            "privacy_banner": privacy_banner(provenance),
            "commit": provenance.commit,
            "seed": provenance.seed,
            "settings": dict(provenance.settings),
            "weights_sha256": digest,
        },
    }


def _version(package: str, provenance: Provenance) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return provenance.version


def _card(provenance: Provenance, summary: Mapping[str, Any] | None, evaluated_on: str, digest: str) -> dict[str, str]:
    network = provenance.network
    origin = {
        "Kind": provenance.kind,
        "Trained on": provenance.trained_on,
        "Hospitals": ", ".join(provenance.sites) or "none",
        "Network": f"{network['backbone']}, width {network['width']}, {network['depth']} levels",
        "Working grid": f"{provenance.spacing:g} mm, isotropic",
        "Software": f"fediod-med {provenance.version}, commit {provenance.commit or 'unknown'}",
        "Seed": str(provenance.seed),
        **{f"Setting `{name}`": f"{value}" for name, value in provenance.settings.items()},
    }
    return {
        "banner": privacy_banner(provenance),
        "scheme": provenance.label_scheme,
        "origin": "\n".join(f"| {name} | {value} |" for name, value in origin.items()),
        "scores": _score_text(summary, evaluated_on),
        "privacy": _privacy_text(provenance),
        "integrity": f"SHA-256 of `{WEIGHTS.as_posix()}`: `{digest}`.",
    }


def _score_text(summary: Mapping[str, Any] | None, evaluated_on: str) -> str:
    if summary is None:
        return "Not scored."
    columns = (*REGIONS, "mean")
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines.append("| Dice | " + " | ".join(f"{summary[c]:.3f}" for c in columns) + " |")
    if "ci95" in summary:
        cells = (f"{low:.3f} to {high:.3f}" for low, high in (summary["ci95"][c] for c in columns))
        lines.append("| 95 % interval | " + " | ".join(cells) + " |")
    if "hd95_mm" in summary:
        lines.append("| HD95, mm | " + " | ".join(f"{summary['hd95_mm'][c]:.1f}" for c in columns) + " |")
    for site, row in summary.get("sites", {}).items():
        if site:
            lines.append(f"| Dice at {site} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |")
    patients = f"{summary['patients']} patients: " if "patients" in summary else ""
    return f"{patients}{evaluated_on}. Absent regions count (both empty: Dice 1).\n\n" + "\n".join(lines)


def _privacy_text(provenance: Provenance) -> str:
    if not provenance.sites:
        return f"{privacy_banner(provenance)}."
    lines = [f"- {site}: {privacy_terms(provenance.privacy.get(site))}" for site in provenance.sites]
    return "The protected unit is the patient.\n\n" + "\n".join(lines)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
