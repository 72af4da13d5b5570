"""The training loop.

    workers      collect(weights v, shard state) --+-- report (small) --> driver --> tables
    (1 call per       |                            |
     shard and        +-- trial (large) -----------)---> learner: update --> weights v + 1
     iteration)       +-- shard state -----------> next iteration's call

The driver waits for reports and metrics only; trials, weights and shard states pass through it
as references. With ``max_policy_lag: 0`` an iteration begins when the update before it has ended,
and results are gathered by shard number, so that the run is the same for any number of workers.
With a lag of n there are n more iterations in flight, one behind the other, begun as soon as the
weights are there that they may act with, so that workers wait neither for an update nor for each
other. The bound on the lag is kept by counting updates: iteration i acts with weights v if
it was begun after v updates, which is never before update i - n.

Where the time between two updates' ends went is in metrics of the later one, in seconds:

    time/learner_wait_s    from the update before to the start of this one; of it
      time/write_s           rows and commits
      time/validate_s        playing validation tasks, where that was due
    time/learner_call_s    the update as the driver saw it, the way of the data to it included
    time/update_s          the update as the learner saw it; of it
      time/compile_s         compiling, with `learners.compile`
    time/collect_s         the slowest shard
    time/shards_s          all shards together; of it
      time/env_s             environments
      time/inference_s       the policy, with values and log-probabilities
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol, cast

import numpy as np

from dmrl_ray.config.schema import By, Pretrain, resolve_auto
from dmrl_ray.control.run_state import Run
from dmrl_ray.jobs.external import ExternalAlgorithm, external_of
from dmrl_ray.jobs.messages import (
    Call,
    CallId,
    CollectCall,
    CollectReport,
    EvaluateCall,
    Result,
    Stored,
)
from dmrl_ray.jobs.protocols import Learners, Trained
from dmrl_ray.jobs.spec import JobSpec, Program, build
from dmrl_ray.jobs.worker import RolloutWorker, collect_calls
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import reference
from dmrl_ray.types import Arrays, Columns, Task, join_rows, storable

EVALUATION_ENVS = 1024
"""Environments of one evaluation call; fixed, so that results do not depend on workers."""

SINGLE_ENVS = 32
"""The same number where environments step one by one, so that more of them take longer."""

SINGLE_STEPS = 16_384
"""The steps of all of these in one call: 16 seconds, if a step takes a millisecond."""

EVALUATION_BYTES = 256 << 20
"""Bytes that the observations of the trials of one call may take."""


@dataclass
class Progress:
    """The progress of a job, which is part of its commits."""

    updates: int = 0
    env_steps: int = 0
    best_score: float | None = None
    best_version: int = 0
    seconds: float = 0.0  # of training, over all processes that worked on it in turn
    validation_due: bool = False  # after the newest update


class Iterations(Protocol):
    """The iterations of a job, one after the other."""

    states: list[Stored]
    """States of the shards after the newest iteration."""

    def iterate(self, progress: Progress) -> tuple[list[CollectReport], dict[str, float]]:
        """Make the iteration that follows; returns the reports of its shards, and metrics."""


class External:
    """Iterations of an algorithm of another library, which samples and learns in one."""

    def __init__(self, run: Run, algorithm: ExternalAlgorithm) -> None:
        self.states: list[Stored] = []
        self._run = run
        self._algorithm = algorithm

    def iterate(self, progress: Progress) -> tuple[list[CollectReport], dict[str, float]]:
        """Sample and learn."""
        with self._run.stop.waiting_for("the iteration in hand"):
            report, metrics = self._algorithm.iterate(progress.env_steps)
        return [report], metrics


class CollectAndUpdate:
    """Iterations of which workers collect the trials, and learners update with them."""

    def __init__(self, run: Run, spec: JobSpec, stage: Pretrain, learners: Learners) -> None:
        self.states: list[Stored] = [{} for _ in range(spec.rollout.shards)]
        self._run, self._spec, self._stage, self._learners = run, spec, stage, learners
        self._in_flight: deque[tuple[int, list[CallId]]] = deque()  # acting version and calls
        self._size = stage.env_steps  # of an iteration: might be all, until the first has ended
        self._updated_at: float | None = None

    def iterate(self, progress: Progress) -> tuple[list[CollectReport], dict[str, float]]:
        """Wait for the oldest iteration in flight, with as many behind it as may lag, and learn."""
        began = self._updated_at or time.monotonic()
        self._fill(progress)
        version, started = self._in_flight.popleft()
        collected = self._run.collected(started)
        waited = time.monotonic() - began
        reports = [cast(CollectReport, answer.value) for answer in collected]
        self._size = sum(report.env_steps for report in reports)
        _place(reports, progress.env_steps, self._size)
        trials = [answer.trial for answer in collected]
        start = time.monotonic()
        with self._run.stop.waiting_for("the update in hand"):
            metrics = self._learners.update(progress.env_steps, trials)
        self._updated_at = time.monotonic()
        self.states = [answer.state for answer in collected]
        metrics["policy_lag"] = float(progress.updates - version)
        metrics["time/learner_wait_s"] = waited
        metrics["time/learner_call_s"] = self._updated_at - start
        return reports, metrics

    def _fill(self, progress: Progress) -> None:
        """Begin the iterations that may act with the newest weights."""
        in_flight, lag = self._in_flight, self._stage.max_policy_lag
        starts = range(progress.env_steps, self._stage.env_steps, self._size)[: lag + 1]
        for env_steps in starts[len(in_flight) :]:
            before = in_flight[-1][1] if in_flight else self.states
            iteration = progress.updates + len(in_flight)
            quarantined = tuple(self._run.state["quarantined"])
            calls = [
                CollectCall(self._spec, shard, iteration, env_steps, quarantined)
                for shard in range(self._spec.rollout.shards)
            ]
            on_workers = collect_calls(calls, self._learners.published(), before)
            ids = [self._run.workers.submit(call) for call in on_workers]
            in_flight.append((self._learners.version, ids))


def run_job(run: Run, spec: JobSpec, stage: Pretrain, initial: Arrays | None) -> Progress:
    """Train until the budget is spent, from the newest commit if it holds this job's state."""
    external = external_of(spec, resolve_auto(run.config.workers.num))
    if external is not None:
        run.connect()
        return _train(run, spec, stage, initial, external, External(run, external))
    learners = run.learners(spec)
    iterations = CollectAndUpdate(run, spec, stage, learners)
    return _train(run, spec, stage, initial, learners, iterations)


