"""The memory of a run, estimated before any of it is taken.

It is a lower bound on what the learner's process holds at one time: its weights with their
gradients and moments, the rollouts of an iteration, replay, the parameters of each task, the memory
of a shard's environments, lists of tasks. So nothing that fits is refused. Activations, copies and
checkpoints take about as much again, which is displayed; the programs, 0.4 GB, come on top.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel

from dmrl_ray.algorithms.gradient_adaptation import InnerLoop
from dmrl_ray.config.schema import Adapt, Component, Finetune, Pretrain, Stage
from dmrl_ray.data.replay import ReplayBuffer
from dmrl_ray.jobs.spec import JobSpec, Program
from dmrl_ray.learn.per_task import ACTOR
from dmrl_ray.learn.trainable import select

TASK_BYTES = 128
"""Least bytes of a task that is evaluated on: its place in lists, and its episodes' rows."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@dataclass(frozen=True)
class Part:
    """Tensors of one kind, all together.

    Args:
        name: of the kind.
        made_of: what they are, for a message.
        factors: sizes that multiply, with the setting of each: the largest is the one to lower.
        sure_bytes: that they take, however soon episodes end.
        about_bytes: that they take with what is made of them on the way.
    """

    name: str
    made_of: str
    factors: tuple[tuple[int, str], ...]
    sure_bytes: int
    about_bytes: int


def machine_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of this machine, or of the part of it that this process may have."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *group_limits(cgroups, Path("/proc/self/cgroup"))])


def group_limits(cgroups: Path, own: Path) -> Iterator[int]:
    """Limits of this process's control group, of either version, and of those around it."""
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        root = cgroups / controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                text = (folder / name).read_text().strip()
                if text.isdecimal():
                    yield int(text)


def refusal(parts: list[Part], limit_bytes: int) -> str | None:
    """Why this memory does not suffice, beginning with the setting to lower; None if it might."""
    total = sum(part.sure_bytes for part in parts)
    if total <= limit_bytes:
        return None
    largest = max(parts, key=lambda part: part.sure_bytes)
    alone, both = size_text(largest.sure_bytes), size_text(total)
    rest = "" if alone == both else f", of {both} in all"
    return (
        f"{max(largest.factors)[1]}: {largest.made_of} take {alone}{rest}, and this machine has "
        f"{size_text(limit_bytes)} of memory; lower it"
    )


def summary(parts: list[Part]) -> str:
    """As in ``about 1.2 GiB (rollouts 0.9, weights 0.2, replay 0.1)``."""
    total = sum(part.about_bytes for part in parts)
    unit = _unit(total)
    ordered = sorted(parts, key=lambda part: -part.about_bytes)
    shares = [(part.name, f"{part.about_bytes / 1024**unit:.1f}") for part in ordered]
    listed = ", ".join(f"{name} {share}" for name, share in shares if share != "0.0")
    return f"about {size_text(total)} ({listed})"


def size_text(size_bytes: int) -> str:
    """As in ``1.2 GiB``."""
    unit = _unit(size_bytes)
    return f"{size_bytes / 1024**unit:,.1f} {UNITS[unit]}"


