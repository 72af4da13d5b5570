"""Rollout workers: they play shards, evaluate policies and run small jobs whole.

A worker is a carrier: what it returns depends on its arguments alone, so that any worker may do
any call, and a call that was lost with its worker is simply made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeAlias

import numpy as np
import torch

from dmrl_ray.algorithms.adaptation import play_stream
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.backend import host
from dmrl_ray.data.dataset import LeftOut
from dmrl_ray.jobs.external import external_of
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import AdaptCall, CollectCall, CollectReport, EvaluateCall
from dmrl_ray.jobs.spec import JobSpec, Program, Weights, build, set_weights
from dmrl_ray.rollout.rows import (
    Steps,
    episode_rows,
    evaluation_rows,
    since_change,
    steps_made,
    take_episodes,
    task_rows,
    transition_rows,
)
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.faults import sample
from dmrl_ray.types import Arrays, Columns, Rollout, Trial, random_stream

Key: TypeAlias = tuple[int | str, ...]
SinceChange: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Reward and regret (U, N) of every step since a change, of each task."""


class RolloutWorker:
    """Plays shards with one torch thread."""

    def __init__(self) -> None:
        self._programs: dict[Key, Program] = {}
        self._samplers: dict[Key, tuple[int, Sampler]] = {}
        self._loaded: dict[Key, int] = {}

    def collect(
        self, call: CollectCall, weights: Weights, state: Arrays
    ) -> tuple[CollectReport, Trial, Arrays]:
        """Roll out one iteration of a shard from `state`; also returns the state after it."""
        start = time.monotonic()
        torch.set_num_threads(1)
        spec, shard, iteration = call.spec, call.shard, call.iteration
        program = self._program(spec, weights, spec.rollout.device)
        sampler = self._sampler(spec, program, shard, iteration, state)
        algorithm = program.algorithm
        columns = spec.rollout.num_envs
        tasks = list(spec.fixed_tasks) or sample(
            program.distribution,
            random_stream(spec.seed, *spec.key, "tasks", shard, iteration),
            columns // algorithm.envs_per_task,
            spec.split,
        )
        # A job on fixed tasks goes on to learn from them; else each trial's agents are new.
        task_updates = iteration if spec.fixed_tasks else 0
        stream = random_stream(spec.seed, *spec.key, "collect", shard, iteration)
        sampler.start(stream, weights.version, task_updates=task_updates)
        algorithm.progress = spec.spent(iteration, call.env_steps)
        open_before = sampler.open_episodes() if algorithm.continues_episodes else None
        told = {task.id for task in sampler.episodes.open_tasks()}  # by the iteration before
        trial = algorithm.collect(sampler, tasks)
        self._samplers[(*spec.key, shard)] = (iteration + 1, sampler)
        rows = take_episodes(sampler)
        episodes = episode_rows(
            rows, program.distribution, weights.version, scored=bool(spec.fixed_tasks)
        )
        met = [t for t in (*rows["task"], *sampler.episodes.open_tasks()) if t.id not in told]
        made = steps_made(trial, program.distribution)
        # What is returned may be shorter than what was played, of which it is made.
        episodes["env_steps"] = made[np.minimum(rows["step"].astype(np.int64), len(made)) - 1]
        episodes["trial"] = np.full(len(rows["step"]), iteration)
        after = sampler.get_state() if algorithm.continues_episodes else {}
        recorded = None
        if spec.record:
            recorded = transition_rows(
                [rollout.map(host) for rollout in trial],
                tasks,
                number=iteration,
                first_env=columns * shard,
                open_before=open_before,
                step_is_episode=algorithm.memory_spans_trial,
            )
            recorded["adaptation_step"] = np.asarray(recorded["adaptation_step"]) + task_updates
        report = CollectReport(
            episodes,
            int(made[-1]),
            time.monotonic() - start,
            sampler.env_s,
            sampler.inference_s,
            task_rows(met),
            recorded,
            _left_out(algorithm) if shard == iteration == 0 else (),
        )
        return report, trial, after

    def evaluate(self, call: EvaluateCall, weights: Weights) -> Columns:
        """Rows of one trial on each of the call's tasks."""
        external = external_of(call.spec)
        if external is not None:
            return external.play(call, weights.arrays)
        sampler, trial = self._evaluate(call, weights)
        for _ in trial:  # Each is dropped when the next begins.
            pass
        return evaluation_rows(sampler, trial=call.trial)

    def evaluate_recorded(self, call: EvaluateCall, weights: Weights) -> tuple[Columns, Steps]:
        """The same, and every step."""
        sampler, trial = self._evaluate(call, weights)
        steps = transition_rows(
            list(trial),
            list(call.tasks),
            number=call.trial,
            first_env=call.first_env,
            open_before=None,
            step_is_episode=sampler.memory_spans_trial,
        )
        return evaluation_rows(sampler, trial=call.trial), steps

    def evaluate_steps(self, call: EvaluateCall, weights: Weights) -> tuple[Columns, SinceChange]:
        """The same with the number of the task among the call's as trial, and what every step got.

        That is as `rows.since_change` says.
        """
        sampler, trial = self._evaluate(call, weights)
        since = since_change(list(trial), call.tasks, sampler.distribution)
        return self._stream_rows(sampler, len(call.tasks), weights.version), since

    def _evaluate(self, call: EvaluateCall, weights: Weights) -> tuple[Sampler, Iterator[Rollout]]:
        torch.set_num_threads(1)
        spec = call.spec
        program = self._program(spec, weights)
        adaptation = program.adaptation(call.by)
        sampler = program.sampler(len(call.tasks) * adaptation.envs_per_task)
        # The same in every stage and run: what is compared meets the same chances.
        stream = random_stream(spec.evaluation_seed, "evaluate", call.trial, call.chunk)
        sampler.start(stream, call.policy_version, greedy=call.greedy)
        episodes = call.episodes or program.algorithm.evaluation_episodes
        agent = adaptation.begin(sampler, list(call.tasks))
        return sampler, adaptation.play(sampler, agent, episodes, frozen=call.frozen)

    def adapt(self, call: AdaptCall, weights: Weights) -> tuple[Columns, list[SinceChange]]:
        """Meet streams of changing tasks.

        Returns the rows of the episodes, with the stream as their trial and episodes counted since
        the change; and for every change what `rows.since_change` says.
        """
        torch.set_num_threads(1)
        spec, settings = call.spec, call.settings
        program = self._program(spec, weights)
        family, adaptation = program.distribution, program.adaptation(settings.by)
        copies, per_task = adaptation.envs_per_task, settings.episodes_per_task
        sampler = program.sampler(len(call.streams) * copies)
        stream = random_stream(spec.evaluation_seed, "streams", call.chunk)
        sampler.start(stream, weights.version, greedy=settings.greedy)
        since = [
            since_change(trial, [tasks[k] for tasks in call.streams], family)
            for k, trial in enumerate(play_stream(adaptation, sampler, call.streams, per_task))
        ]
        return self._stream_rows(sampler, len(call.streams), weights.version, per_task), since

    def _stream_rows(
        self, sampler: Sampler, num: int, version: int, per_task: int | None = None
    ) -> Columns:
        """Rows of episodes whose trial is the number of their task, or of their stream of tasks."""
        rows = take_episodes(sampler)
        change = np.zeros(len(rows["step"]), np.int64)
        if per_task is not None:
            change, rows["episode"] = np.divmod(rows["episode"].astype(np.int64), per_task)
        episodes = episode_rows(rows, sampler.distribution, version, scored=True)
        episodes["change"] = change
        episodes["env_steps"] = rows["step"].astype(np.int64)
        episodes["trial"] = rows["environment"].astype(np.int64) // (sampler.num_envs // num)
        return episodes

    def train(
        self, spec: JobSpec, weights: Arrays, updates: int
    ) -> tuple[Columns, Arrays, int, tuple[LeftOut, ...]]:
        """A small job whole: a shard collected and learned from, `updates` times.

        Returns the rows of its episodes, the weights at its end, the environment steps that it
        made, and what it left out of data.
        """
        external = external_of(spec)
        if external is not None:
            with closing(external):
                return (*external.train(weights, updates), ())
        return self.train_recorded(spec, weights, updates)[:4]

    def train_recorded(
        self, spec: JobSpec, weights: Arrays, updates: int
    ) -> tuple[Columns, Arrays, int, tuple[LeftOut, ...], list[Steps]]:
        """The same, and every step in the order of learning, if the job is recorded."""
        learner = Learner(spec)
        learner.load_weights(weights)
        parts: list[Columns] = []
        steps: list[Steps] = []
        left_out: tuple[LeftOut, ...] = ()
        state: Arrays = {}
        env_steps = 0
        for iteration in range(updates + 1):
            call = CollectCall(spec, 0, iteration, env_steps)
            report, trial, state = self.collect(call, Weights(iteration, learner.weights()), state)
            report.episodes["env_steps"] += env_steps
            parts.append(report.episodes)
            left_out += report.left_out
            if report.steps is not None:
                steps.append(report.steps)
            if iteration < updates:
                learner.update(iteration, env_steps, [trial])
            env_steps += report.env_steps
        rows = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        self._forget(spec)
        return rows, learner.weights(), env_steps, left_out, steps

    def _program(self, spec: JobSpec, weights: Weights, device: str | None = None) -> Program:
        key = spec.key if device is None else (*spec.key, device)
        if key not in self._programs:
            if len(self._programs) >= 8:
                for cache in (self._programs, self._samplers, self._loaded):
                    cache.clear()
            self._programs[key] = build(spec, device)
        program = self._programs[key]
        if self._loaded.get(key) != weights.version:
            set_weights(program.policy, weights.arrays)
            self._loaded[key] = weights.version
        return program

    def _sampler(
        self, spec: JobSpec, program: Program, shard: int, iteration: int, state: Arrays
    ) -> Sampler:
        """The shard's sampler as it stood before this iteration."""
        at, sampler = self._samplers.pop((*spec.key, shard), (-1, None))
        if sampler is None:
            sampler = program.sampler(spec.rollout.num_envs)
        if at != iteration and program.algorithm.continues_episodes:
            sampler.set_state(self._read(state))
        return sampler

    def _read(self, state: Arrays) -> Arrays:
        """A shard's state, from the form in which it came."""
        return state

    def _forget(self, spec: JobSpec) -> None:
        for cache in (self._programs, self._samplers, self._loaded):
            for key in [k for k in cache if k[: len(spec.key)] == spec.key]:
                del cache[key]


