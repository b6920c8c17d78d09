"""Weights with their provenance, and resumable state; written atomically, read without executing anything.

Weights travel as safetensors with a JSON header. A file without provenance is refused: sequences, label scheme,
spacing and privacy must be known before a network may touch a scan.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fediod_med import __version__
from fediod_med.durable import write_atomically
from fediod_med.errors import SettingsError, WeightsError
from fediod_med.labels import SEQUENCES
from fediod_med.networks import build_segmenter

_HEADER = "fediod_provenance"


@dataclass(frozen=True)
class Provenance:
    """Where weights come from and how they must be used; travels inside the weights file.

    Attributes:
        kind: `teacher`, `student`, `public prior` or `pooled`.
        network: keywords of `networks.build_segmenter` (`backbone`, `width`, `depth`, `in_channels`, `out_channels`).
        spacing: working grid, isotropic, mm.
        label_scheme: scheme that written label maps use by default.
        sites: hospitals behind the weights; empty for the public prior.
        privacy: per site `{"mode": ..., "epsilon": ..., "delta": ...}`.
        trained_on: `phantoms` or `patients`, in the words shown to users.
        version: of fediod-med.
        commit: of the source tree, where known.
        seed: of the run.
        settings: further numbers (steps, roi, ...), for the record.
        sequences: input channel order.
    """

    kind: str
    network: Mapping[str, Any]
    spacing: float
    label_scheme: str
    sites: tuple[str, ...]
    privacy: Mapping[str, Mapping[str, Any]]
    trained_on: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    commit: str | None = None
    sequences: tuple[str, ...] = SEQUENCES


def save_weights(path: Path, state_dict: Mapping[str, Tensor], provenance: Provenance) -> None:
    """Write weights and provenance as one safetensors file, atomically."""
    # Copies, because safetensors refuses names that share memory, and a DynUNet lists its blocks under two names.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    header = {_HEADER: json.dumps(asdict(provenance), sort_keys=True)}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=header)))


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values of weights, hex; the order of names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_provenance(path: Path) -> Provenance:
    """Provenance of a weights file, without reading the weights.

    Raises:
        WeightsError: no such file, not safetensors, or no provenance inside.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: expected a weights file, found nothing; give a run folder, bundle or .safetensors")
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path}: expected safetensors, found something else ({error})") from error
    if _HEADER not in header:
        raise WeightsError(f"{path}: expected weights with provenance, found none; use weights written by fediod")
    try:
        raw = json.loads(header[_HEADER])
        provenance = Provenance(**{**raw, "sites": tuple(raw["sites"]), "sequences": tuple(raw["sequences"])})
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: provenance cannot be read ({error}); written by another version?") from error
    if provenance.sequences != SEQUENCES:
        raise WeightsError(f"{path}: expected sequences {SEQUENCES}, found {provenance.sequences}")
    return provenance


def load_weights(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    """Weights (float32) and provenance; errors as in `read_provenance`."""
    provenance = read_provenance(path)
    with safe_open(path, framework="pt") as handle:
        weights = {name: handle.get_tensor(name).float() for name in handle.keys()}  # noqa: SIM118 (not a dict)
    return weights, provenance


def load_segmenter(path: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Provenance]:
    """Rebuild the network that a weights file describes, in evaluation mode on `device`.

    Only numbers are taken from the file: the architecture is one of `networks.BACKBONES`, no code or config travels.
    """
    weights, provenance = load_weights(path)
    try:
        network = build_segmenter(**provenance.network)
    except (SettingsError, TypeError) as error:
        raise WeightsError(f"{path}: describes a network that cannot be built ({error})") from error
    load_into(network, weights, path)
    return network.to(device).eval(), provenance


def load_into(network: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Load weights into a network; `WeightsError` when a name or shape differs."""
    try:
        network.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise WeightsError(f"{where}: the weights do not fit the network: {str(error).splitlines()[-1]}") from error


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write resumable training state (tensors, numbers, strings, nested), atomically; for its own process only."""
    write_atomically(path, lambda temporary: torch.save(dict(state), temporary))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; only tensors and plain values are unpickled.

    Raises:
        WeightsError: the file is damaged or holds anything else.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers raise
        raise WeightsError(f"{path}: expected training state, found something else; start the run again") from error
    return state


def current_commit() -> str | None:
    """Commit of the source tree that this package runs from, or `None` outside a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
