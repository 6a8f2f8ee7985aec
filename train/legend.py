"""What words and signs on the terminal mean, for those that are on it."""

from collections.abc import Iterable, Sequence

#: What rows of the final table hold -> what it means.
_IN_TABLES = {
    "test bits/dim": "±: one standard error over draws of noise and probes, these images fixed",
    "test accuracy": "±: one standard error, from the number of test images",
    "bias ≤": "bias ≤: proved; the log-determinant's series is off by no more on average",
    "spread over": "spread: the standard error for other test examples of the same kind",
    "Lipschitz bound": "Lipschitz bound: proved, of a block's branch; below 1 it has an inverse",
    "reconstruction": "reconstruction: an example against the inverse of its latents",
    "‖F(x) − z‖": "‖F(x) − z‖: how far the inverse x of latents z is from mapping to z again",
    "AUROC": "AUROC: 1 where all are told apart, 0.5 by chance",
}

#: Metrics of training -> what they mean.
_IN_TRAINING = {
    "sigma": "layer norm while training: largest of all layers; the end has what is proved",
    "flattery": "loss flatters by: how much too good the loss looks, and a proved bound on that",
}

#: What is shown of a likelihood while it is estimated.
LIKELIHOOD = (
    "±: standard error over draws, for these examples; it takes two draws",
    "bias ≤: proved; what the series leaves out is no more on average",
)


def of_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Explain what (what, value) rows hold."""
    text = "\n".join(f"{what} {value}" for what, value in rows)
    return [meaning for sign, meaning in _IN_TABLES.items() if sign in text]


def of_metrics(names: Iterable[str]) -> list[str]:
    """Explain metrics of training."""
    return [_IN_TRAINING[name] for name in names if name in _IN_TRAINING]