def _train(
    run: Run,
    spec: JobSpec,
    stage: Pretrain,
    initial: Arrays | None,
    trained: Trained,
    iterations: Iterations,
) -> Progress:
    with closing(trained):
        progress = _begin(run, spec, trained, iterations, initial)
        validation = _validation(run, spec, stage)
        clock = time.monotonic()
        spent = {"time/write_s": 0.0}  # by the driver, since the newest update

        def snapshot() -> None:
            _snapshot(run, spec, trained, progress, iterations.states)

        while progress.validation_due or progress.env_steps < stage.env_steps:
            if not progress.validation_due:  # Else a stop came before it was played.
                with run.committing(snapshot):
                    reports, metrics = iterations.iterate(progress)
                progress.env_steps += sum(report.env_steps for report in reports)
                progress.updates += 1
                metrics |= spent
                spent = {}
                elapsed, clock = time.monotonic() - clock, time.monotonic()
                progress.seconds += elapsed
                with _timed(spent, "time/write_s"):
                    _record(run, spec, progress, reports, metrics, elapsed)
                done = progress.env_steps >= stage.env_steps
                progress.validation_due = done or progress.updates % stage.validate_every == 0
            if progress.validation_due:
                with run.committing(snapshot), _timed(spent, "time/validate_s"):
                    _validate(run, spec, trained, progress, validation)
                progress.validation_due = False
            with _timed(spent, "time/write_s"):
                run.tick(snapshot)
        _save_policy(run, spec, "last", trained)
        snapshot()  # A larger budget can continue from here.
    return progress


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add what the inside took."""
    start = time.monotonic()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start


def in_order(run: Run, calls: Sequence[Call[Result]]) -> list[Result]:
    """Results of calls of workers, in the order of the calls."""
    results = dict(run.map(calls))
    return [results[i] for i in range(len(calls))]


def evaluate(
    run: Run, calls: Sequence[EvaluateCall], weights: Stored, *, record: bool = False
) -> Columns:
    """Episode rows of a policy on some tasks, over all workers, in order of the tasks.

    Args:
        calls: made by `evaluation_calls`.
        weights: of the policy, made ready by ``run.workers.put``.
        record: add every step to the transitions table.
    """
    if record:
        parts: list[Columns] = [{}] * len(calls)
        recorded = [Call(RolloutWorker.evaluate_recorded, (call, weights)) for call in calls]
        for i, (rows, steps) in run.map(recorded):
            parts[i] = rows
            run.writer.add_steps(calls[i].spec, steps)
    else:
        parts = in_order(run, [Call(RolloutWorker.evaluate, (call, weights)) for call in calls])
    rows = join_rows(parts)
    run.take_faults(rows)
    return rows


def program_of(spec: JobSpec) -> Program | None:
    """A job's program, to query its properties; None for algorithms of other libraries."""
    return build(spec) if external_of(spec) is None else None


