"""Rows of the tables of tasks, of episodes and, where steps are recorded, of transitions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmrl_ray.rollout.episodes import Episodes, Open
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.store.tables import PARAM, Cells
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import name_of, reference
from dmrl_ray.types import Columns, EnvironmentFault, Task, Trial

Steps: TypeAlias = dict[str, Cells]
"""Rows of the transitions table, without the columns that name the run, the stage and the job."""


_Number = (int, float, np.number, np.bool_)


def task_rows(tasks: Iterable[Task]) -> dict[str, pa.Array]:
    """Rows of the tasks table, one for each task in each split.

    Parameters that are single numbers have columns of their own.
    """
    tasks = list({(task.id, task.split): task for task in tasks}.values())
    names = dict.fromkeys(name for task in tasks for name in task.params)
    values = {name: [task.params.get(name) for task in tasks] for name in names}
    numbers = {name: _stacked(column) for name, column in values.items()}
    singles: dict[str, pa.Array] = {}
    for name, array in numbers.items():
        if array is None or array.ndim == 1:
            alone = [value if isinstance(value, _Number) else None for value in values[name]]
            if any(value is not None for value in alone):
                cells = np.array(alone, np.float64)  # None becomes NaN
                singles[PARAM + name] = pa.array(cells, from_pandas=True)
    return {
        "task_id": pa.array([task.id for task in tasks], pa.string()),
        "family": pa.array([task.family for task in tasks], pa.string()),
        "split": pa.array([task.split for task in tasks], pa.string()),
        "params": _params_json(tasks, numbers),
        **singles,
    }


def _params_json(tasks: list[Task], numbers: dict[str, np.ndarray | None]) -> pa.Array:
    """Texts of the tasks' parameters; `numbers` are those of all of them by name, if they are."""
    arrays = {name: array for name, array in numbers.items() if array is not None}
    if not arrays or len(arrays) < len(numbers):
        encode = json.JSONEncoder(default=lambda value: value.tolist()).encode
        return pa.array([encode(task.params) for task in tasks], pa.string())
    members = [
        pc.binary_join_element_wise(json.dumps(name), _json_of(array), ": ")
        for name, array in arrays.items()
    ]
    return pc.binary_join_element_wise("{", pc.binary_join_element_wise(*members, ", "), "}", "")


def _stacked(values: list[Any]) -> np.ndarray | None:
    """Values (n, ...), if all are finite numbers or arrays of one shape."""
    kinds = set(map(type, values))
    if all(issubclass(kind, _Number) for kind in kinds):
        array = np.array(values)
    elif kinds == {np.ndarray} and len({value.shape for value in values}) == 1 and values[0].ndim:
        array = np.concatenate(values).reshape(len(values), *values[0].shape)
    else:
        return None
    return array if array.dtype.kind in "fiub" and np.isfinite(array).all() else None


def _json_of(x: np.ndarray) -> pa.Array:
    """(n,) texts of numbers or arrays (n, ...); ten times as fast as the json module."""
    if x.ndim == 1:
        return pc.cast(pa.array(x), pa.string())
    inside = _json_of(x.reshape(-1, *x.shape[2:]))
    rows = pa.ListArray.from_arrays(np.arange(0, len(inside) + 1, x.shape[1]), inside)
    return pc.binary_join_element_wise("[", pc.binary_join(rows, ", "), "]", "")


def check_lengths(family: TaskDistribution, episodes: Episodes) -> None:
    """Check that no episode is longer than the family allows.

    Raises:
        EnvironmentFault: one is.
    """
    found = episodes.overdue(family.max_episode_steps)
    if found is not None:
        env, steps, task = found
        raise EnvironmentFault(
            f"{name_of(family)}: the episode of environment {env} has not ended after {steps} "
            f"steps, on task {task.id}; step must truncate at max_episode_steps, which is "
            f"{family.max_episode_steps}"
        )


def take_episodes(sampler: Sampler) -> Columns:
    """The sampler's rows, if no episode is longer than its family allows."""
    check_lengths(sampler.distribution, sampler.episodes)
    return sampler.take_episodes()


