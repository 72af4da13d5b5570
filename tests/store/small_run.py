"""A run folder of a few small commits, for tests of what lies in it."""

import numpy as np

from dmrl_ray.store.writer import RunWriter


def create(folder, **options):
    return RunWriter.create(folder, "seed: 0\n", {"seed": 0}, **options)


def add(writer, first, rows=4):
    """Metrics rows whose values count up from `first`."""
    same = {"stage": "s", "job": "j", "policy_version": first, "env_steps": 0}
    writer.add("metrics", {**same, "name": "loss", "value": np.arange(first, first + rows)})


def step(writer, number):
    """One iteration of a small run, committed: four rows, one new checkpoint."""
    add(writer, 4 * number)
    record = writer.save("last", {"w": np.full(3, number)})
    return writer.commit({"step": number + 1}, {"last": record})


def make_run(folder, steps, **options):
    with create(folder, **options) as writer:
        for number in range(steps):
            step(writer, number)
    return folder
