"""Adapters without their packages: an error that says what to install, and no harm elsewhere."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = {"numpyro": ["numpyro"], "flowjax": ["flowjax", "equinox"], "distrax": ["distrax"]}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_cure(monkeypatch, name):
    for package in PACKAGES[name]:
        monkeypatch.setitem(sys.modules, package, None)  # which import takes for missing
    monkeypatch.delitem(sys.modules, f"iresnet_jax.interop.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {name}: pip install .*\[interop\]"):
        importlib.import_module(f"iresnet_jax.interop.{name}")


def test_the_library_imports_none_of_them():
    names = sorted({"blackjax", *(name for row in PACKAGES.values() for name in row)})
    code = f"import sys, iresnet_jax; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
