"""Rollout workers: they play shards, evaluate policies and run small jobs whole.

A worker's answer depends on the arguments of the call alone, so that any worker may make any call,
and a call that was lost with its worker is simply made again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from dmrl_ray.algorithms.adaptation import play_stream
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.backend import host
from dmrl_ray.data.dataset import LeftOut
from dmrl_ray.jobs.external import external_of
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import (
    FAULTS,
    AdaptCall,
    Answer,
    Call,
    CallId,
    CollectCall,
    CollectReport,
    EvaluateCall,
    Result,
    Stored,
    TrainReport,
    WorkerEvent,
    WorkerState,
)
from dmrl_ray.jobs.spec import JobSpec, Program, Weights, build
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
from dmrl_ray.tasks.activity import COMPUTING, WAITING, during, mine
from dmrl_ray.tasks.faults import pass_signals, sample
from dmrl_ray.types import (
    Arrays,
    Columns,
    EnvironmentFault,
    Rollout,
    Task,
    Trial,
    join_rows,
    random_stream,
)

Key: TypeAlias = tuple[int | str, ...]
SinceChange: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Reward and regret (U, N) of every step since a change, of each task."""


MAX_DRAWS = 100
"""Times that tasks are drawn in place of those in quarantine."""


class RolloutWorker:
    """Plays shards with one torch thread.

    Args:
        check: called between steps; what it raises ends a call, which leaves nothing behind.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._programs: dict[Key, Program] = {}
        self._samplers: dict[Key, tuple[int, Sampler]] = {}
        self._loaded: dict[Key, int] = {}

    @during(COMPUTING)
    def collect(
        self, call: CollectCall, weights: Weights, state: Arrays
    ) -> tuple[CollectReport, Trial, Arrays]:
        """Roll out one iteration of a shard from `state`; also returns the state after it."""
        start = time.monotonic()
        torch.set_num_threads(1)
        spec, shard, iteration = call.spec, call.shard, call.iteration
        program = self._program(spec, weights, spec.rollout.device)
        sampler, begun_again = self._sampler(spec, program, shard, iteration, state)
        algorithm = program.algorithm
        num_envs = spec.rollout.num_envs
        tasks = list(spec.fixed_tasks) or _sample(call, program)
        # A job on fixed tasks continues to learn from them; else each trial's agents are new.
        task_updates = iteration if spec.fixed_tasks else 0
        stream = random_stream(spec.seed, *spec.key, "collect", shard, iteration)
        sampler.start(stream, weights.version, task_updates=task_updates)
        algorithm.progress = spec.spent(iteration, call.env_steps)
        open_before = sampler.open_episodes() if algorithm.continues_episodes else None
        known = {task.id for task in sampler.episodes.open_tasks()}  # by the iteration before
        trial = algorithm.collect(sampler, tasks)
        self._samplers[(*spec.key, shard)] = (iteration + 1, sampler)
        rows = take_episodes(sampler)
        episodes = episode_rows(
            rows, program.distribution, weights.version, scored=bool(spec.fixed_tasks)
        )
        met = [t for t in (*rows["task"], *sampler.episodes.open_tasks()) if t.id not in known]
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
                first_env=num_envs * shard,
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
            tuple(sampler.env.take_faults()),
            begun_again,
        )
        return report, trial, after

    @during(COMPUTING)
    def evaluate(self, call: EvaluateCall, weights: Weights) -> Columns:
        """Rows of one trial on each of the call's tasks."""
        external = external_of(call.spec)
        if external is not None:
            with during(WAITING):  # for the library's own processes
                return external.play(call, weights.arrays)
        sampler, trial = self._evaluate(call, weights)
        for _ in trial:  # Each is dropped when the next begins.
            pass
        return evaluation_rows(sampler, trial=call.trial) | _faults(sampler)

    @during(COMPUTING)
    def evaluate_recorded(self, call: EvaluateCall, weights: Weights) -> tuple[Columns, Steps]:
        """The same rows, and every step."""
        sampler, trial = self._evaluate(call, weights)
        steps = transition_rows(
            list(trial),
            list(call.tasks),
            number=call.trial,
            first_env=call.first_env,
            open_before=None,
            step_is_episode=sampler.memory_spans_trial,
        )
        return evaluation_rows(sampler, trial=call.trial) | _faults(sampler), steps

    @during(COMPUTING)
    def evaluate_steps(self, call: EvaluateCall, weights: Weights) -> tuple[Columns, SinceChange]:
        """The same rows with the number of the task in the call as trial, and every step's reward.

        Rewards and regrets of steps are as `rows.since_change` returns them.
        """
        sampler, trial = self._evaluate(call, weights)
        since = since_change(list(trial), call.tasks, sampler.distribution)
        return self._stream_rows(sampler, len(call.tasks), weights.version), since

    def _evaluate(self, call: EvaluateCall, weights: Weights) -> tuple[Sampler, Iterator[Rollout]]:
        torch.set_num_threads(1)
        spec = call.spec
        program = self._program(spec, weights)
        adaptation = program.adaptation(call.by)
        sampler = self._made(program, len(call.tasks) * adaptation.envs_per_task)
        # The same in every stage and run: agents that are compared meet the same random numbers.
        stream = random_stream(spec.evaluation_seed, "evaluate", call.trial, call.chunk)
        sampler.start(stream, call.policy_version, greedy=call.greedy)
        episodes = call.episodes or program.algorithm.evaluation_episodes
        agent = adaptation.begin(sampler, list(call.tasks))
        return sampler, adaptation.play(sampler, agent, episodes, frozen=call.frozen)

    @during(COMPUTING)
    def adapt(self, call: AdaptCall, weights: Weights) -> tuple[Columns, list[SinceChange]]:
        """Play streams of changing tasks.

        Returns the rows of the episodes, with the stream as their trial and episodes counted since
        the change; and for every change what `rows.since_change` says.
        """
        torch.set_num_threads(1)
        spec, settings = call.spec, call.settings
        program = self._program(spec, weights)
        family, adaptation = program.distribution, program.adaptation(settings.by)
        copies, per_task = adaptation.envs_per_task, settings.episodes_per_task
        sampler = self._made(program, len(call.streams) * copies)
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
        return episodes | _faults(sampler)

    @during(COMPUTING)
    def train(self, spec: JobSpec, weights: Arrays, updates: int) -> TrainReport:
        """Run a fine-tuning job in this worker: collect and update, `updates` times."""
        external = external_of(spec)
        if external is not None:
            with closing(external), during(WAITING):
                return external.train(weights, updates)
        learner = Learner(spec)
        learner.load_weights(weights)
        parts: list[Columns] = []
        steps: list[Steps] = []
        left_out: tuple[LeftOut, ...] = ()
        faults: tuple[EnvironmentFault, ...] = ()
        state: Arrays = {}
        env_steps = 0
        for iteration in range(updates + 1):
            self._check()
            call = CollectCall(spec, 0, iteration, env_steps)
            report, trial, state = self.collect(call, Weights(iteration, learner.weights()), state)
            report.episodes["env_steps"] += env_steps
            parts.append(report.episodes)
            left_out += report.left_out
            faults += report.faults
            if report.steps is not None:
                steps.append(report.steps)
            if iteration < updates:
                learner.update(iteration, env_steps, [trial])
            env_steps += report.env_steps
        rows = join_rows(parts)
        self._forget(spec)
        return TrainReport(rows, learner.weights(), env_steps, left_out, faults, tuple(steps))

    def _program(self, spec: JobSpec, weights: Weights, device: str | None = None) -> Program:
        key = spec.key if device is None else (*spec.key, device)
        if key not in self._programs:
            if len(self._programs) >= 8:
                for cache in (self._programs, self._samplers, self._loaded):
                    cache.clear()
            self._programs[key] = build(spec, device)
        program = self._programs[key]
        if self._loaded.get(key) != weights.version:
            program.load(weights.arrays)
            self._loaded[key] = weights.version
        return program

    def _sampler(
        self, spec: JobSpec, program: Program, shard: int, iteration: int, state: Arrays
    ) -> tuple[Sampler, str]:
        """The shard's sampler as it stood before this iteration.

        Where environments do not come to where they stood, it is a new one, whose episodes begin
        again, and the second answer says why.
        """
        at, sampler = self._samplers.pop((*spec.key, shard), (-1, None))
        if sampler is None:
            sampler = self._made(program, spec.rollout.num_envs)
        if at != iteration and program.algorithm.continues_episodes:
            try:
                sampler.set_state(self._read(state))
            except EnvironmentFault as error:
                pass_signals(error)
                return self._made(program, spec.rollout.num_envs), str(error)
        return sampler, ""

    def _made(self, program: Program, num_envs: int) -> Sampler:
        """A new sampler, which can be ended between steps."""
        sampler = program.sampler(num_envs)
        sampler.check = self._check
        return sampler

    def _read(self, state: Stored) -> Arrays:
        """Read a shard's state from the form in which it came."""
        return cast(Arrays, state)

    def _forget(self, spec: JobSpec) -> None:
        for cache in (self._programs, self._samplers, self._loaded):
            for key in [k for k in cache if k[: len(spec.key)] == spec.key]:
                del cache[key]


