"""Who may import whom: read from the source, so that no import need be run."""

import ast
import functools
import inspect
import sys
from pathlib import Path

import pytest

import iresnet_jax
from iresnet_jax import nn

PACKAGE = Path(iresnet_jax.__file__).parent
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
}

#: Lowest first: each file imports from rows before its own alone, and stands in the first row where
#: it can.
ROWS = [
    "convergence frozen_vectors interop.nnx interop.optional model_cards model_files module_calls "
    "outward progress_bar types",
    "activations checks convolution gram_iteration iterations logdet neumann_gradients",
    "dequantization operators priors probes solvers",
    "fixed_point nn.dequantizer power_steps rounding series symbols",
    "bounds group_sort recomputation russian_roulette scaled_activation spectral statements swish",
    "interop.state_dicts nn.activations nn.constraints norm_proofs orthonormal",
    "interop.pytorch monlip_proofs stages",
    "affine_rows concatenation layer_walk monlip monlip_bounds nn.layers",
    "lipsdp_search monlip_iteration nn.orthonormal",
    "lipsdp nn.monlip",
    "certificates",
    "bijections saved_claims",
    "flows nn.branches residual stack",
    "conditional interop.densities inverse_errors monotone nn.concatenation transforms",
    "actnorm asinh interop.foreign mixing nn.monotone",
    "interop.distrax interop.flowjax interop.numpyro interop.residual_flows nn.stack tables",
    "fitting_conditions nn.variables",
    "fitting_data nn.gradients nn.models",
    "certification nn.classifier nn.conditional",
    "fitted fitting_models",
    "fitting_steps saved_models",
    "fitting_loop saving",
    "fitting",
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names.split()}

#: What knows nothing of networks, and can be used alone, with what it is used with.
ALONE = {
    "fixed_point": {"checks", "convergence", "iterations", "solvers", "types"},
    "russian_roulette": {
        *("checks", "iterations", "logdet", "neumann_gradients", "probes", "series", "types")
    },
    "series": {"checks", "logdet", "neumann_gradients", "probes", "types"},
    "spectral": {"convolution", "operators", "power_steps", "types"},
    "bounds": {"convolution", "gram_iteration", "operators", "symbols", "types"},
    "rounding": {"convolution", "operators", "types"},
    "priors": {"checks", "types"},
    "dequantization": {"checks", "types"},
}

#: Which packages of others the files import, beside JAX and NumPy.
FLAX = {name for name in MODULES if name.startswith("nn.")} | {
    *("certification", "interop.nnx", "interop.pytorch", "saved_models", "saving")
}
PACKAGES = {"flax", "jax", "jaxtyping", "numpy", "scipy"}
#: And those beside, which extras bring where the import is within a function.
OTHERS = {
    "fitting": {"optax"},
    "fitting_steps": {"optax"},
    "interop.distrax": {"distrax"},
    "interop.flowjax": {"equinox", "flowjax", "paramax"},
    "interop.numpyro": {"numpyro"},
    "model_files": {"huggingface_hub"},
    "interop.state_dicts": {"torch"},
    "progress_bar": {"rich", "tqdm"},
    "saving": {"safetensors"},
}
#: What joins networks as pytrees with the models that store them.
DOORS = {
    *("certification", "fitted", "fitting", "fitting_loop", "fitting_models"),
    "fitting_steps",
    *("saved_models", "saving"),
}


def imported(path: Path, package: str = "iresnet_jax") -> set[str]:
    """Full names of all modules that a file imports, wherever in it; relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *base.split(".")]).rstrip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def names_of(module: str) -> set[str]:
    package = "iresnet_jax.nn" if module.startswith("nn.") else "iresnet_jax"
    return imported(MODULES[module], package)


@functools.cache
def siblings(module: str) -> set[str]:
    """The library's files that ``module`` imports."""
    return {name for name in MODULES if f"iresnet_jax.{name}" in names_of(module)}


def roots(module: str) -> set[str]:
    return {name.split(".")[0] for name in names_of(module)}


@functools.cache
def below(module: str) -> set[str]:
    """All that ``module`` imports, and what that imports."""
    direct = siblings(module)
    return direct.union(*map(below, direct))


def test_every_file_has_its_place():
    assert {*ROW, "__init__", "interop.__init__", "nn.__init__"} == set(MODULES)
    assert sum(len(row.split()) for row in ROWS) == len(ROW)


