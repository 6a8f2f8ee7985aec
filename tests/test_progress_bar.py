"""The bar of a fit: on a terminal by rich or tqdm, nothing elsewhere."""

import importlib.util
import io
import sys

import pytest

from iresnet_jax.progress_bar import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, *, hidden=(), wanted=True):
    """What a bar of three steps writes, with some packages hidden."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else found(name)
    )
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(3, wanted) as report:
        for done in range(1, 4):
            report(done, f"step {done}")
    return stream.getvalue()


@pytest.mark.parametrize("hidden", [(), ("rich",)], ids=["rich", "tqdm"])
def test_a_terminal_sees_the_last_step(monkeypatch, hidden):
    pytest.importorskip("tqdm" if hidden else "rich")
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, Terminal(), hidden=hidden)
    assert "step 3" in text and "100%" in text


@pytest.mark.parametrize("hidden", [(), ("rich",), ("rich", "tqdm")])
def test_a_file_stays_empty(monkeypatch, hidden):
    assert not shown(monkeypatch, io.StringIO(), hidden=hidden).strip()


def test_a_bar_that_is_not_wanted_is_not_shown(monkeypatch):
    assert not shown(monkeypatch, Terminal(), wanted=False)
