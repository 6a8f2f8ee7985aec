"""docs/INTEROP.md: its snippets run, each section after the first."""

import re
import sys
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "INTEROP.md").read_text(encoding="utf-8")
FIRST, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)


def snippets(section):
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_the_table_of_versions_names_what_is_installed_where_they_are_tested():
    """Every package of the extra is in the table."""
    extra = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"(\w+)>=', extra.split("interop = [")[1].split("]")[0])
    header = next(line for line in TEXT.splitlines() if line.startswith("| jax"))
    assert set(listed) <= set(re.findall(r"\w+", header))


@pytest.mark.parametrize(
    "section", [*filter(snippets, SECTIONS)], ids=lambda text: text.splitlines()[0]
)
def test_its_snippets_run(section, capsys):
    code = snippets(FIRST) + snippets(section)
    assert len(code) > 1
    for package in ("numpyro", "flowjax", "distrax", "equinox", "blackjax"):
        if re.search(rf"^(import|from) {package}", "\n".join(code), re.MULTILINE):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TensorFlow Probability
                pytest.importorskip(package)
    module = type(sys)("document")
    for snippet in code:
        exec(compile(snippet, "INTEROP.md", "exec"), module.__dict__)
    assert "False" not in capsys.readouterr().out  # where it prints whether something is certified
