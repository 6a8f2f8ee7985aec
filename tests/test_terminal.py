"""What takes long is said again while it lasts."""

import time

import pytest

from train.terminal import proceed, repeating, tell


def wait_for(lines, capsys, told="", seconds=20.0):
    """Read until so many lines have come."""
    end = time.monotonic() + seconds
    while told.count("\n") < lines and time.monotonic() < end:
        time.sleep(0.01)
        told += capsys.readouterr().err
    return told.splitlines()


def test_what_lasts_is_said_again_with_its_seconds(capsys):
    with repeating(0.05):
        tell("Reading digits …")
        first, *rest = wait_for(3, capsys)
    assert first == "Reading digits …"
    assert set(rest) <= {f"Reading digits … {k} s" for k in range(21)} and len(rest) >= 2


@pytest.mark.parametrize("end", [proceed, lambda: tell("Done.") or proceed()])
def test_what_is_over_is_not(end, capsys):
    with repeating(0.02):
        tell("Reading digits …")
        end()
        capsys.readouterr()
        time.sleep(0.2)
        assert capsys.readouterr().err == ""


def test_the_next_takes_its_place(capsys):
    with repeating(0.05):
        tell("Reading digits …")
        tell("Drawing 4 samples …")
        capsys.readouterr()
        assert all(line.startswith("Drawing") for line in wait_for(2, capsys))


def test_outside_nothing_is_said_again(capsys):
    with repeating(0.02):
        tell("Reading digits …")
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
