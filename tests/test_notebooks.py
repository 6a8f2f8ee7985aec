"""Every notebook runs as a script at smoke scale; the site has a place for all that is public.

To run them takes a minute: test_readme.py runs the same functions, and what a notebook takes from
them is looked up.
"""

import ast
import importlib
import re
import runpy
import types
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import iresnet_jax as ir

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
#: Packages that are in no extra that the tests need.
OPTIONAL = {"numpyro"}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def agg():
    """Figures are drawn, not shown; other tests do not see them."""
    before = plt.get_backend(), dict(plt.rcParams)
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before[0])
    plt.rcParams.update(before[1])


@pytest.mark.slow
@every_notebook
def test_notebook_runs(path, agg, monkeypatch):
    skip_without_its_packages(path)
    monkeypatch.setenv("IRESNET_JAX_SMOKE", "1")
    runpy.run_path(str(path))
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
        pixels = np.asarray(plt.figure(number).canvas.buffer_rgba())
        assert pixels.std() > 0, "an empty picture"


@every_notebook
def test_what_a_notebook_takes_from_packages_is_there(path):
    """All that it imports, and every attribute of a module: what a renaming breaks."""
    skip_without_its_packages(path)
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                modules[name.asname or name.name] = importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert hasattr(importlib.import_module(node.module), name.name), name.name
    used = [
        (module, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and (module := module_of(node.value, modules))
    ]
    assert len(used) > 10
    for module, name in used:
        assert hasattr(module, name), f"{module.__name__}.{name}"


def skip_without_its_packages(path):
    text = path.read_text(encoding="utf-8")
    for name in OPTIONAL & set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)):
        pytest.importorskip(name)


def module_of(node, modules):
    """The module that an expression names; None for any other."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if not isinstance(node, ast.Attribute) or (outer := module_of(node.value, modules)) is None:
        return None
    found = getattr(outer, node.attr, None)
    return found if isinstance(found, types.ModuleType) else None


@every_notebook
def test_notebook_says_what_the_reader_will_have(path):
    head = path.read_text(encoding="utf-8").split("# %%")[1]
    assert head.startswith(" [markdown]\n# # ")
    assert "# At the end you will " in head


def test_the_guide_has_every_notebook():
    listed = re.findall(r"^guide/(\w+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert listed == [path.stem for path in NOTEBOOKS]


def test_the_api_reference_has_every_module_and_public_name():
    """A module's page shows all that has a docstring."""
    page = (ROOT / "docs/api/index.md").read_text()
    modules = re.findall(r"^   iresnet_jax\.([\w.]+)$", page, re.MULTILINE)
    folder = ROOT / "iresnet_jax"
    paths = [path.relative_to(folder) for path in folder.rglob("*.py")]
    files = [".".join(path.with_suffix("").parts) for path in paths if path.stem != "__init__"]
    assert sorted(modules) == sorted(files), "docs/api/index.md lists every module once"
    # Data and aliases: the comment above them is shown; modules have pages of their own.
    data = {"ACTIVATIONS", "Branch", "BranchFactory", "Latents", "nn", "rounding"}
    public = [(ir, name) for name in ir.__all__] + [(ir.nn, name) for name in ir.nn.__all__]
    for place, name in public:
        if name in data:
            continue
        value = getattr(place, name)
        assert value.__module__.removeprefix("iresnet_jax.") in modules
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), (
            f"{name} needs a docstring"
        )
