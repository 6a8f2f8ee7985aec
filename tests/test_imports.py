"""Who may import whom: read from the source, so that no import need be run."""

import ast
import sys
from pathlib import Path

import pytest

import iresnet_jax

PACKAGE = Path(iresnet_jax.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

#: For each pure module, the modules of the library that it may import.
PURE = {
    "activations": set(),
    "convolution": set(),
    "iterations": set(),
    "fixed_point": {"iterations"},
    "logdet": set(),
    "russian_roulette": {"logdet"},
    "recomputation": {"convolution", "logdet"},
    "transforms": set(),
    "priors": set(),
    "actnorm": set(),
    "operators": {"convolution"},
    "spectral": {"operators"},
    "bounds": {"operators"},
    "rounding": {"operators"},
    "branches": {"activations", "bounds", "operators", "rounding"},
    "checks": set(),
    "residual": {
        "actnorm", "fixed_point", "logdet", "operators", "recomputation", "transforms",
    },
    "certificates": {"actnorm", "branches", "flows", "residual", "spectral", "transforms"},
    "flows": {
        "branches", "checks", "fixed_point", "logdet", "operators", "priors", "residual",
        "transforms",
    },
    "inverse_errors": {
        "actnorm", "fixed_point", "flows", "iterations", "residual", "rounding", "transforms",
    },
}  # fmt: skip

#: The Flax shell, lowest first: each may import what is above it in this list, and pure modules.
SHELL = ["layers", "blocks", "models", "classifier"]


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["iresnet_jax", *base.split(".")]).rstrip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def siblings(module: str) -> set[str]:
    """The library's modules that ``module`` imports; the package itself counts as all of them."""
    names = imported(PACKAGE / f"{module}.py")
    inner = {n.split(".")[1] for n in names if n.startswith("iresnet_jax.")} & set(MODULES)
    bare = "iresnet_jax" in names and not inner
    return inner | (set(MODULES) if bare else set())


def roots(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(PACKAGE / f"{module}.py")}


def test_every_module_has_its_place():
    assert {*PURE, *SHELL, "__init__"} == set(MODULES)


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_jax_and_numpy_alone(module):
    outside = roots(module) - set(sys.stdlib_module_names) - {"iresnet_jax"}
    assert outside <= {"jax", "numpy"}


@pytest.mark.parametrize(("module", "allowed"), PURE.items())
def test_pure_modules_import_only_those_below(module, allowed):
    assert siblings(module) <= allowed


@pytest.mark.parametrize("module", SHELL)
def test_the_shell_imports_only_those_below(module):
    assert siblings(module) <= {*PURE, *SHELL[: SHELL.index(module)]}
    assert "flax" in roots(module)


@pytest.mark.parametrize("module", MODULES)
def test_the_library_never_imports_programs_or_tests(module):
    assert not roots(module) & {"train", "tests", "benchmarks", "notebooks", "helpers"}


def test_the_reader_of_imports_sees_what_it_should(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import flax.linen as nn\n"
        "from . import layers\n"
        "from .models import ImageFlow\n"
        "def late():\n    from iresnet_jax import blocks\n"
    )
    names = imported(path)
    assert {"flax.linen", "iresnet_jax.layers", "iresnet_jax.models"} <= names
    assert "iresnet_jax.blocks" in names
