"""Model cards: what is told of a model, as a page in Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

_ERRORS = ("bits_per_dim_stderr", "bits_per_dim_bias_bound", "bits_per_dim_sampling_stderr")


def model_card(about: Mapping[str, Any], *, certified: bool) -> str:
    """Return the model card that ``about`` makes, in Markdown.

    Single entries make a list, entries that are mappings a table each, under their names. The list
    begins with the verdict of the certificate, and with the likelihood where ``about["results"]``
    has one, as value ± standard error (bias ≤ certified bound).

    Args:
      about: what is told of the model, as JSON holds it.
      certified: whether the network is proved to be invertible.
    """
    verdict = "proved of the weights as loaded" if certified else "NOT proved"
    single = {name: value for name, value in about.items() if not isinstance(value, Mapping)}
    results = about.get("results")
    rows = {
        "invertible": verdict,
        **(_likelihood(results) if isinstance(results, Mapping) else {}),
        **single,
    }
    lines = ["# Model card", "", *(f"- {_name(name)}: {_told(v)}" for name, v in rows.items())]
    for name, value in about.items():
        if isinstance(value, Mapping):
            lines += ["", f"## {_name(name).capitalize()}", "", *_table(value)]
    return "\n".join(lines) + "\n"


def _likelihood(results: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(results.get(name), float) for name in ("bits_per_dim", *_ERRORS)):
        return {}
    stderr, bias, sampling = (f"{results[name]:.2g}" for name in _ERRORS)
    told = f"{results['bits_per_dim']:.4f} ± {stderr} (bias ≤ {bias})"
    return {"held-out bits/dim": f"{told}; ± {sampling} over the choice of examples"}


def _table(rows: Mapping[str, Any]) -> Iterator[str]:
    yield "| | |"
    yield "| --- | --- |"
    for name, value in rows.items():
        yield f"| {_name(name)} | {_told(value)} |"


def _name(name: str) -> str:
    return name.replace("_", " ")


def _told(value: Any) -> str:
    """A value on one line, without what Markdown takes for the end of a cell."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_told, value)) or "nothing"
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(name)} {_told(entry)}" for name, entry in value.items())
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
