"""The training loop.

    workers      collect(weights v, shard state) --+-- report (small) --> driver --> tables
    (1 call per       |                            |
     shard and        +-- trial (large) -----------)---> learner: update --> weights v + 1
     iteration)       +-- shard state -----------> next iteration's call

The driver waits for reports and metrics only; trials, weights and shard states pass by it as
references. With ``max_policy_lag: 0`` an iteration begins when the update before it has ended, and
results are gathered by shard number, so that the run is the same whatever the number of workers.
With a lag of n there are n more iterations in flight, one behind the other, begun as soon as the
weights are there that they may act with, so that workers wait neither for an update nor for each
other. The bound holds by counting, and so does what a run does: iteration i acts with weights v if
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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.config.schema import By, Pretrain, resolve_auto
from dmrl_ray.control.run_state import Run
from dmrl_ray.jobs.external import ExternalAlgorithm, external_of
from dmrl_ray.jobs.messages import CollectCall, CollectReport, EvaluateCall
from dmrl_ray.jobs.spec import JobSpec, build
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import reference
from dmrl_ray.types import Arrays, Columns, Task, storable

EVALUATION_COLUMNS = 1024
"""Environment columns of one evaluation call; fixed, so that results do not depend on workers."""

SINGLE_COLUMNS = 32
"""The same where environments step one by one, so that more of them take longer."""

SINGLE_STEPS = 16_384
"""There, also their steps in one call together: 16 seconds of steps that take a millisecond."""

EVALUATION_BYTES = 256 << 20
"""Observations of the trials of one call."""


@dataclass
class Progress:
    """How far a job has come; part of its commits."""

    updates: int = 0
    env_steps: int = 0
    best_score: float | None = None
    best_version: int = 0
    seconds: float = 0.0  # of training, over all processes that worked on it in turn


def run_job(run: Run, spec: JobSpec, stage: Pretrain, initial: Arrays | None) -> Progress:
    """Train until the budget is spent, from the newest commit if it holds this job's state."""
    external = external_of(spec, resolve_auto(run.config.workers.num))
    if external is not None:
        return _run_external(run, spec, stage, initial, external)
    with closing(run.learners(spec)) as learners:
        progress, states = _begin(run, spec, learners, initial)
        validation = _validation(run, stage)
        clock = time.monotonic()
        spent = {"time/write_s": 0.0}  # by the driver, since the newest update
        in_flight: deque[tuple[int, Any]] = deque()  # acting version and calls, oldest first
        size = stage.env_steps  # of an iteration: might be all, until the first one has told

        def snapshot() -> None:
            _snapshot(run, spec, learners, progress, states)

        while progress.env_steps < stage.env_steps:
            starts = range(progress.env_steps, stage.env_steps, size)[: stage.max_policy_lag + 1]
            for env_steps in starts[len(in_flight) :]:
                before = run.workers.states_after(in_flight[-1][1]) if in_flight else states
                iteration = progress.updates + len(in_flight)
                in_flight.append(_start(run, spec, learners, iteration, env_steps, before))
            version, started = in_flight.popleft()
            with run.committing(snapshot):
                collected = run.workers.finish_collect(started)
            waited = time.monotonic() - clock
            reports: list[CollectReport] = [c[0] for c in collected]
            states = [c[2] for c in collected]
            size = sum(report.env_steps for report in reports)
            _place(reports, progress.env_steps, size)
            progress.env_steps += size
            done = progress.env_steps >= stage.env_steps
            with _timed(spent, "time/learner_call_s"):
                metrics = learners.update(progress.env_steps - size, [c[1] for c in collected])
            metrics["policy_lag"] = float(progress.updates - version)
            progress.updates += 1
            metrics |= {"time/learner_wait_s": waited, **spent}
            spent = {}
            elapsed, clock = time.monotonic() - clock, time.monotonic()
            progress.seconds += elapsed
            with _timed(spent, "time/write_s"):
                _record(run, spec, progress, reports, metrics, elapsed)
            if done or progress.updates % stage.validate_every == 0:
                with run.uninterrupted(), _timed(spent, "time/validate_s"):
                    _validate(run, spec, learners, progress, validation)
            with _timed(spent, "time/write_s"):
                run.tick(snapshot)
        _save_policy(run, spec, "last", learners)
        snapshot()  # A larger budget can go on from here.
    return progress


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add what the inside took."""
    start = time.monotonic()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start


def _run_external(
    run: Run, spec: JobSpec, stage: Pretrain, initial: Arrays | None, external: ExternalAlgorithm
) -> Progress:
    """The same for an algorithm that samples and learns in one."""
    run.connect()
    with closing(external):
        progress, _ = _begin(run, spec, external, initial)
        validation = _validation(run, stage)
        clock = time.monotonic()

        def snapshot() -> None:
            _snapshot(run, spec, external, progress, [])

        while progress.env_steps < stage.env_steps:
            report, metrics = external.iterate(progress.env_steps)
            progress.env_steps += report.env_steps
            progress.updates += 1
            elapsed, clock = time.monotonic() - clock, time.monotonic()
            progress.seconds += elapsed
            _record(run, spec, progress, [report], metrics, elapsed)
            done = progress.env_steps >= stage.env_steps
            if done or progress.updates % stage.validate_every == 0:
                with run.uninterrupted():
                    _validate(run, spec, external, progress, validation)
            run.tick(snapshot)
        _save_policy(run, spec, "last", external)
        snapshot()
    return progress


def evaluate(
    run: Run,
    spec: JobSpec,
    weights: Any,
    tasks: list[Task],
    *,
    trials: int = 1,
    greedy: bool = True,
    policy_version: int = 0,
    record: bool = False,
) -> Columns:
    """Episode rows of a policy on some tasks, over all workers, in order of the tasks.

    Args:
        weights: of the policy, made ready by ``run.workers.put``.
        record: add every step to the transitions table.
    """
    calls = [
        (call, weights)
        for trial in range(trials)
        for call in evaluation_calls(
            spec, tasks, trial=trial, greedy=greedy, policy_version=policy_version
        )
    ]
    results = {}
    for i, answer in run.workers.map("evaluate_recorded" if record else "evaluate", calls):
        if record:
            results[i], steps = answer
            run.add_steps(spec, steps)
        else:
            results[i] = answer
    parts = [results[i] for i in range(len(calls))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def evaluation_calls(
    spec: JobSpec,
    tasks: list[Task],
    *,
    trial: int = 0,
    greedy: bool,
    policy_version: int,
    by: By = None,
    episodes: int | None = None,
    frozen: bool = False,
) -> list[EvaluateCall]:
    """Calls that play one trial on each task, of bounded memory, as `EvaluateCall` has it."""
    copies, size = 1, EVALUATION_COLUMNS
    if external_of(spec) is None:
        program = build(spec)
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
    columns = min(EVALUATION_COLUMNS, EVALUATION_BYTES // max(1, longest * step_bytes))
    if not family.vectorized:
        columns = min(columns, SINGLE_COLUMNS, SINGLE_STEPS // longest)
    return max(1, columns // copies)


@dataclass(frozen=True)
class Validation:
    """What a model is chosen by: scores on its tasks if every one has them, else returns."""

    tasks: list[Task]
    measure: Literal["score", "return"]
    greedy: bool

    def value(self, spec: JobSpec, rows: Columns) -> float:
        """The mean over the episodes of trials.

        Of who takes steps of `adapt` the last episode of every environment counts alone: what they
        make of a task, and not what finding it out costs.
        """
        values, kind = rows[self.measure], spec.algorithm.load()
        if issubclass(kind, Algorithm) and kind.adapt is not Adaptation.adapt:
            values = values[rows["episode"] == rows["episode"].max()]
        return float(values.mean())


def _validation(run: Run, stage: Pretrain) -> Validation:
    """Decided once for the job, from its tasks and not from what was played."""
    tasks = run.tasks("validation", stage.validation_tasks)
    ends = [reference(run.distribution, task) for task in tasks]
    scored = all(end is not None and end.is_scorable for end in ends)
    return Validation(tasks, "score" if scored else "return", stage.greedy)


def _begin(
    run: Run, spec: JobSpec, learners: Any, initial: Arrays | None
) -> tuple[Progress, list[Any]]:
    """From the commit, or from the start."""
    job = run.state["jobs"].get(spec.stage)
    if job is None:
        if initial is not None:
            learners.load_weights(initial)
        run.event("job_started", spec.stage, spec.name)
        return Progress(), [{} for _ in range(spec.rollout.shards)]
    progress = Progress(**job)
    learners.set_state(run.load(f"{spec.stage}.learner"), progress.updates)
    saved = run.load(f"{spec.stage}.shards") if f"{spec.stage}.shards" in run.files else {}
    states: list[Arrays] = []
    for shard in range(spec.rollout.shards):
        prefix = f"{shard}/"
        states.append({k[len(prefix) :]: v for k, v in saved.items() if k.startswith(prefix)})
    run.event("job_resumed", spec.stage, spec.name, updates=progress.updates)
    return progress, [run.workers.put(state) for state in states]


def _start(
    run: Run, spec: JobSpec, learners: Any, iteration: int, env_steps: int, states: list[Any]
) -> tuple[int, Any]:
    """Begin one iteration of all shards; also returns the version that acts in it."""
    calls = [CollectCall(spec, shard, iteration, env_steps) for shard in range(spec.rollout.shards)]
    return learners.version, run.workers.start_collect(calls, learners.published(), states)


def _place(reports: list[CollectReport], start: int, size: int) -> None:
    """Count the rows' steps from the job's start: shards go side by side, each at its own pace."""
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
        run.add_tasks(report.tasks, trained=spec.stage)
        run.add_episodes(spec, report.episodes)
        if report.steps is not None:
            run.add_steps(spec, report.steps)
        run.add_left_out(spec, report.left_out)
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
    run.add_metrics(spec, progress.updates, progress.env_steps, metrics)
    run.display.update(
        spec.stage,
        progress.env_steps,
        sps=progress.env_steps / progress.seconds,
        return_=metrics.get("return"),
        workers_alive=(run.workers.alive, run.workers.total),
    )


def _validate(
    run: Run, spec: JobSpec, learners: Any, progress: Progress, validation: Validation
) -> None:
    """Evaluate on the validation tasks; the best policy so far is kept."""
    policy, version, greedy = learners.published(), progress.updates, validation.greedy
    rows = evaluate(run, spec, policy, validation.tasks, greedy=greedy, policy_version=version)
    score = validation.value(spec, rows)
    rows["env_steps"] = np.full(len(rows["return"]), progress.env_steps)
    run.add_episodes(spec, rows)
    figures = {f"validation_{validation.measure}": score}
    run.add_metrics(spec, version, progress.env_steps, figures)
    if validation.measure == "score":
        run.display.update(spec.stage, progress.env_steps, score=score)
    newest = not spec.algorithm.load().learns_to_act
    if newest or progress.best_score is None or score > progress.best_score:
        progress.best_score, progress.best_version = score, progress.updates
        _save_policy(run, spec, "best", learners)
        run.event("best_policy", spec.stage, spec.name, update=progress.updates, score=score)


def _save_policy(run: Run, spec: JobSpec, name: str, learners: Any) -> None:
    run.save_policy(f"{spec.stage}.{name}", learners.weights(), learners.version)


def _snapshot(
    run: Run, spec: JobSpec, learners: Any, progress: Progress, states: list[Any]
) -> None:
    """Put the job's whole state where the next commit finds it."""
    run.state["jobs"][spec.stage] = asdict(progress)
    run.save(f"{spec.stage}.learner", learners.get_state())
    shards = {
        f"{shard}/{name}": array
        for shard, state in enumerate(states)
        for name, array in storable(run.workers.fetch(state)).items()
    }
    if shards:
        run.save(f"{spec.stage}.shards", shards)
