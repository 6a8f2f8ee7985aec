"""What words and signs mean, on the terminal, on a run's page and on that of a comparison."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Term(NamedTuple):
    """A word or sign, and its meaning.

    Attributes:
      name: what is explained, as it is shown.
      meaning: with the name, no longer than a line of a terminal.
      more: what a page, which has room, adds.
    """

    name: str
    meaning: str
    more: str = ""

    @property
    def line(self) -> str:
        """The line on a terminal."""
        return f"{self.name}: {self.meaning}"

    @property
    def entry(self) -> tuple[str, str]:
        """Name and whole meaning, for :func:`train.page_parts.legend`."""
        return self.name, "; ".join(filter(None, (self.meaning, self.more)))


_LIPSCHITZ = "proved, of a branch g; below 1, its block is invertible"

BITS = Term(
    "bits/dim",
    "−log₂ p(x) per dimension; less is better",
    "of images an upper bound, in expectation over the dequantisation",
)
STDERR = Term(
    "± of bits/dim",
    "one standard error over noise and probes, test set fixed",
    "0 where neither is drawn",
)
BIAS = Term("bias ≤", "proved bound on the log-determinants' truncation bias, in bits/dim")
ACCURACY = Term("± of an accuracy", "half of Wilson's interval at one standard error")
DIFFERENCE = Term(
    "a difference",
    "beyond its errors if above two standard errors and the bias",
    "those are √(a² + b²), of the two runs, and the sum of both bounds on the bias. It is one "
    "between two trained networks: another seed may move either by more",
)

#: What rows of results hold -> what it means.
_IN_ROWS = {
    "test bits/dim": [BITS, STDERR],
    "bias ≤": [BIAS],
    "spread over": [Term("spread", "standard error for other test examples of the same kind")],
    "test accuracy": [ACCURACY],
    "AUROC": [Term("AUROC", "1 where all are told apart, 0.5 by chance")],
    "Lipschitz bound": [Term("Lipschitz bound", _LIPSCHITZ)],
    "reconstruction, max |error|": [
        Term(
            "reconstruction, max |error|",
            "of an entry, after the map to latents and back",
            "over the test examples that were mapped",
        )
    ],
    "error of the inverse, proved": [
        Term(
            "error of the inverse",
            "bound on ‖x − x*‖₂, x* the exact preimage of the latents",
            "over the examples that are named, or all that were mapped, and in the units of the "
            "network's input; vacuous where it is not below the diameter of the data",
        )
    ],
    "‖F(x) − z‖": [Term("‖F(x) − z‖", "how far from latents z their inverse x maps; the largest")],
}

#: Metrics of training -> what they mean.
_IN_TRAINING = {
    "sigma": Term("layer norm while training", "largest of all layers; the end has what is proved"),
    "flattery": Term("loss flatters by", "how much too good it looks; the most is not proved"),
}

#: What is shown of a likelihood while it is estimated.
LIKELIHOOD = STDERR, Term("± ?", "not known before the second draw"), BIAS

#: Columns of the bounds of blocks.
BLOCKS = (
    Term("L ≤", f"Lipschitz bound, {_LIPSCHITZ}"),
    Term("product ≤", "what L would be by the layers' bounds alone"),
    Term(
        "Lip ≤, inverse ≤",
        "proved Lipschitz bounds of the map and of its inverse",
        "of the network they are products, a worst case",
    ),
)
#: Columns of the bounds of layers.
LAYERS = (
    Term("norm ≈", "power iteration's estimate of the spectral norm, from below"),
    Term("norm ≤", "proved bound on the spectral norm"),
)
#: Further columns, where a layer's norm has a target.
TARGETS = (
    Term("target", "coeff, the largest norm that a layer may have"),
    Term("used", "estimate over target; the loosest layer uses least of what it may"),
)


def of_rows(rows: Sequence[tuple[str, str]]) -> list[Term]:
    """Return the terms in (what, value) rows."""
    text = "\n".join(f"{what} {value}" for what, value in rows)
    return [term for sign, terms in _IN_ROWS.items() if sign in text for term in terms]


def of_metrics(names: Iterable[str]) -> list[Term]:
    """Return the terms of metrics of training."""
    return [_IN_TRAINING[name] for name in names if name in _IN_TRAINING]
