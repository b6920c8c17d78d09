"""The direction of imports, and which module may use which heavy package.

`LAYERS` is the architecture, top to bottom, written once. A module may import the package's modules of lower layers
only: never up, never sideways. Imports inside functions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fediod_med"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),  # `python -m fediod_med`
    ("cli",),
    ("federation.flare",),  # a run over an engine: the centre on its server, a hospital at each site
    ("experiments",),  # classification and the paper's open questions, from the parts below
    # whole-run procedures: the demo, the folder of a distillation run; every row on the same patients; reviewing
    ("runs", "comparison", "review"),
    ("segmentation",),  # new scans: read, checked, segmented, written
    ("case_report",),
    ("reporting", "audit_figures", "export"),
    ("synthetic_report",),  # the generator's volumes, judged
    ("hospitals", "pooled", "canaries"),  # the hospitals of an embedded run, opened; their mechanisms, audited
    (
        "evaluation",
        "teacher",
        "distillation",
        "baselines",
        "prior",
        "auditing",
        "claims",
        "federation.embedded",
    ),
    ("federation.node", "private_teacher"),
    ("federation.critic", "federation.critic_state", "site_gate"),
    ("quality", "snapshots", "synthetic_quality", "image_features", "federation.critic_losses"),
    ("inference", "sites", "checks", "dicom", "data.sampler", "coregister", "preprocess", "federation.critic_networks"),
    ("data.transforms", "data.phantoms", "data.itk_formats", "rigid", "sliding", "records"),
    ("data.nifti", "data.partitions", "checkpoints", "ensemble", "lesions", "lesionwise", "uncertainty", "parallel"),
    ("data.layouts", "data.scans", "networks", "losses", "metrics", "devices", "privacy"),
    ("findings",),
    (
        "data.grids",
        "durable",
        "federation.augmentation",
        "federation.critic_design",
        "labels",
        "pipeline",
        "plain_yaml",
        "progress",
        "protocol",
        "resources",
    ),
    ("encodings",),
    ("errors",),
)
SIBLINGS_ALLOWED = (
    "cli",
    "privacy",
    "checks",
    "dicom",
    "review",
    "segmentation",
    "comparison",
    "data.nifti",
    "distillation",
    "experiments",
    "federation.flare",
    "reporting",
    "runs",
)  # packages whose files are one unit

# Packages that are heavy, optional or part of one boundary only, and the modules that may import them.
HOMES: dict[str, tuple[str, ...]] = {
    "highdicom": ("dicom",),
    "itk": ("dicom",),
    "matplotlib": ("reporting", "audit_figures", "case_report", "comparison"),
    "nilearn": ("data.phantoms",),
    "nvflare": ("federation.flare",),
    "opacus": ("privacy",),
    "pydicom": ("dicom",),
    "rich": ("cli", "reporting"),
    "safetensors": ("checkpoints", "protocol", "comparison"),
    "sklearn": ("experiments",),
    "streamlit": (),
    "typer": ("cli",),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc"}
OUTSIDE = {"apps", "bundles", "sites", "tests", "benchmarks"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if "bundles" not in path.relative_to(PACKAGE).parts)


def module_name(path: Path) -> str:
    """Dotted name below `fediod_med`; the empty string for its own `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}
CODE = [path for path in FILES if path.name != "__init__.py"]


def listed_prefix(module: str) -> str | None:
    """The longest listed name that `module` is, or lies in."""
    names = [name for layer in LAYERS for name in layer if module == name or module.startswith(f"{name}.")]
    return max(names, key=len, default=None)


def rank(listed: str) -> int:
    """Height of a listed name: 1 for the lowest layer."""
    return next(len(LAYERS) - i for i, layer in enumerate(LAYERS) if listed in layer)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a tree imports, each with its line; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write `from fediod_med... import ...`"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield str(node.args[0].value), node.lineno


def internal_imports(tree: ast.AST, modules: Collection[str]) -> Iterator[tuple[str, int]]:
    """Names below `fediod_med` that a tree imports, cut to one of `modules`, each with its line."""
    for name, line in imports(tree):
        if name.partition(".")[0] == "fediod_med" and name != "fediod_med.__version__":
            below = name.removeprefix("fediod_med").removeprefix(".")
            # `from fediod_med.data.layouts import Subject` arrives as data.layouts.Subject.
            while below and below not in modules:
                below = below.rpartition(".")[0]
            yield below, line


def violations(module: str, tree: ast.AST, modules: Collection[str] = MODULES) -> list[str]:
    """What breaks the direction of imports in one module; empty when nothing does."""
    own = listed_prefix(module)
    if own is None:
        return [f"{module} has no layer: add it to LAYERS in tests/test_layers.py, as low as it can stand"]
    found = []
    for target, line in internal_imports(tree, modules):
        listed = listed_prefix(target)
        if listed is None:
            found.append(f"line {line}: imports from a package's __init__ ({target or 'fediod_med'}); name the module")
        elif rank(listed) >= rank(own) and not (listed == own and own in SIBLINGS_ALLOWED):
            found.append(f"line {line}: {module} (layer {rank(own)}) imports {target} (layer {rank(listed)})")
    return found


@pytest.mark.parametrize("path", CODE, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    found = violations(module_name(path), parse(path))
    assert not found, "\n".join([str(path), *found])


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("sites", "from fediod_med.labels import REGIONS", []),
        ("sites", "from fediod_med import __version__", []),
        ("labels", "from fediod_med.sites import Site", [f"labels (layer {rank('labels')}) imports sites"]),
        ("labels", "def f():\n    import fediod_med.sites", ["line 2: labels"]),
        (
            "labels",
            "if TYPE_CHECKING:\n    from fediod_med import sites",
            [f"labels (layer {rank('labels')}) imports sites"],
        ),
        ("labels", "import_module('fediod_med.sites')", [f"labels (layer {rank('labels')}) imports sites"]),
        (
            "teacher",
            "from fediod_med.evaluation import evaluate",
            [f"teacher (layer {rank('teacher')}) imports evaluation"],
        ),
        ("privacy.ledger", "from fediod_med.privacy.accounting import epsilon", []),
        ("sites", "from fediod_med import Site", ["imports from a package's __init__ (fediod_med)"]),
        ("sites", "from fediod_med.data import Subject", ["imports from a package's __init__ (data)"]),
        ("data.novelty", "", ["data.novelty has no layer"]),
    ],
)
def test_the_rule_finds_what_it_must(module: str, code: str, expected: list[str]) -> None:
    modules = {"sites", "labels", "evaluation", "privacy.accounting", "data"}
    found = violations(module, ast.parse(code), modules)
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="relative import"):
        violations("labels", ast.parse("from . import sites"))


def test_no_module_is_listed_twice() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: module_name(p) or "root")
def test_package_files_import_nothing_when_loaded(path: Path) -> None:
    """A package's `__init__` may load names on first use, inside a function; at import it loads nothing."""
    statements = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    # The root may take its lazy-loading machinery and its typing names from the standard library.
    loaded = {
        name.partition(".")[0]
        for node in statements
        for name, _ in imports(ast.Module([node], []))
        if name != "fediod_med.__version__"
    }
    assert loaded <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_names_say_their_job(path: Path) -> None:
    assert not FORBIDDEN_NAMES & set(module_name(path).split("."))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_stay_in_their_home(path: Path) -> None:
    module, own = module_name(path), listed_prefix(module_name(path))
    strays = [
        f"line {line}: {name}"
        for name, line in imports(parse(path))
        if (top := name.partition(".")[0]) in HOMES and own not in HOMES[top]
    ]
    assert not strays, f"{module}: {strays}; homes: {HOMES}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_package_imports_nothing_that_lies_beside_it(path: Path) -> None:
    assert not {name.partition(".")[0] for name, _ in imports(parse(path))} & OUTSIDE


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_unpickles(path: Path) -> None:
    """No pickle anywhere: tensors travel and rest as safetensors, and `torch.load` reads weights only."""
    tree = parse(path)
    assert not {name.partition(".")[0] for name, _ in imports(tree)} & FORBIDDEN_MODULES
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if ast.unparse(call.func) == "torch.load":
            assert options.get("weights_only") == "True", f"line {call.lineno}: torch.load without weights_only=True"
        assert options.get("allow_pickle", "False") == "False", f"line {call.lineno}: allow_pickle"


@pytest.mark.parametrize("path", CODE, ids=module_name)
def test_nothing_prints(path: Path) -> None:
    calls = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, f"print() in lines {lines}: raise, log, or return what cli/ is to say by typer.echo"


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = ("torch", "monai", "numpy", "nibabel", "matplotlib", "scipy", "rich", "typer")
    code = f"import sys, fediod_med; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
