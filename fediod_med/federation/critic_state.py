"""Reads the discriminators of a run from where its critics rest them, for whoever audits the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fediod_med.checkpoints import load_into, load_state
from fediod_med.errors import WeightsError
from fediod_med.networks import PatchDiscriminator

SITE_STATE = "site_state"
STUDENT = "student"  # the distillation of a run that has discriminators


def stored_discriminators(
    run: Path, sites: Sequence[str], *, width: int = 16, layers: int = 2, norm: str = "INSTANCE"
) -> tuple[dict[str, PatchDiscriminator], list[str]]:
    """The last state of each site's discriminator.

    Args:
        run: folder with `run_id` and `site_state/<site>/`.
        sites: names.
        width: channels of the first layer, as in `critic.PlainCritic` and `critic.PrivateCritic`.
        layers: strided layers, as there.
        norm: as there.

    Returns:
        Discriminators in evaluation mode, on the CPU, by site; and for each site without one, why.

    Raises:
        WeightsError: a state is damaged, or belongs to a discriminator of other sizes.
    """
    found, absent = {}, []
    for site in sites:
        home = run / SITE_STATE / site
        path = _newest_private(home) or _newest_plain(home, run / "run_id")
        if path is None:
            absent.append(f"{site}, discriminator: {home} holds no state of this run's discriminator")
            continue
        discriminator = PatchDiscriminator(width=width, layers=layers, norm=norm)
        load_into(discriminator, _weights(load_state(path), path), path)
        found[site] = discriminator.eval()
    return found, absent


def _newest_private(home: Path) -> Path | None:
    """State of a discriminator with a permit; a run whose plan was changed in between has two, and the last counts."""
    return max(home.glob("discriminator-*.pt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def _newest_plain(home: Path, run_id: Path) -> Path | None:
    """Snapshot of the last round that the run's centre has kept; without the run's id, none can be told from others."""
    if not run_id.is_file():
        return None
    return max(home.glob(f"{run_id.read_text(encoding='utf-8').strip()}-{STUDENT}-round-*.pt"), default=None)


def _weights(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Weights of a private (`training`, `network`) or plain (`discriminator`) state."""
    weights = state["training"].get("network") if "training" in state else state.get("discriminator")
    if not isinstance(weights, Mapping):
        raise WeightsError(f"{path}: expected the state of a discriminator, found {', '.join(map(str, state))}")
    return weights
