"""A program run by several processes, thrice; see test_distributed.py.

usage: distributed_worker.py WORKDIR RESULT ID COUNT HOST:PORT

A run, the same resumed after the first process lost its newest checkpoint, and another config in
the same workdir. RESULT.json takes what this process saw of each.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path


def main(workdir, result, process_id, count, coordinator):
    start_processes(coordinator, int(count), int(process_id))
    config = dataclasses.replace(
        DENSITY["moons"].smoke_variant(),
        workdir=Path(workdir),
        depths=(1,),
        features=(4,),
        steps=4,
        batch_size=8,
        checkpoint_every=2,
        num_samples=4,
        num_reconstructed=4,
        distributed=True,
    )
    seen = {"first": attempt(config)}
    shutil.rmtree(Path(workdir) / "checkpoints" / "4", ignore_errors=True)
    seen["resumed"] = attempt(config)
    seen["refused"] = attempt(dataclasses.replace(config, seed=1))
    Path(f"{result}.json").write_text(json.dumps(seen))


def attempt(config):
    """What a run prints and reports, or is refused with."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), silent_unless_primary():
        try:
            report = run(make_task(config))
        except WorkdirError as error:
            return {"error": str(error)}
    return {"printed": printed.getvalue(), "hash": report.get("parameters_sha256")}


if __name__ == "__main__":
    import contextlib
    import io

    from train.configs import DENSITY
    from train.parallel import silent_unless_primary
    from train.processes import start_processes
    from train.programs import make_task
    from train.training import run
    from train.workdir import WorkdirError

    main(*sys.argv[1:])
