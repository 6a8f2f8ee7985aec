"""Five training steps of each program on some devices, in a process of their own; see
test_parallel.py.

usage: parallel_worker.py PROGRAM OUT VARIANT…           (a VARIANT is parallel:number of devices)
       parallel_worker.py PROGRAM OUT VARIANT --process ID COUNT HOST:PORT
"""

import dataclasses
import functools
import sys

import jax
import numpy as np


def main(arguments):
    if "--process" in arguments:
        at = arguments.index("--process")
        process_id, count, coordinator = arguments[at + 1 : at + 4]
        start_processes(coordinator, int(count), int(process_id))
        arguments = arguments[:at]
    program, out, *variants = arguments
    for variant in variants:
        parallel, count = variant.split(":")
        leaves, losses = five_steps(program, parallel, int(count))
        if jax.process_index() == 0:
            np.savez(f"{out}-{parallel}-{count}-{program}.npz", *leaves, losses=losses)


@functools.cache
def set_up(program):
    """What does not depend on the devices: the task, its step, and the state before it."""
    task, config = PROGRAMS[program]
    config = dataclasses.replace(
        config,
        depths=(2,),
        features=(8,),
        steps=5,
        batch_size=16,
        warmup_steps=1,
        ema_decay=0.9,
    )
    if program == "density":
        # A shared length is drawn for each device, and Muon and Adam blow small differences up.
        plain = {"train_estimator": "series", "continuation": None, "shared_length": False}
        rates = {"optimizer": "adamw", "learning_rate": 6e-3, "weight_decay": 0.0}
        config = dataclasses.replace(config, num_terms=2, **plain, **rates)
    task = task(config)
    first = np.asarray(task.dataset.train[:64] / 16.0, np.float32)
    state = FirstState(task.init, config, first).values()
    return task, training_step(task.loss, config), jax.device_get(state)


def five_steps(program, parallel, count):
    task, step, state = set_up(program)
    config = task.config
    devices = Devices(parallel, config.batch_size, jax.devices()[:count])
    state = devices.replicate(state)
    batches = batch_iterator(
        task.dataset,
        config.batch_size,
        config.seed,
        with_labels=task.with_labels,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    mapped, losses = devices.map(step), []
    for _ in range(config.steps):
        state, metrics = mapped(state, devices.split(next(batches)))
        losses.append(float(devices.one(metrics)["loss"]))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(devices.one(state))]
    return leaves, np.array(losses)


if __name__ == "__main__":
    from train.batches import batch_iterator
    from train.classification import Classification
    from train.configs import CLASSIFICATION, DENSITY
    from train.density import Density
    from train.parallel import Devices
    from train.processes import start_processes
    from train.steps import FirstState, training_step

    PROGRAMS = {
        "density": (Density, DENSITY["digits"]),
        "classification": (
            Classification,
            dataclasses.replace(CLASSIFICATION["digits"], augment=True, optimizer="sgd"),
        ),
    }
    main(sys.argv[1:])
