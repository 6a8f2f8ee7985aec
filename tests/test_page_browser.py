"""Pages in a real browser, offline: they fit a phone and a desk, and print.

Needs Chromium (Debian and Ubuntu: ``apt install chromium``).
"""

import html
import re
import shutil
import subprocess

import pytest
from page_cases import draw, made, whole_page

from train.compare import Compare

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium: apt install chromium"),
]

#: A frame takes any width, which windows of some browsers do not.
_FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>waiting</title>
<iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const images = [...page.images];
  const wide = [...page.querySelectorAll("body *")].filter(
    (e) => !e.closest(".scrolls, svg") && e.getBoundingClientRect().right > {width} + 0.5);
  const {{scrollWidth, clientWidth}} = page.documentElement;
  document.title = JSON.stringify([scrollWidth - clientWidth, clientWidth,
    images.length, images.filter((i) => i.naturalWidth > 0).length, wide.length]);
}});
</script>"""


def browse(folder, address, *arguments):
    """Run the browser without a network; return its output, and what pages said to the console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    options += [f"--user-data-dir={folder / 'profile'}", *arguments, address]
    done = subprocess.run([BROWSER, *options], capture_output=True, timeout=300, check=True)
    said = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
    return done.stdout.decode(), said


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    runs = tuple(made(folder / f"a run with a long name, {i}") for i in range(4))
    for run in runs:
        draw(run)
    Compare(runs=runs, output=folder / "compare.html").run()
    return folder / "compare.html"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return whole_page(tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize(("kind", "images"), [("written", 3), ("compared", 4)])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_without_sideways_scrolling(width, kind, images, request, tmp_path):
    frame = tmp_path / "frame.html"
    content = html.escape(request.getfixturevalue(kind).read_text(encoding="utf-8"))
    frame.write_text(_FRAME.format(width=width, page=content), encoding="utf-8")
    found, said = browse(tmp_path, frame.as_uri(), "--dump-dom", f"--window-size={width},900")
    title = re.search(r"<title>\[(.*?)\]</title>", found)
    assert title, "the page never loaded"
    hidden, seen, *rest = (int(n) for n in title[1].split(","))
    assert hidden == 0 and width - 20 <= seen <= width  # beside a scrollbar
    assert rest == [images, images, 0] and not said


def test_a_page_prints_all_that_is_folded_away(written, tmp_path):
    """On more sheets than without the rule that unfolds it."""
    text = written.read_text(encoding="utf-8")
    folded = tmp_path / "folded.html"
    folded.write_text(re.sub(r"details::details-content {.*?}", "", text), encoding="utf-8")
    assert 2 <= sheets(tmp_path, folded.as_uri()) < sheets(tmp_path, written.as_uri()) <= 12


def sheets(folder, address):
    """Print a page, and count its sheets."""
    printed = folder / "page.pdf"
    options = [f"--print-to-pdf={printed}", "--no-pdf-header-footer"]
    _, said = browse(folder, address, *options)
    assert printed.read_bytes().startswith(b"%PDF") and not said
    return len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes()))