def _sample(call: CollectCall, program: Program) -> list[Task]:
    """The tasks of an iteration; other ones are drawn in place of those in quarantine."""
    spec, family = call.spec, program.distribution
    stream = random_stream(spec.seed, *spec.key, "tasks", call.shard, call.iteration)
    n = spec.rollout.num_envs // program.algorithm.envs_per_task
    tasks = sample(family, stream, n, spec.split)
    for _ in range(MAX_DRAWS):
        out = [i for i, task in enumerate(tasks) if task.id in call.quarantined]
        if not out:
            return tasks
        for i, task in zip(out, sample(family, stream, len(out), spec.split), strict=True):
            tasks[i] = task
    raise EnvironmentFault(
        f"environments.on_error: of {n} tasks drawn {MAX_DRAWS} times some are always among the "
        f"{len(call.quarantined)} in quarantine; repair the environment, or use restart_episode"
    )


def _faults(sampler: Sampler) -> Columns:
    """The faults after which episodes were restarted, as a column that `Run.take_faults` takes."""
    column = np.empty(1, object)
    column[0] = sampler.env.take_faults()
    return {FAULTS: column}


def _left_out(algorithm: Algorithm) -> tuple[LeftOut, ...]:
    """The data that an algorithm has opened and does not learn from."""
    found = [dataset.left_out for dataset in algorithm.datasets]
    return tuple(left_out for left_out in found if left_out is not None)