def episode_rows(
    rows: Columns, family: TaskDistribution, policy_version: int, *, scored: bool
) -> Columns:
    """Columns of the episodes table that a worker knows; the version is the one that acted."""
    tasks: list[Task] = list(rows["task"])
    score = np.full(len(tasks), np.nan)
    if scored:
        known = {t.id: reference(family, t) for t in {t.id: t for t in tasks}.values()}
        for i, task in enumerate(tasks):
            ends = known[task.id]
            if ends is not None:
                score[i] = ends.score(rows["episode"][i], rows["return"][i])
    return {
        "task_id": np.array([task.id for task in tasks], object),
        "split": np.array([task.split for task in tasks], object),
        **{name: rows[name].astype(np.int64) for name in COUNTS if name in rows},
        "policy_version": np.full(len(tasks), policy_version),
        "return": rows["return"].astype(np.float64),
        "success": rows["success"].astype(np.float64),
        "score": score,
        "greedy": rows["greedy"].astype(np.bool_),
    }


COUNTS = ("episode", "adaptation_step", "experience_steps", "experience_episodes", "length")
"""Whole numbers that a sampler knows of an episode."""


def evaluation_rows(sampler: Sampler, *, trial: int) -> Columns:
    """Rows of the episodes table of a sampler's last trial, in which nothing was learned.

    Args:
        sampler: whose episodes are taken.
        trial: its number.
    """
    rows = take_episodes(sampler)
    count = len(rows["step"])
    version = sampler.policy_version
    return episode_rows(rows, sampler.distribution, version, scored=True) | {
        "env_steps": np.zeros(count, np.int64),
        "trial": np.full(count, trial),
    }


def steps_made(trial: Trial, family: TaskDistribution) -> np.ndarray:
    """(T,) environment steps of a trial up to each of its steps.

    Where environments step together, these include steps that do not count.
    """
    made = [
        np.full(rollout.num_steps, rollout.num_envs)
        if family.vectorized
        else rollout.mask.sum(1, dtype=np.int64)
        for rollout in trial
    ]
    return np.concatenate(made).cumsum()


def since_change(
    trial: Trial, tasks: Sequence[Task], family: TaskDistribution
) -> tuple[np.ndarray, np.ndarray]:
    """Reward and regret of every step since the tasks changed to these.

    The oracle's return in an episode is divided evenly among the episode's steps, so that the
    regrets of an episode's steps add up to the regret of its return.

    Returns:
        (U, N) each: step u, task n, mean over the environments that play the task; NaN where no
        environment reached step u, or the oracle's return is not known.
    """
    mask, reward, done = (
        np.concatenate(parts)
        for parts in zip(
            *((r.mask, r.reward, (r.terminated | r.truncated) & r.mask) for r in trial), strict=True
        )
    )
    env = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    episode = done.cumsum(0) - done
    length = np.zeros((episode.max() + 1, mask.shape[1]))
    np.add.at(length, (episode, env), mask)
    copies = mask.shape[1] // len(tasks)
    oracle = _oracle_returns(tasks, family, len(length)).repeat(copies, axis=1)
    rate = oracle / np.maximum(length, 1)
    step = mask.cumsum(0) - 1
    found = np.full((2, step.max() + 1, mask.shape[1]), np.nan)
    at = (step[mask], env[mask])
    found[0][at] = reward[mask]
    found[1][at] = (rate[episode, env] - reward)[mask]
    mean = mean_of_known(found.reshape(2, found.shape[1], len(tasks), copies), axis=-1)
    return mean[0], mean[1]


