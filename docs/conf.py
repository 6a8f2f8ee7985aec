"""The documentation site: ``make docs`` builds it into ``site/html``, without the network."""

import inspect
import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.domains.python import PyObject
from sphinx.util.typing import stringify_annotation

DOCS = Path(__file__).parent
shutil.rmtree(DOCS / "guide", ignore_errors=True)
shutil.copytree(DOCS.parent / "notebooks", DOCS / "guide", ignore=shutil.ignore_patterns("[!0-9]*"))
sys.path.insert(0, str(DOCS.parent))
os.environ["PYTHONPATH"] = str(DOCS.parent)  # the notebooks' kernel imports this checkout, too

import iresnet_jax  # noqa: E402
from iresnet_jax.nn.models import BranchFactory  # noqa: E402
from iresnet_jax.types import Branch  # noqa: E402

project = "iresnet_jax"
copyright = author = "the iresnet_jax developers"
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
]
exclude_patterns = ["conf.py", "templates"]
nitpicky = True
# Names in type annotations that belong to JAX, Flax and NumPy, whose sites are not at hand, and
# this library's private aliases.
nitpick_ignore_regex = [
    ("py:.*", r"(?!iresnet_jax\.).*"),
    ("py:.*", r"iresnet_jax(\.nn|\..*\.(Tree|Rows))"),  # a package, and type variables
]

# Guide: notebooks are .py files, executed once and cached until they change.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"
scale = "smoke" if os.environ.get("IRESNET_JAX_SMOKE") == "1" else "full"
nb_execution_cache_path = str(DOCS.parent / "site" / "cache" / scale)
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "remove"  # of XLA and the kernel; a Python warning fails the notebook's test
nb_ipywidgets_js = {}  # nothing from other hosts
myst_heading_anchors = 3

# API reference: from the docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
toc_object_entries_show_parents = "hide"
templates_path = ["templates"]

html_theme = "sphinx_book_theme"
html_title = "iresnet_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}

for field in PyObject.doc_field_types:
    if field.name == "variable":
        field.label = "Attributes"

#: How annotations spell the library's aliases out.
ALIASES = {
    stringify_annotation(alias, "smart"): name
    for alias, name in ((Branch, "Branch"), (BranchFactory, "BranchFactory"))
}


def drop_links_into_the_checkout(app, docname, source):
    """[`text`](../path) of a page means nothing on the site: its text stays."""
    if "/" not in docname:
        source[0] = re.sub(r"\[([^]\[]+)\]\(\.\./[^)]*\)", r"\1", source[0])


def escape_mathematics(app, what, name, obj, options, lines):
    """|x| and [batch, *shape] are formulas in a docstring, not markup."""
    lines[:] = [re.sub(r"\||\*(?=\w+\])", r"\\\g<0>", line) for line in lines]
    lines[:] = [PUBLIC.sub(at_home, line) for line in lines]


#: A name as users import it, in a docstring's reference.
PUBLIC = re.compile(r":(\w+):`~?iresnet_jax\.((?:nn\.)?)(\w+)`")


def at_home(match):
    """The reference with the name's own module as its target."""
    role, nn, name = match.groups()
    value = getattr(iresnet_jax.nn if nn else iresnet_jax, name)
    home = getattr(value, "__module__", None)
    if home is None:
        return match.group()
    return f":{role}:`iresnet_jax.{nn}{name} <{home}.{name}>`"


def skip_member(app, what, name, obj, skip, options):
    """Fields, among them functions, are listed under Attributes; ``setup`` is Flax's to call."""
    field = type(obj).__name__ == "_tuplegetter"
    default = inspect.isfunction(obj) and obj.__name__ != name
    return True if field or default or name == "setup" else None


def tidy_signature(app, what, name, obj, options, signature, returns):
    """Aliases by their names; without the ``parent`` and ``name`` that Flax adds to modules."""
    if what == "class" and signature:
        signature = re.sub(r"(, )?(\*, )?parent: .*(?=\)$)", "", signature)
    return named(signature), named(returns)


def named(annotation):
    for text, alias in ALIASES.items():
        annotation = annotation and annotation.replace(text, alias)
    return annotation


def setup(app):
    app.connect("source-read", drop_links_into_the_checkout)
    app.connect("autodoc-process-docstring", escape_mathematics)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", tidy_signature)