def collect_calls(
    calls: list[CollectCall], weights: Stored, states: Sequence[Stored | CallId]
) -> list[Call[object]]:
    """The calls of one iteration of every shard.

    Args:
        calls: by shard.
        weights: that act.
        states: of the shards, or the calls before these, which may still be in flight.
    """
    return [
        Call(RolloutWorker.collect, (call, weights), call.shard, state)
        for call, state in zip(calls, states, strict=True)
    ]


class LocalWorkers:
    """The workers of a run without Ray: one, in this process, that works while it is waited for.

    Args:
        check: called between the steps of environments; what it raises ends the call in hand.
    """

    total = alive = 1

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._worker = RolloutWorker(check)
        self._number = 0
        self._waiting: dict[CallId, Call[Any]] = {}
        self._answers: dict[CallId, Answer[object]] = {}
        self._call: Call[object] | None = None
        self._since = time.monotonic()

    def submit(self, call: Call[Result]) -> CallId:
        """Note a call, which `ready` makes."""
        self._number += 1
        number = CallId(self._number)
        self._waiting[number] = call
        return number

    def ready(
        self, ids: Sequence[CallId], timeout_s: float
    ) -> tuple[list[Answer[object]], list[WorkerEvent]]:
        """The answer of the first of these calls, however long it takes."""
        if ids[0] not in self._answers:
            self._make(ids[0])
        return [self._answers.pop(ids[0])], []

    def forget(self, ids: Sequence[CallId]) -> None:
        """Calls that are not made."""
        for number in ids:
            self._waiting.pop(number, None)
            self._answers.pop(number, None)

    def states(self) -> list[WorkerState]:
        """The call that this process makes, if it makes one, and since when."""
        doing = mine().read() if self._call is not None else None
        return [WorkerState(0, os.getpid(), "", self._call, self._since, doing)]

    def put(self, value: object) -> Stored:
        """The value."""
        return value

    def fetch(self, value: Stored) -> object:
        """The value."""
        return value

    def close(self) -> None:
        """Nothing to end."""

    def _make(self, number: CallId) -> None:
        before = self._waiting[number].state
        if isinstance(before, CallId):
            self._make(before)
        call = self._waiting.pop(number)
        self._call, self._since = call, time.monotonic()
        try:
            if call.shard is None:
                answer = Answer(number, call.method(self._worker, *call.arguments))
            else:
                answer = Answer(number, *call.method(self._worker, *call.arguments, call.state))
        finally:
            self._call, self._since = None, time.monotonic()
        self._answers[number] = answer
        for other, after in self._waiting.items():
            if after.state == number:
                self._waiting[other] = replace(after, state=answer.state)
