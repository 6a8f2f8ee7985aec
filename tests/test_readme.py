"""The README's code runs as it stands, and its jobs take no more lines than they say."""

import ast
import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import iresnet_jax as ir

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(?:<!-- (?P<job>[^>]*): (?P<lines>\d+) lines -->\n)?```python\n(?P<code>.*?)```", re.S
)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]
#: Enough to see that it works; a reader takes them all.
FEWER = {"range(1000)": "range(60)", "range(50)": "range(2)"}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b["job"]], ids=lambda block: block["job"])
def test_a_job_takes_no_more_lines_than_it_says(block):
    lines = [line.strip() for line in block["code"].splitlines()]
    counted = [line for line in lines if line and not line.startswith(("import ", "from ", "#"))]
    assert len(counted) <= int(block["lines"])


def test_there_are_five_jobs():
    assert [int(block["lines"]) for block in BLOCKS if block["job"]] == [12, 12, 4, 4, 4]


def test_all_names_of_the_library_exist():
    used = {
        ast.unparse(node)
        for block in BLOCKS
        for node in ast.walk(ast.parse(block["code"]))
        if isinstance(node, ast.Attribute)
    }
    of_library = {name for name in used if name.startswith("ir.")}
    assert len(of_library) > 10
    for name in of_library:
        assert functools.reduce(getattr, name.split(".")[1:], ir) is not None


@pytest.fixture(scope="module")
def names():
    """What the README's code defines, run from top to bottom."""
    defined = {"__name__": "readme"}
    for block in BLOCKS:
        code = block["code"]
        for many, few in FEWER.items():
            code = code.replace(many, few)
        exec(compile(code, "README.md", "exec"), defined)
    return defined


@pytest.mark.slow
def test_the_density_learns_and_is_certified(names):
    flow, x = names["flow"], names["x"]
    gaussian = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * np.cov(np.asarray(x).T)))
    assert float(-jax.jit(flow.log_prob)(x).mean()) < gaussian - 0.2
    assert names["certificate"].certified
    assert float(names["info"].error_bound.max()) <= 1e-3
    np.testing.assert_allclose(names["back"], x, atol=1e-3)


@pytest.mark.slow
def test_one_example_and_a_batch_agree(names):
    np.testing.assert_allclose(names["one"], names["batch"][0], atol=1e-4)
    np.testing.assert_allclose(names["mapped"], names["batch"], atol=1e-4)
    assert names["estimate"].shape == names["batch"].shape


@pytest.mark.slow
def test_the_classifier_inverts(names):
    np.testing.assert_allclose(names["recovered"], names["images"], atol=1e-4)


@pytest.mark.slow
def test_blocks_in_ones_own_model_are_trained_and_certified(names):
    net, x = names["net"], names["x"]
    trained = ir.nn.shrink(net, ir.nn.converge(net, names["net_variables"], x), x)
    certificate = ir.certify(net, trained, x)
    assert certificate.certified and len(certificate.blocks) == 4