def _left_out(algorithm: Algorithm) -> tuple[LeftOut, ...]:
    """What an algorithm does not learn from, of the data that it has opened."""
    found = [dataset.left_out for dataset in algorithm.datasets]
    return tuple(left_out for left_out in found if left_out is not None)


class LocalWorkers:
    """The worker pool of a run without Ray: one worker, in this process.

    Args:
        check: called between two calls of `map`; what it raises ends the map.
    """

    total = alive = 1

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._worker = RolloutWorker()
        self._check = check

    def start_collect(
        self, calls: list[CollectCall], weights: Any, states: list[Any]
    ) -> list[tuple[CollectReport, Any, Any]]:
        """Begin one iteration of every shard; the answer is for `finish_collect`."""
        return [self._worker.collect(c, weights, s) for c, s in zip(calls, states, strict=True)]

    def states_after(self, started: list[tuple[CollectReport, Any, Any]]) -> list[Any]:
        """What the next iteration begins with, while this one may still be in flight."""
        return [state for _, _, state in started]

    def finish_collect(
        self, started: list[tuple[CollectReport, Any, Any]]
    ) -> list[tuple[CollectReport, Any, Any]]:
        """Reports, trials and states by shard number."""
        return started

    def map(self, method: str, calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Results of a worker's method over many arguments, with their indices, as they come."""
        for i, arguments in enumerate(calls):
            self._check()
            yield i, getattr(self._worker, method)(*arguments)

    def put(self, value: Any) -> Any:
        """Make a large argument ready to be used in many calls."""
        return value

    def fetch(self, value: Any) -> Any:
        """The value behind what a call returned as large."""
        return value

    def close(self) -> None:
        """Nothing to end."""
