"""What a hospital or the centre states in its own kit, out of reach of any job: `local/fediod.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fediod_med.errors import SettingsError
from fediod_med.plain_yaml import read_plain

PLAN_FILE = "local/fediod.yaml"


@dataclass(frozen=True)
class HospitalPlan:
    """A hospital's own settings; relative paths start at the kit.

    Attributes:
        site: folder with the hospital's `site.yaml`.
        data_root: overrides `dataset_dir` of the site file; omitted if empty.
        teachers: folder with the trained teacher (`<site>/model.safetensors` or `<site>/models/model.safetensors`);
            the folder that holds the site's folder, where `fediod site train` writes, when empty.
        state: where runs keep the discriminator and the replies that have left.
        device: see `devices.pick_device`.
        seed: of a discriminator without privacy.
    """

    site: Path
    data_root: Path | None
    teachers: Path
    state: Path
    device: str
    seed: int


@dataclass(frozen=True)
class CentrePlan:
    """The centre's own settings; relative paths start at the kit.

    Attributes:
        runs: folder of run folders.
        device: see `devices.pick_device`.
    """

    runs: Path
    device: str


def hospital_plan(kit: Path) -> HospitalPlan:
    """Read a hospital's plan.

    Raises:
        SettingsError: missing, unknown or unset keys; names the file and the key.
    """
    values = _read(kit, {"site": "", "data_root": "", "teachers": "", "state": "state", "device": "auto", "seed": "0"})
    if not values["site"]:
        raise SettingsError(f"{kit / PLAN_FILE}: expected key 'site', the folder of your site.yaml, found none; set it")
    site = _path(kit, values["site"])
    try:
        seed = int(values["seed"])
    except ValueError as error:
        raise SettingsError(f"{kit / PLAN_FILE}: seed: expected a whole number, found {values['seed']!r}") from error
    return HospitalPlan(
        site=site,
        data_root=_path(kit, values["data_root"]) if values["data_root"] else None,
        teachers=_path(kit, values["teachers"]) if values["teachers"] else site.parent,
        state=_path(kit, values["state"]),
        device=values["device"],
        seed=seed,
    )


def centre_plan(kit: Path) -> CentrePlan:
    """Read the centre's plan; errors as in `hospital_plan`."""
    values = _read(kit, {"runs": "runs", "device": "auto"})
    return CentrePlan(_path(kit, values["runs"]), values["device"])


def _read(kit: Path, defaults: dict[str, str]) -> dict[str, str]:
    path = kit / PLAN_FILE
    if not path.is_file():
        raise SettingsError(f"{path}: expected the settings of this kit, found nothing; provision it, or restore them")
    found = read_plain(path)
    unknown = [key for key in found if key not in defaults]
    if unknown:
        raise SettingsError(f"{path}: unknown key {unknown[0]!r}; known keys: {', '.join(defaults)}")
    return defaults | {key: "" if value is None else str(value) for key, value in found.items()}


def _path(kit: Path, value: str) -> Path:
    return (kit / Path(value).expanduser()).resolve()
