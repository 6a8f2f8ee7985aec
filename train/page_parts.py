"""Parts of a page in HTML: elements, tables, pictures; whatever is no markup is escaped."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from train.output import whole

_FOLDER = Path(__file__).parent
_LARGE = 300_000  # bytes of a picture that is embedded as it is
_MOST_PIXELS = 1400  # of a side of a larger one
_COLOURS = 256


class Html(str):
    """Markup; any other text is escaped where it is put into an element."""


#: What an element can contain.
Child = str | Html


def element(name: str, *children: Child, **attributes: str | bool) -> Html:
    """Make an element.

    Text among the children, and attributes, are escaped. An attribute that is True stands without a
    value, one that is False is left out. ``class_`` and ``for_`` lose their last character, and
    underscores within a name become hyphens.
    """
    told = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in ("img", "meta"):
        return Html(f"<{name}{told}>")
    return Html(f"<{name}{told}>{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Html:
    """Join markup and text, which is escaped."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children))


def _attribute(key: str, value: str | bool) -> str:
    name = key.removesuffix("_").replace("_", "-")
    if isinstance(value, bool):
        return f" {name}" * value
    return f' {name}="{escape(value)}"'


def section(title: str, *children: Child, id_: str) -> Html:
    """Make a section below a heading; nothing where it has no content."""
    if not any(children):
        return Html()
    return element("section", element("h2", title), *children, id_=id_)


def pairs(rows: Sequence[tuple[str, Child]], caption: str = "") -> Html:
    """Make a table of (what, value); nothing without rows."""
    if not rows:
        return Html()
    lines = (
        element("tr", element("th", what, scope="row"), element("td", value))
        for what, value in rows
    )
    return _boxed(_caption(caption), element("tbody", *lines), class_="pairs")


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], caption: str = "", *, texts: int = 1
) -> Html:
    """Make a table whose first column names its rows.

    Columns from ``texts`` on are numbers. A table that is wider than the page scrolls within its
    box.
    """

    def cells(row: Sequence[Child]) -> Iterable[Html]:
        for place, cell in enumerate(row):
            what: dict[str, str] = {"scope": "row"} if place == 0 else {}
            if place >= texts:
                what["class_"] = "number"
            yield element("td" if place else "th", cell, **what)

    columns = (
        element("th", title, scope="col", **({"class_": "number"} if i >= texts else {}))
        for i, title in enumerate(head)
    )
    return _boxed(
        _caption(caption),
        element("thead", element("tr", *columns)),
        element("tbody", *(element("tr", *cells(row)) for row in rows)),
    )


def _caption(text: str) -> Html:
    return element("caption", text) if text else Html()


def _boxed(*parts: Html, class_: str = "grid") -> Html:
    whole = element("table", *parts, class_=class_)
    return element("div", whole, class_="scrolls", tabindex="0", role="group", aria_label="table")


def legend(terms: Iterable[tuple[str, str]]) -> Html:
    """Explain (term, meaning) below what uses the terms."""
    parts = [element("div", element("dt", term), element("dd", told)) for term, told in terms]
    return element("dl", *parts, class_="legend") if parts else Html()


def details(summary: Child, *children: Child, opened: bool = False) -> Html:
    """Make what a reader can fold away."""
    return element("details", element("summary", summary), *children, open=opened)


def figure(content: Html, caption: Child) -> Html:
    """Put a caption below a picture."""
    return element("figure", content, element("figcaption", caption))


def picture(path: Path, alt: str) -> Html:
    """Embed a PNG file, with its size, so that nothing moves while a page is opened.

    A large one is embedded smaller, in 256 colours.
    """
    data, size = _png(path)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    width, height = map(str, size)
    return element("img", src=uri, alt=alt, width=width, height=height)


def _png(path: Path) -> tuple[bytes, tuple[int, int]]:
    from PIL import Image

    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        if len(data) <= _LARGE:
            return data, image.size
        smaller = image.convert("RGB")
    smaller.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    smaller = smaller.quantize(_COLOURS)
    out = io.BytesIO()
    smaller.save(out, "PNG", optimize=True)
    return out.getvalue(), smaller.size


def write_html(path: Path, title: str, *body: Child) -> None:
    """Write a page, whole or not at all: one file, which opens without a network."""
    template = Template((_FOLDER / "page.html").read_text(encoding="utf-8"))
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    text = template.substitute(title=escape(title), style=style, body=joined(body))
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
