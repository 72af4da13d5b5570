"""The placement of a run on the machine that it starts on, where its config leaves it open."""

from __future__ import annotations

import time

import torch

from dmrl_ray.config.machine import usable_cores
from dmrl_ray.config.paths import find_cluster
from dmrl_ray.config.schema import Pretrain, RunConfig
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.external import external_of
from dmrl_ray.jobs.spec import JobSpec, build, job_spec, one_thread
from dmrl_ray.tasks.faults import sample
from dmrl_ray.types import random_stream

MEASURE_S = 0.25
"""Seconds from which on a rollout is long enough to be measured by."""

WORTH_US = 20.0
"""Cost of an environment's step from which other processes roll out faster than the learner's own.

A trial costs about 2 us a step to hand over, and Ray's calls 5 ms an iteration; on CartPole, whose
step costs 2 us, two workers were slower than none.
"""

WORTH_S = 30.0
"""Seconds of rolling out that are worth the start of Ray."""


def place(config: RunConfig, address: str | None) -> tuple[RunConfig, str]:
    """The config with `workers.num` and `learners.threads` resolved, and why so; "" if they were.

    On a cluster every shard gets a worker. On one machine a second of rollouts decides whether
    workers are worth their start. Results do not depend on the workers, and on the threads only in
    their last bits.

    Raises:
        ConfigError: a learner asks for a GPU that is not there.
    """
    why, cores = [], usable_cores()
    workers, learners = config.workers, config.learners
    if workers.num == "auto":
        number, because = _workers(config, address, cores)
        workers = workers.model_copy(update={"num": number})
        why.append(f"workers.num: {number}, as {because}")
    if learners.threads == "auto":
        threads = 2 if cores >= 4 else 1
        learners = learners.model_copy(update={"threads": threads})
        why.append(f"learners.threads: {threads}, of {cores} cores")
    config = config.model_copy(update={"workers": workers, "learners": learners})
    check_gpu(config)
    return config, "; ".join(why)


def check_gpu(config: RunConfig) -> None:
    """See that a learner in this process has the GPU that it asks for.

    Raises:
        ConfigError: it has not.
    """
    if (
        config.workers.num == 0
        and config.learners.device == "cuda"
        and not torch.cuda.is_available()
    ):
        raise ConfigError(
            "learners.device: cuda was asked for, but PyTorch finds no GPU here; use auto or cpu"
        )


def _workers(config: RunConfig, address: str | None, cores: int) -> tuple[int, str]:
    """Rollout workers, and the reason."""
    specs = [job_spec(config, name) for name in config.stages]
    shards = max(spec.rollout.shards for spec in specs)
    if any(spec.rollout.device for spec in specs):
        return 0, "rollouts stay on a device"
    if find_cluster(address) is not None:
        return shards, f"a cluster plays {shards} shards"
    if config.learners.num > 1:
        return max(1, min(shards, cores - 1)), f"{config.learners.num} learners are processes, too"
    most = min(shards, cores - 1)
    if most < 2:
        return 0, f"{shards} shards on {cores} cores leave nothing to do side by side"
    training = [spec for spec in specs if isinstance(config.stages[spec.stage], Pretrain)]
    own = [spec for spec in training if external_of(spec) is None]
    if not own:
        return most, f"{shards} shards are played on {cores} cores"
    cost = step_us(own[0])
    seconds = sum(s.env_steps for s in own) * cost * 1e-6
    what = f"a step of an environment costs {cost:.3g} us, {seconds:.3g} s in all"
    worth = cost >= WORTH_US and seconds >= WORTH_S
    return (most if worth else 0), what + ("" if worth else ", too little for other processes")


def step_us(spec: JobSpec) -> float:
    """Microseconds that a step of one environment costs while rolling out with one thread."""
    program = build(spec)
    stream = random_stream(spec.seed, *spec.key, "placement")
    tasks = sample(program.distribution, stream, spec.rollout.num_envs, spec.split)
    sampler = program.sampler(spec.rollout.num_envs)
    try:
        with one_thread():
            sampler.start(stream, 0)
            sampler.begin_trial(tasks, program.policy)
            sampler.rollout(program.policy, 1, with_value=False)  # The first steps are slower.
            steps, seconds = 1, 0.0
            while seconds < MEASURE_S:
                steps *= 2
                start = time.perf_counter()
                sampler.rollout(program.policy, steps, with_value=False)
                seconds = time.perf_counter() - start
    finally:
        sampler.env.close()
    return 1e6 * seconds / steps / spec.rollout.num_envs
