"""``report.html``: a run in one file, to look at, on a desk, on a phone, and in print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.configs.base import TrainingConfig
from train.legend import of_rows
from train.page_bounds import bounds
from train.page_curves import curves
from train.page_parts import (
    Child,
    Html,
    details,
    element,
    figure,
    joined,
    legend,
    pairs,
    picture,
    section,
    table,
    write_html,
)
from train.page_settings import command, settings, written
from train.page_verdict import stopped, verdict, warnings
from train.report import inversion_rows, origin_rows

#: Pictures that a run may leave -> section, what is read aloud, caption.
_PICTURES = {
    "samples.png": (
        "Samples",
        "Two grids of images: samples of the model, and held-out data",
        "Left: drawn from the model, by mapping latents of the prior through the inverse, none "
        "chosen. Right: as many images of the test set.",
    ),
    "density.png": (
        "Samples",
        "Points of the data, and samples of the model; in the plane, its density between them",
        "Test data; the density of the model, where the data lie in the plane; samples, none "
        "chosen.",
    ),
    "reconstructions.png": (
        "Reconstructions",
        "Rows of images: originals, their reconstructions, and the error between them",
        "Test images, the same after the map to latents and back, and the difference between them.",
    ),
    "inversion.png": (
        "Reconstructions",
        "Two rows of images: those classified, and those recovered from their features",
        "Test images, and the same recovered from the classifier's features, with the predicted "
        "classes.",
    ),
    "walk.png": (
        "A walk through the latents",
        "Paths between test examples, along great circles of the latents, mapped back to data",
        "From one test example to another, along the great circle between their latents, mapped "
        "back by the inverse.",
    ),
}  # fmt: skip
_REPEATS = (
    "This command trains and evaluates with these settings from the beginning, in a workdir that "
    "holds no run, or, with --restart, in its own, which is then moved aside:"
)
_RESUMES = (
    "This command resumes the run, in its workdir; with --restart, it moves the run aside and "
    "begins anew:"
)
_MACHINE = {"python": "Python", "commit": "commit", "device": "device", "num_devices": "devices"}


class Page(NamedTuple):
    """What a page shows.

    Attributes:
      config: the settings.
      report: what was evaluated and measured, as report.json holds it.
      rows: of the final table, on what the program is for.
      records: the metrics, as metrics.jsonl holds them.
      certificate: as certificate.json holds it, if there is one.
      folder: where the report's pictures are.
      what: what the examples are called.
      curve_metric: the metric of the first curve.
      curve_name: what that is called; in bits, the validation score is drawn beside it.
    """

    config: TrainingConfig
    report: Mapping[str, Any]
    rows: Sequence[tuple[str, str]]
    records: Sequence[Mapping[str, Any]]
    certificate: Mapping[str, Any] | None
    folder: Path
    what: str = "examples"
    curve_metric: str = "loss"
    curve_name: str = "loss"


def write_page(path: Path, page: Page) -> None:
    """Write the page of a run; a part that it has nothing on is left out."""
    config = page.config
    title = f"{config.program} of {config.dataset}, {config.workdir}"
    write_html(
        path,
        title,
        _header(page),
        _pictures(page, "Samples"),
        section("Training", _curves(page), id_="training"),
        section("Results", _results(page), id_="results"),
        _pictures(page, "Reconstructions", _inverse(page)),
        _pictures(page, "A walk through the latents"),
        section("Bounds", _bounds(page), id_="bounds"),
        section("Settings", _settings(config, resumes=stopped(page.report)), id_="settings"),
        section("Versions", _versions(page), id_="versions"),
    )


def _header(page: Page) -> Html:
    report, config = page.report, page.config
    told = verdict(report, page.certificate, what=page.what)
    kind = {True: " good", False: " bad"}.get(report.get("certified", ""), "")
    smoke = ["A smoke run: a check that all works, whose figures say nothing."] * config.smoke
    notes = [element("p", text, class_="warning") for text in (*smoke, *warnings(report))]
    return element(
        "header",
        element("h1", f"{config.program} of {config.dataset} — {config.workdir}"),
        element("p", told, class_=f"verdict{kind}"),
        *notes,
    )


def _pictures(page: Page, title: str, *more: Html) -> Html:
    names = page.report.get("pictures", ())
    shown = [
        figure(picture(page.folder / name, alt), caption)
        for name, (where, alt, caption) in _PICTURES.items()
        if where == title and name in names and (page.folder / name).is_file()
    ]
    return section(title, *shown, *more, id_=title.lower().replace(" ", "-"))


def _curves(page: Page) -> Html:
    in_bits = page.curve_name.startswith("bits")
    test = page.report.get("bits_per_dim")
    references = {"test": float(test)} if in_bits and test is not None else {}
    first = page.curve_metric, page.curve_name
    target = _target(page.config)
    norms = ""
    if target is not None:
        after = ", to within which kernels are scaled at the end" * page.config.shrink
        norms = f" The dashed line is coeff, {target:g}{after}."
    found = curves(page.records, *first, references, target, norms, validated=in_bits)
    return element("div", found, class_="curves") if found else Html()


def _results(page: Page) -> Html:
    report = page.report
    rows = [*page.rows, *_run_rows(report)]
    return joined([pairs(rows), _explained(rows)])


def _explained(rows: Sequence[tuple[str, str]]) -> Html:
    return legend(term.entry for term in of_rows(rows))


def _run_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return rows on size and time, as far as a report knows them."""
    rows = list(origin_rows(dict(report)))
    if "num_parameters" in report:
        rows.append(("parameters", f"{report['num_parameters']:,}"))
    if "schedule" in report:
        rows.append(("learning rate", str(report["schedule"])))
    if "train_seconds" in report:
        seconds = [report[f"{what}_seconds"] for what in ("train", "total")]
        rows.append(("time", "{:,.0f} s training, {:,.0f} s in total".format(*seconds)))
    if "step" in report:
        rows.append(("checkpoint", f"of step {report['step']:,}"))
    return rows


