"""Public names: each has a docstring, `__all__` tells the truth, and the version is written once."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import fediod_med

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fediod_med"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "bundles" not in path.relative_to(PACKAGE).parts)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def undocumented(body: list[ast.stmt], prefix: str = "") -> list[str]:
    """Public functions, classes and methods without a docstring; bodies of functions are private."""
    found = []
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if ast.get_docstring(node) is None and not decorators & {"overload", "override"}:
            found.append(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            # `forward` of a network is described by its class; the name is torch's.
            found += [name for name in undocumented(node.body, f"{node.name}.") if not name.endswith(".forward")]
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name}: the first docstring line states the file's one job"
    assert undocumented(tree.body) == []


def test_every_listed_name_exists() -> None:
    for path in FILES:
        if "__all__" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(module_name(path))
            assert [name for name in module.__all__ if not hasattr(module, name)] == [], path.name
            assert len(set(module.__all__)) == len(module.__all__), path.name


def test_the_wheel_carries_every_module() -> None:
    """The build leaves out what git ignores; a rule for run folders must not meet a package of that name."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling, which builds the package")
    carried = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {path.relative_to(ROOT).as_posix() for path in FILES} <= carried


def test_version_is_the_installed_one() -> None:
    try:
        installed = importlib.metadata.version("fediod-med")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fediod-med is not installed in this environment, only importable")
    assert fediod_med.__version__ == installed, "the version was raised after the install: run `make venv`"


def test_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "fediod_med/__init__.py"
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited.group(1) == fediod_med.__version__


def test_every_requirement_is_pinned_and_every_pin_is_exact() -> None:
    def canonical(requirement: str) -> str:
        found = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert found is not None
        return re.sub(r"[-_.]+", "-", found.group()).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {canonical(r) for r in project["dependencies"]}
    asked |= {canonical(r) for extra in project["optional-dependencies"].values() for r in extra}
    asked.discard("fediod-med")  # one extra takes in another
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert asked <= {canonical(pin) for pin in pins}
