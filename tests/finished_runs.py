"""Finished runs that several files of tests look at, each trained once for all workers."""

import os
import shutil

from filelock import FileLock

from train.__main__ import main

DIGITS = [
    *("density", "--smoke", "--depths", "2", "--features", "4", "--batch-size", "16"),
    *("--steps", "20", "--keep-checkpoints", "3"),
]
MOONS = [
    *("density", "--dataset", "moons", "--smoke", "--depths", "2", "--features", "8"),
    *("--batch-size", "32", "--steps", "20"),
]
RUNS = {"digits": DIGITS, "moons": MOONS}


def finished_run(tmp_path_factory, name):
    """A copy of one of the runs, finished, to be looked at and changed."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share
    workdir = folder / f"finished-{name}"
    with FileLock(folder / f"finished-{name}.lock"):
        if not (workdir / "report.json").exists():
            assert main([*RUNS[name], "--workdir", str(workdir)]) == 0
    return shutil.copytree(workdir, tmp_path_factory.mktemp(name) / "run")