def _inverse(page: Page) -> Html:
    rows = inversion_rows(dict(page.report))
    return joined([pairs(rows), _explained(rows)])


def _bounds(page: Page) -> Html:
    if page.certificate is None:
        return Html()
    return bounds(page.certificate, _target(page.config))


def _target(config: TrainingConfig) -> float | None:
    """Return what a layer's norm may be; None where coeff is a branch's, or there is none."""
    return None if config.branch.startswith("monlip") else config.coeff


def _settings(config: TrainingConfig, *, resumes: bool) -> Html:
    name, found = settings(config)
    own = [s for s in found if s.differs]
    rest: list[list[Child]] = [[s.name, _value(s.value)] for s in found if not s.differs]
    changed = table(
        ["setting", "here", f"config {name}"],
        [[joined([s.name, " ", element("mark", "changed")]), _value(s.value), _value(s.default)]
         for s in own],
        texts=3,
    )  # fmt: skip
    same = f"No setting differs from those of config {name}."
    return joined(
        [
            element("p", _RESUMES if resumes else _REPEATS),
            element("pre", command(config)),
            changed if own else element("p", same),
            details(
                f"The other {len(rest)} settings, as config {name} has them",
                table(["setting", "value"], rest, texts=2),
            ),
        ]
    )


def _value(value: Any) -> str:
    return written(value).replace("\n", " ") or "none"


def _versions(page: Page) -> Html:
    report = page.report
    machine = [(told, str(report[name])) for name, told in _MACHINE.items() if name in report]
    packages = [(name, str(version)) for name, version in report.get("packages", {}).items()]
    hashes = [("SHA-256 of the parameters", h) for h in [report.get("parameters_sha256")] if h]
    return pairs([*machine, *packages, *hashes])
