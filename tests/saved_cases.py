"""Runs that an earlier version saved.

``fixtures/saved_runs.tar.xz`` holds a run of each program on the digits (two blocks, 20 and 200
steps) as commit 0b9cb1c saved it, ``saved_runs.json`` what that commit said of them.
"""

import json
import tarfile
from pathlib import Path

FIXTURES = Path(__file__).with_name("fixtures")

#: By program, what that commit said of its run.
EXPECTED = json.loads((FIXTURES / "saved_runs.json").read_text())


def unpacked(folder, program):
    """The run of a program, below ``folder``."""
    with tarfile.open(FIXTURES / "saved_runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / program
