"""docs/CHOOSING.md: its table of terms is what the library computes; its links lead somewhere."""

import math
import re
from pathlib import Path

import pytest

import iresnet_jax as ir

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "CHOOSING.md").read_text(encoding="utf-8")


def table():
    """(L, (bias in bits/dim, terms) …, evaluations) of each row."""
    header, _, *lines = TEXT.split("\n| L | b = ")[1].splitlines()
    biases = [float(b) for b in re.findall(r"1e-\d", header)]
    rows = [
        [cell.strip().replace(",", "") for cell in line.split("|")[1:-1]]
        for line in lines[: lines.index("")]
    ]
    return [(float(row[0]), dict(zip(biases, map(int, row[1:-1]), strict=True)), int(row[-1]))
            for row in rows]  # fmt: skip


@pytest.mark.parametrize("dim", [1, 784])
def test_the_terms_are_the_librarys(dim):
    rows = table()
    assert [row[0] for row in rows] == [0.5, 0.7, 0.9, 0.95, 0.99]
    for lipschitz, terms, _ in rows:
        assert len(terms) == 4
        for bias, told in terms.items():
            estimator = ir.BoundedSeries(bias=bias * math.log(2) * dim)
            assert int(estimator.num_terms(lipschitz, dim)) == told


def test_so_many_terms_suffice_and_one_less_does_not():
    """By the formula that the page states, in float64."""
    for lipschitz, terms, _ in table():
        bound = lambda n, L=lipschitz: L ** (n + 1) / ((n + 1) * (1 - L) * math.log(2))  # noqa: E731
        for bias, told in terms.items():
            assert bound(told) <= bias < bound(told - 1)


def test_the_evaluations_are_those_of_banachs_rate():
    for lipschitz, _, told in table():
        assert lipschitz ** (told - 1) <= 1e-5 < lipschitz ** (told - 2)


@pytest.mark.parametrize("page", ["CHOOSING.md", "FROM_PYTORCH.md"])
def test_links_lead_to_headings(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!http)([\w.]+)#?([\w-]*)\)", text):
        headings = re.findall(r"^#+ (.*)$", (DOCS / target).read_text(encoding="utf-8"), re.M)
        slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert not anchor or anchor in slugs, (target, anchor)
