"""The wheel and the sdist: what is in them, and that an empty environment needs nothing else."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import iresnet_jax as ir

ROOT = Path(__file__).parents[1]
SNIPPET = "\n".join(
    re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[:3]
).replace("range(1000)", "range(20)")
LOADED = """
import iresnet_jax as ir, jax
digits = ir.load("digits")
images, info = digits.sample(jax.random.key(0), 2)
print(ir.__file__, digits.certificate.certified, images.shape, bool(info.converged.all()))
"""
#: mypy finds the one fault of the last line, where the types come with the package.
TYPED = """
import iresnet_jax as ir
fitted: ir.Fitted = ir.load("digits")
certified: bool = fitted.certificate.certified
wrong: str = ir.load("digits")
"""

pytestmark = pytest.mark.slow


def run(*command, folder):
    """Run a command in a folder that is not the checkout, without the checkout's path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment_at(folder):
    """The Python of a new, empty environment."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A Python with build, twine and mypy."""
    python = environment_at(tmp_path_factory.mktemp("tools") / "env")
    wanted = [python, "-m", "pip", "install", "--quiet", "build", "twine", "mypy"]
    if subprocess.run(wanted, capture_output=True).returncode:
        pytest.skip("pip cannot install build, twine and mypy: no package index is at hand")
    return python


@pytest.fixture(scope="module")
def built(tools, tmp_path_factory):
    """(wheel, sdist), by ``python -m build`` from a copy of what git tracks or would."""
    folder = tmp_path_factory.mktemp("built")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT)
    source = folder / "source"
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(tools, "-m", "build", "--outdir", folder / "dist", source, folder=folder)
    (wheel,), (sdist,) = (sorted((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A Python whose environment holds the wheel and what it depends on, nothing else."""
    python = environment_at(tmp_path_factory.mktemp("installed") / "env")
    run(python, "-m", "pip", "install", "--quiet", built[0], folder=python.parent)
    return python


def test_both_pass_the_check_of_the_index(tools, built):
    told = run(tools, "-m", "twine", "check", "--strict", *built, folder=built[0].parent)
    assert told.count("PASSED") == 2


def test_the_wheel_holds_the_library_alone(built):
    names = zipfile.ZipFile(built[0]).namelist()
    info = f"iresnet_jax-{ir.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"iresnet_jax", info}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "iresnet_jax").rglob("*.py")}
    assert here <= set(names)
    assert {"iresnet_jax/py.typed", f"{info}/licenses/LICENSE"} <= set(names)


def test_both_hold_the_models_with_their_cards(built):
    wheel = zipfile.ZipFile(built[0]).namelist()
    with tarfile.open(built[1]) as archive:
        sdist = [name.partition("/")[2] for name in archive.getnames()]
    for name in ir.shipped_models():
        files = {f"iresnet_jax/shipped/{name}.{end}" for end in ("safetensors", "md")}
        assert files <= set(wheel) and files <= set(sdist)


def test_the_sdist_holds_no_tests(built):
    """They need the programs and fixtures, which are in the checkout alone."""
    with tarfile.open(built[1]) as archive:
        assert not [name for name in archive.getnames() if "/tests/" in name]


def test_the_metadata_say_what_it_is(built):
    names = zipfile.ZipFile(built[0])
    path = next(name for name in names.namelist() if name.endswith("/METADATA"))
    told = names.read(path).decode()
    assert f"\nVersion: {ir.__version__}\n" in told
    for line in ("Classifier: Typing :: Typed", "License-Expression: MIT", "Requires-Dist: jax"):
        assert f"\n{line}" in told
    assert "\nProject-URL: Paper, https://arxiv.org/abs/1811.00995\n" in told


def test_the_first_minute(installed, tmp_path):
    """README's first snippets, and a model by its name, in an environment with the wheel alone."""
    (tmp_path / "readme.py").write_text(SNIPPET)
    float(run(installed, "readme.py", folder=tmp_path).splitlines()[-1])
    (tmp_path / "loaded.py").write_text(LOADED)
    told = run(installed, "loaded.py", folder=tmp_path)
    assert str(installed.parents[1]) in told and "True (2, 8, 8, 1) True" in told


def test_a_type_checker_sees_the_types(tools, installed, tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    checked = subprocess.run(
        [tools, "-m", "mypy", "--python-executable", installed, "typed.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = [line for line in checked.stdout.splitlines() if line.startswith("typed.py")]
    assert len(found) == 1 and found[0].startswith("typed.py:5: error: Incompatible types")
