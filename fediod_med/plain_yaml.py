"""Reads a YAML file as plain data: flat scalars, nothing that could act as configuration code."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fediod_med.errors import SettingsError


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML file that may hold flat scalars only.

    Raises:
        SettingsError: names the file and the key that is nested, repeated, or could act as code.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: expected YAML with one `key: value` a line ({error})") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    for key, value in values.items():
        name = str(key)
        if not isinstance(key, str) or name.startswith(("_", "+", "$", "%", "@")) or "#" in name or "::" in name:
            raise SettingsError(f"{path}: key {name!r} is not allowed: a site file is data, not configuration code")
        if isinstance(value, dict | list):
            raise SettingsError(f"{path}: key {name!r}: expected one value, found a {type(value).__name__}")
        if isinstance(value, str) and not is_plain(value):
            raise SettingsError(f"{path}: key {name!r}: values starting with $, % or @ are not allowed: {value!r}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of repeated keys without complaint; this loader refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As in `SafeLoader`, each key once."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated!r} appears twice", node.start_mark)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def is_plain(value: str) -> bool:
    """Whether a text is nothing that a configuration reader would act on."""
    return not value.lstrip().startswith(("$", "%", "@"))