def mean_of_known(x: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of what is not NaN; NaN where all is."""
    known = ~np.isnan(x)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, x, 0.0).sum(axis) / known.sum(axis)
    return mean


def _oracle_returns(tasks: Sequence[Task], family: TaskDistribution, episodes: int) -> np.ndarray:
    """(E, N) the oracle's return in each episode; those after a trial's last equal the last."""
    returns = np.full((episodes, len(tasks)), np.nan)
    for n, task in enumerate(tasks):
        ends = reference(family, task)
        if ends is not None:
            returns[:, n] = ends.oracle[np.minimum(np.arange(episodes), len(ends.oracle) - 1)]
    return returns


def transition_rows(
    trial: Trial,
    tasks: list[Task],
    *,
    number: int,
    first_env: int,
    open_before: Open | None,
    step_is_episode: bool,
) -> Steps:
    """Every step of a trial that counts, environment after environment.

    A step's successor is in ``next_obs`` at the end of an episode and of a rollout, and else is
    the ``obs`` of the next row, so that nothing is stored twice. Actions are as the policy chose
    them, before the environment's bounds clipped them.

    Args:
        trial: rollouts of the same environments, one after the other, as arrays.
        tasks: of the trial.
        number: of the trial.
        first_env: number of the first environment within the job.
        open_before: episodes that the first rollout continues; None if it begins with a reset.
        step_is_episode: True where memory adapts, which is counted in episodes.
    """
    envs = np.arange(trial[0].num_envs)
    mask = _rows(np.concatenate([r.mask for r in trial]))
    episode, step = _clock(trial, open_before)
    known, task_of = tasks, np.broadcast_to(trial[0].task_index, episode.shape)
    if open_before is not None:
        known = [*tasks, *open_before.task]
        # An open episode keeps its task; the tasks of this trial begin with the next one.
        task_of = np.where(episode == open_before.number, len(tasks) + envs, task_of)
    task = pa.array(_rows(task_of))
    adaptation_step = np.concatenate([np.full(r.reward.shape, r.adaptation_step) for r in trial])
    together = {
        name: _rows(np.concatenate([getattr(r, name) for r in trial]))
        for name in ("action", "reward", "terminated", "truncated", "log_prob")
    }
    rows = {
        **together,
        "task_id": pa.array([t.id for t in known], pa.string()).take(task),
        "split": pa.array([t.split for t in known], pa.string()).take(task),
        "trial": np.full(step.size, number),
        "environment": np.repeat(first_env + envs, len(step)),
        "episode": _rows(episode),
        "t": _rows(step),
        "policy_version": np.full(step.size, trial[0].policy_version),
        "adaptation_step": _rows(episode if step_is_episode else adaptation_step),
        "obs": _vectors(_rows(np.concatenate([r.obs[:-1] for r in trial]))),
        "action": _vectors(action) if (action := together["action"]).ndim > 1 else action,
        "next_obs": _successors(trial, len(step)),
    }
    if mask.all():
        return rows
    keep = pa.array(mask)
    return {k: x.filter(keep) if isinstance(x, pa.Array) else x[mask] for k, x in rows.items()}


def _clock(trial: Trial, before: Open | None) -> tuple[np.ndarray, np.ndarray]:
    """(T, B): number of the episode, and step in it."""
    done = [r.terminated | r.truncated for r in trial]
    begins = np.concatenate(
        [np.concatenate([r.previous_done[None], d[:-1]]) for r, d in zip(trial, done, strict=True)]
    )
    at = np.arange(len(begins))[:, None]
    since = np.maximum.accumulate(np.where(begins, at, -1))
    later = begins.copy()
    later[0] = False  # The number is that of the first step's episode, whether new or open.
    later &= np.concatenate([r.mask for r in trial])
    number, begun = later.cumsum(0), since >= 0
    step = at - np.where(begun, since, 0)
    if before is not None:
        number, step = number + before.number, step + np.where(begun, 0, before.length)
    return number, step


def _successors(trial: Trial, num_steps: int) -> pa.Array:
    """The true successors of steps, where these are not the observation of the next row."""
    where, what, start = [], [], 0
    for rollout in trial:
        envs = np.arange(rollout.num_envs)
        last = rollout.num_steps - 1
        ended = (rollout.terminated | rollout.truncated)[last]
        where += [
            rollout.final_env * num_steps + start + rollout.final_step,
            envs[~ended] * num_steps + start + last,
        ]
        what += [rollout.final_obs, rollout.obs[-1][~ended]]
        start += rollout.num_steps
    rows, obs = np.concatenate(where), np.concatenate(what)
    order = rows.argsort()
    present = np.zeros(num_steps * trial[0].num_envs, np.bool_)
    present[rows] = True
    return _vectors(obs[order], present)


def _rows(x: np.ndarray) -> np.ndarray:
    """(T, B, ...) to rows, environment after environment."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _vectors(x: np.ndarray, present: np.ndarray | None = None) -> pa.Array:
    """Rows (N, ...) as flat lists; `present` (M,) says which rows of M they are, if not all."""
    present = np.ones(len(x), np.bool_) if present is None else present
    width = int(np.prod(x.shape[1:]))
    offsets = np.concatenate([[0], np.cumsum(present * width)]).astype(np.int32)
    values = pa.array(np.ascontiguousarray(x).reshape(-1))
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(~present))