def evaluation_calls(
    spec: JobSpec,
    program: Program | None,
    tasks: list[Task],
    *,
    trials: int = 1,
    greedy: bool,
    policy_version: int = 0,
    by: By = None,
    episodes: int | None = None,
    frozen: bool = False,
) -> list[EvaluateCall]:
    """Calls that play trials on each task, of bounded memory, as `EvaluateCall` has it.

    Args:
        spec: of the job.
        program: of the job.
        tasks: each of which is played in every trial.
        trials: on each task.
    """
    copies, size = 1, EVALUATION_ENVS
    if program is not None:
        copies = program.adaptation(by).envs_per_task
        played = episodes or program.algorithm.evaluation_episodes
        size = tasks_at_once(program.distribution, copies, played)
    return [
        EvaluateCall(
            spec,
            tuple(tasks[start : start + size]),
            trial,
            start // size,
            greedy,
            policy_version,
            first_env=start * copies,
            by=by,
            episodes=episodes,
            frozen=frozen,
        )
        for trial in range(trials)
        for start in range(0, len(tasks), size)
    ]


def tasks_at_once(family: TaskDistribution, copies: int, episodes: int) -> int:
    """Tasks of one call, of bounded memory and seconds; results do not depend on workers.

    Args:
        family: of the tasks.
        copies: environments that play one task.
        episodes: of each environment.
    """
    space = family.observation_space
    step_bytes = np.dtype(space.dtype).itemsize * math.prod(space.shape or ())
    longest = episodes * family.max_episode_steps
    envs = min(EVALUATION_ENVS, EVALUATION_BYTES // max(1, longest * step_bytes))
    if not family.vectorized:
        envs = min(envs, SINGLE_ENVS, SINGLE_STEPS // longest)
    return max(1, envs // copies)


@dataclass(frozen=True)
class Validation:
    """How policies of a job are validated: by scores if every task has them, else by returns."""

    calls: list[EvaluateCall]
    measure: Literal["score", "return"]
    program: Program | None

    def value(self, rows: Columns) -> float:
        """The mean over the episodes of trials.

        Where an algorithm takes steps of `adapt`, the last episode of every environment counts
        alone: it measures the adapted policy, and not the cost of adaptation.
        """
        values = rows[self.measure]
        if self.program is not None and self.program.algorithm.has_adaptation_steps():
            values = values[rows["episode"] == rows["episode"].max()]
        return float(values.mean())


def _validation(run: Run, spec: JobSpec, stage: Pretrain) -> Validation:
    """Decide how the job is validated, once, from its tasks and not from what was played."""
    tasks = run.tasks("validation", stage.validation_tasks)
    ends = [reference(run.distribution, task) for task in tasks]
    scored = all(end is not None and end.is_scorable for end in ends)
    program = program_of(spec)
    calls = evaluation_calls(spec, program, tasks, greedy=stage.greedy)
    return Validation(calls, "score" if scored else "return", program)


def _begin(
    run: Run, spec: JobSpec, trained: Trained, iterations: Iterations, initial: Arrays | None
) -> Progress:
    """Restore the job from the newest commit, or start it."""
    job = run.state["jobs"].get(spec.stage)
    if job is None:
        if initial is not None:
            trained.load_weights(initial)
        run.event("job_started", spec.stage, spec.name)
        return Progress()
    progress = Progress(**job)
    trained.set_state(run.load(f"{spec.stage}.learner"), progress.updates)
    saved = run.load(f"{spec.stage}.shards") if f"{spec.stage}.shards" in run.files else {}
    for shard in range(len(iterations.states)):
        prefix = f"{shard}/"
        state = {k[len(prefix) :]: v for k, v in saved.items() if k.startswith(prefix)}
        iterations.states[shard] = run.workers.put(state)
    run.event("job_resumed", spec.stage, spec.name, updates=progress.updates)
    return progress


def _place(reports: list[CollectReport], start: int, size: int) -> None:
    """Count the rows' steps from the job's start: shards run side by side, each at its own pace."""
    for report in reports:
        so_far = report.episodes["env_steps"]
        report.episodes["env_steps"] = start + so_far * size // max(1, report.env_steps)


def _record(
    run: Run,
    spec: JobSpec,
    progress: Progress,
    reports: list[CollectReport],
    metrics: dict[str, float],
    elapsed: float,
) -> None:
    for report in reports:
        run.writer.add_tasks(report.tasks, trained=spec.stage)
        run.writer.add_episodes(spec, report.episodes)
        if report.steps is not None:
            run.writer.add_steps(spec, report.steps)
        run.note_left_out(spec, report.left_out)
        run.restarted(report.faults)
        if report.begun_again:
            run.event("episodes_begun_again", spec.stage, spec.name, reason=report.begun_again)
            run.display.message(f"open episodes begin again: {report.begun_again}")
    metrics["time/collect_s"] = max(report.seconds for report in reports)
    metrics["time/shards_s"] = sum(report.seconds for report in reports)
    metrics["time/env_s"] = sum(report.env_s for report in reports)
    metrics["time/inference_s"] = sum(report.inference_s for report in reports)
    steps = sum(report.env_steps for report in reports)
    metrics["steps_per_s"] = steps / elapsed
    returns = np.concatenate([report.episodes["return"] for report in reports])
    if len(returns):
        metrics["return"] = float(returns.mean())
    if metrics.get("skipped_batches"):
        run.event("batch_skipped", spec.stage, spec.name, update=progress.updates)
    run.writer.add_metrics(spec, progress.updates, progress.env_steps, metrics)
    run.display.update(
        spec.stage,
        progress.env_steps,
        sps=progress.env_steps / progress.seconds,
        return_=metrics.get("return"),
        workers_alive=(run.workers.alive, run.workers.total),
    )


def _validate(
    run: Run, spec: JobSpec, trained: Trained, progress: Progress, validation: Validation
) -> None:
    """Evaluate on the validation tasks; the best policy so far is kept."""
    version = progress.updates
    calls = [replace(call, policy_version=version) for call in validation.calls]
    rows = evaluate(run, calls, trained.published())
    score = validation.value(rows)
    rows["env_steps"] = np.full(len(rows["return"]), progress.env_steps)
    run.writer.add_episodes(spec, rows)
    figures = {f"validation_{validation.measure}": score}
    run.writer.add_metrics(spec, version, progress.env_steps, figures)
    if validation.measure == "score":
        run.display.update(spec.stage, progress.env_steps, score=score)
    newest = not spec.algorithm.load().learns_to_act
    if newest or progress.best_score is None or score > progress.best_score:
        progress.best_score, progress.best_version = score, progress.updates
        _save_policy(run, spec, "best", trained)
        run.event("best_policy", spec.stage, spec.name, update=progress.updates, score=score)


def _save_policy(run: Run, spec: JobSpec, name: str, trained: Trained) -> None:
    run.save_policy(f"{spec.stage}.{name}", trained.weights(), trained.version)


def _snapshot(
    run: Run, spec: JobSpec, trained: Trained, progress: Progress, states: list[Stored]
) -> None:
    """Put the job's whole state where the next commit finds it."""
    run.state["jobs"][spec.stage] = asdict(progress)
    run.save(f"{spec.stage}.learner", trained.get_state())
    shards = {
        f"{shard}/{name}": array
        for shard, state in enumerate(states)
        for name, array in storable(cast(Arrays, run.workers.fetch(state))).items()
    }
    if shards:
        run.save(f"{spec.stage}.shards", shards)
