"""Five training steps on some devices, in a process of their own; see test_parallel.py.

usage: parallel_worker.py OUT PROGRAM VARIANT…           (a VARIANT is parallel:number of devices)
       parallel_worker.py OUT PROGRAM VARIANT --process ID COUNT HOST:PORT
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
    out, program, *variants = arguments
    for variant in variants:
        parallel, count = variant.split(":")
        leaves, losses = five_steps(program, parallel, int(count))
        if jax.process_index() == 0:
            np.savez(f"{out}-{parallel}-{count}.npz", *leaves, losses=losses)


@functools.cache
def set_up(program):
    """What does not depend on the devices: config, data, step, and the state before it."""
    kind, step_of, with_labels = PROGRAMS[program]
    config = dataclasses.replace(
        kind, depths=(1, 2), features=(8, 8), steps=5, batch_size=16, warmup_steps=1, ema_decay=0.9
    )
    if program == "density":
        config = dataclasses.replace(config, num_terms=2)
    dataset = load_dataset("digits")
    module = density if program == "density" else classification
    model = module.build_model(config, dataset)
    step = step_of(model, config, dataset)
    first = np.asarray(dataset.train[:64] / 16.0, np.float32)
    return config, dataset, step, with_labels, jax.device_get(fresh_state(model, config, first))


def five_steps(program, parallel, count):
    config, dataset, step, with_labels, state = set_up(program)
    devices = Devices(parallel, config.batch_size, jax.devices()[:count])
    state = devices.replicate(state)
    batches = batch_iterator(
        dataset,
        config.batch_size,
        config.seed,
        with_labels=with_labels,
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
    from train import classification, density
    from train.batches import batch_iterator
    from train.configs import CLASSIFICATION, DENSITY
    from train.data import load_dataset
    from train.networks import fresh_state
    from train.parallel import Devices, start_processes
    from train.steps import classification_step, density_step

    PROGRAMS = {
        "density": (DENSITY["digits"], density_step, False),
        "classification": (
            dataclasses.replace(CLASSIFICATION["digits"], augment=True, optimizer="sgd"),
            lambda model, config, dataset: classification_step(model, config, 17),
            True,
        ),
    }
    main(sys.argv[1:])