def _unit(size_bytes: int) -> int:
    return min(len(UNITS) - 1, max(0, size_bytes.bit_length() - 1) // 10)


def estimate(program: Program, spec: JobSpec, stage: Stage, learners: int = 1) -> list[Part]:
    """The memory of a stage, by kind.

    Args:
        program: made by `outline`.
        spec: of the stage's job.
        stage: of the config.
        learners: that share the work.

    Raises:
        ValueError: no parameter is called as `trainable` says.
    """
    trains = isinstance(stage, Pretrain | Finetune)
    on_gpu = spec.device == "cuda" or (spec.device == "auto" and torch.cuda.is_available())
    parts = [_weights(program, spec, trained=trains and not on_gpu), _tasks(program, spec, stage)]
    if trains:
        shards = 1 if isinstance(stage, Finetune) else spec.rollout.shards
        parts += [_rollouts(program, spec, shards), _memory(program, spec, shards)]
        if not on_gpu:
            tasks = shards * spec.rollout.num_envs // program.algorithm.envs_per_task
            tasks = 1 if isinstance(stage, Finetune) else tasks // learners
            parts += [_replay(program), _task_parameters(program, spec, tasks)]
    return [part for part in parts if part.about_bytes]


def _weights(program: Program, spec: JobSpec, *, trained: bool) -> Part:
    """With the gradient, once by parameter and once in one piece, and Adam's moments."""
    policy, config = program.policy, program.algorithm.config
    sizes = {name: p.nbytes for name, p in policy.named_parameters()}
    moving = select("trainable", spec.trainable, sizes) if trained else set[str]()
    copies = 2 if config.optimizer == "sgd" else 4
    auxiliary = sum(size for name, size in sizes.items() if name.startswith("auxiliary."))
    own = 2 * auxiliary > sum(sizes.values())
    factors = [_largest("algorithm", spec.algorithm) if own else _largest("network", spec.network)]
    widths = {getattr(program.distribution.action_space, "n", 0)}
    widths |= set(program.distribution.observation_space.shape or ())
    factors += [(w, name) for w, name in _numbers("tasks", spec.tasks) if w in widths]
    held = sum(sizes.values()) + copies * sum(sizes[name] for name in moving)
    count = sum(p.numel() for p in policy.parameters())
    with_what = " with gradients and the optimiser's state" if moving else ""
    return Part("weights", f"{count:,} weights{with_what}", tuple(factors), held, 2 * held)


def _tasks(program: Program, spec: JobSpec, stage: Stage) -> Part:
    """The tasks that a stage validates on, specialises to, meets in streams or is evaluated on."""
    if isinstance(stage, Pretrain):
        factors = [(stage.validation_tasks, "validation_tasks")]
    elif isinstance(stage, Adapt):
        factors = [(stage.streams, "streams"), (stage.tasks_per_stream, "tasks_per_stream")]
    else:
        factors = [(stage.tasks, "tasks")]
    count = math.prod(number for number, _ in factors)
    size = program.distribution.task_bytes
    sure, about = count * (TASK_BYTES + size), count * (4 * TASK_BYTES + size)
    if program.distribution.task_bytes:
        factors.append(_largest("tasks", spec.tasks))
    return Part("tasks", f"{count:,} tasks", tuple(factors), sure, about)


def _rollouts(program: Program, spec: JobSpec, shards: int) -> Part:
    """Rollouts of one iteration, as collected and, joined, as the learner updates with them."""
    steps, envs = program.algorithm.collected_steps, spec.rollout.num_envs
    obs, action = _step_bytes(program)
    step = obs + action + 8 + 4  # reward and log-probability, four flags
    on_device = spec.rollout.device is not None
    copies = 0 if spec.rollout.device == "cuda" else 1 if on_device and shards == 1 else 2
    full = copies * steps * envs * shards * step
    # Room for steps that are not made is no memory yet, but for the mask.
    sure = full if _whole(program) else min(copies, 1) * steps * envs
    factors = ((envs, "rollout.num_envs"), (shards, "rollout.shards"), _steps(program, spec))
    made_of = f"{steps:,} steps x {envs:,} environments x {shards:,} shards of {step:,} bytes"
    made_of += ", as collected and as joined," if copies == 2 else ""
    return Part("rollouts", made_of, factors, sure, 2 * full)


def _memory(program: Program, spec: JobSpec, shards: int) -> Part:
    """The policy's, of the environments of a shard; all shards may be in one process."""
    envs = spec.rollout.num_envs if program.algorithm.collected_steps else 0
    with torch.device("meta"):
        size = program.policy.encoder.memory_bytes
    factors = ((envs, "rollout.num_envs"), _largest("network", spec.network))
    made_of = f"the policy's memories of {envs:,} environments, {size_text(size)} each,"
    return Part("memory", made_of, factors, envs * size, 2 * shards * envs * size)


def _replay(program: Program) -> Part:
    """All slots: they are taken when the first trials come."""
    replay = getattr(program.algorithm, "replay", None)
    slots = replay.capacity if isinstance(replay, ReplayBuffer) else 0
    steps = program.algorithm.collected_steps
    obs, action = _step_bytes(program)
    step = 2 * obs + action + 4 + 3  # reward, three flags
    made_of = f"{slots:,} trials x {steps:,} steps of {step:,} bytes in the replay"
    full = slots * steps * step
    sure = full if _whole(program) else slots * step
    factors = ((slots, "algorithm.replay_trials"),)
    return Part("replay", made_of, factors, sure, full)


def _task_parameters(program: Program, spec: JobSpec, tasks: int) -> Part:
    """Parameters of every task in the inner loop: after each step, and the gradient."""
    inner_loop, moved = getattr(program.algorithm, "inner_loop", None), 0
    if isinstance(inner_loop, InnerLoop):
        named = program.policy.named_parameters()
        prefixes = inner_loop.config.trainable
        moved = sum(p.nbytes for n, p in named if n.startswith(ACTOR) and n.startswith(prefixes))
        moved *= 2 if inner_loop.within_trial else inner_loop.rollouts
    factors = ((tasks, "rollout.num_envs"), _largest("network", spec.network))
    made_of = f"the parameters of {tasks:,} tasks at once, {size_text(moved)} each,"
    return Part("tasks' parameters", made_of, factors, tasks * moved, 2 * tasks * moved)


def _whole(program: Program) -> bool:
    """Whether collections are as long as they can be."""
    return program.algorithm.continues_episodes or program.distribution.fixed_length


def _step_bytes(program: Program) -> tuple[int, int]:
    """Bytes of an observation, and of an action."""
    seen, acts = program.distribution.observation_space, program.distribution.action_space
    action = (
        8 if np.issubdtype(np.dtype(acts.dtype), np.integer) else 4 * math.prod(acts.shape or ())
    )
    return np.dtype(seen.dtype).itemsize * math.prod(seen.shape or ()), action


def _steps(program: Program, spec: JobSpec) -> tuple[int, str]:
    """Steps of a collection, and the setting that makes them many."""
    steps = program.algorithm.collected_steps
    if getattr(program.algorithm.config, "num_steps", None) == steps:
        return steps, "algorithm.num_steps"
    inner = (getattr(program.algorithm.config, "inner_steps", 0), "algorithm.inner_steps")
    return steps, max(inner, _largest("tasks", spec.tasks))[1]


def _largest(place: str, settings: object) -> tuple[int, str]:
    """The largest whole number among settings, and its dotted name."""
    return max(_numbers(place, settings), default=(0, place))


def _numbers(place: str, settings: object) -> Iterator[tuple[int, str]]:
    """Every whole number among settings, and its dotted name, which `place` begins."""
    if isinstance(settings, Component):
        settings = settings.settings
    if isinstance(settings, BaseModel):
        for name in type(settings).model_fields:
            yield from _numbers(f"{place}.{name}", getattr(settings, name))
    elif isinstance(settings, tuple | list):
        for item in settings:
            yield from _numbers(place, item)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield settings, place
