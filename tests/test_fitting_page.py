"""The code of docs/FITTING.md runs as it stands, from top to bottom."""

import re
from pathlib import Path

import numpy as np
import pytest

import iresnet_jax as ir

PAGE = (Path(__file__).parents[1] / "docs/FITTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
#: Enough to see that it works; a reader takes them all.
FEWER = {
    "None, data)": "None, data, max_epochs=12)",
    "None, heavy)": "None, heavy, max_epochs=2)",
    "None, y, condition=x)": "None, y, condition=x, max_epochs=40)",
}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the page's code defines."""
    defined = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for code in BLOCKS:
            for many, few in FEWER.items():
                code = code.replace(many, few)
            exec(compile(code.replace("range(500)", "range(60)"), "FITTING.md", "exec"), defined)
    return defined


def test_the_shortened_calls_are_on_the_page():
    assert all(PAGE.count(call) == 1 for call in FEWER)


@pytest.mark.slow
def test_the_table_is_fitted_and_certified(names):
    """Better than a Gaussian, in the units of the data."""
    gaussian = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * np.cov(names["data"].T)))
    assert names["history"].final < gaussian - 0.1
    assert names["fitted"].certificate.certified and names["samples"].shape == (500, 2)


@pytest.mark.slow
def test_heavy_tails_are_certified_without_a_constant_of_the_inverse(names):
    certificate = names["fitted_tails"].certificate
    assert certificate.certified and certificate.inverse == np.inf


@pytest.mark.slow
def test_what_is_loaded_is_the_same(names):
    np.testing.assert_array_equal(names["same"].log_prob(names["data"]), names["log_prob"])


@pytest.mark.slow
def test_the_condition_is_learned(names):
    """Better than any density that does not see it."""
    assert names["conditional"].certificate.certified and names["draws"].shape == (100, 5, 1)
    assert isinstance(names["at_one"], ir.Flow)
    unconditional = 0.5 * np.log(2 * np.pi * np.e * names["y"].var())
    assert -float(names["nats"].mean()) < unconditional - 0.2


@pytest.mark.slow
def test_the_images_are_learned(names):
    assert names["certificate"].certified
    labels, log_prob = names["labels"], names["at_embeddings"].log_prob
    unconditional = 0.5 * np.log(2 * np.pi * np.e * labels.var())
    assert -float(log_prob(labels, names["embedding"]).mean()) < unconditional - 0.2