@pytest.mark.parametrize("module", ROW)
def test_files_import_from_rows_before_their_own(module):
    highest = max((ROW[name] for name in siblings(module)), default=-1)
    assert ROW[module] == highest + 1, f"the first row for {module} is {highest + 1}"


@pytest.mark.parametrize("module", ROW)
def test_only_what_stores_weights_imports_flax(module):
    outside = roots(module) - set(sys.stdlib_module_names) - {"iresnet_jax"}
    own = PACKAGES | OTHERS.get(module, set())
    assert outside <= (own if module in FLAX else own - {"flax"})
    assert ("flax" in outside) == (module in FLAX)


@pytest.mark.parametrize("module", ROW)
def test_what_computes_does_not_import_what_stores(module):
    """Certificates of models, and fits, are the doors between the two."""
    stores = {name for name in siblings(module) if name.startswith("nn.")}
    assert not stores or module.startswith("nn.") or module in DOORS


@pytest.mark.parametrize("module", ROW)
def test_no_file_imports_the_package_itself(module):
    """Which holds all names: an arrow to everything."""
    assert not names_of(module) & {"iresnet_jax", "iresnet_jax.nn"}


@pytest.mark.parametrize("module", [name for name in MODULES if "interop." not in name])
def test_adapters_to_other_packages_are_imported_by_their_users_alone(module):
    assert not any(name.startswith("interop.") for name in siblings(module))


@pytest.mark.parametrize(("module", "allowed"), ALONE.items())
def test_what_can_be_used_alone_needs_no_network(module, allowed):
    assert below(module) == allowed


@pytest.mark.parametrize("module", MODULES)
def test_the_library_never_imports_programs_or_tests(module):
    assert not roots(module) & {"train", "tests", "benchmarks", "notebooks", "helpers"}


@pytest.mark.parametrize("package", [iresnet_jax, nn], ids=lambda package: package.__name__)
def test_what_a_package_imports_it_exports_and_in_order(package):
    """Whatever is imported into it is in ``__all__``, once and sorted, and can be had."""
    path = Path(package.__file__)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases = [a for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert {alias.asname or alias.name for alias in aliases} == set(package.__all__)
    assert package.__all__ == sorted(set(package.__all__))
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize("package", [iresnet_jax, nn], ids=lambda package: package.__name__)
def test_what_a_package_exports_says_what_it_is(package):
    things = {name: getattr(package, name) for name in package.__all__}
    for name, thing in things.items():
        if inspect.isclass(thing) or inspect.isfunction(thing):
            written = thing.__doc__ and not thing.__doc__.startswith(f"{name}(")  # of a dataclass
            assert written, name


def aliases_of(module: str) -> dict[str, str]:
    """Names that a file gives to types, such as ``Batch``, and what they stand for."""
    body = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
    pairs = [(node.targets[0], node.value) for node in body if isinstance(node, ast.Assign)]
    return {
        ast.unparse(name): ast.unparse(kind)
        for name, kind in pairs
        if ast.unparse(name)[0].isupper() and isinstance(kind, ast.Subscript | ast.BinOp)
    }


def test_the_picture_in_contributing_has_these_rows():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("```text")[1].split("```")[0].splitlines()
    drawn = [line.replace(",", " , ").split() for line in picture]
    lines = [set(line) for line in drawn if ROW.keys() & set(line)]
    assert [ROW.keys() & line for line in lines] == [set(row.split()) for row in ROWS[::-1]]


def test_a_name_of_a_type_means_one_thing():
    """And what all share is in ``types`` alone."""
    pairs = {pair for module in ROW for pair in aliases_of(module).items()}
    names = [name for name, _ in pairs]
    assert sorted(names) == sorted(set(names))
    shared = aliases_of("types")
    assert {"Batch", "Keys", "Shape"} <= set(shared)
    assert not any(set(shared) & set(aliases_of(module)) for module in ROW if module != "types")


def test_the_reader_of_imports_sees_what_it_should(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import flax.linen as nn\n"
        "from . import layers\n"
        "from .models import ImageFlow\n"
        "from ..stages import Affine\n"
        "def late():\n    from iresnet_jax import blocks\n"
    )
    names = imported(path, "iresnet_jax.nn")
    assert {"flax.linen", "iresnet_jax.nn.layers", "iresnet_jax.nn.models"} <= names
    assert {"iresnet_jax.stages", "iresnet_jax.blocks"} <= names
    assert "iresnet_jax.layers" in imported(path)
