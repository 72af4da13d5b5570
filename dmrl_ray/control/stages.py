"""The four stages: pretrain, fine-tune per task, adapt online, evaluate on held-out tasks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dmrl_ray.config.schema import (
    RLLIB,
    Adapt,
    Evaluate,
    Finetune,
    Pretrain,
    Stage,
)
from dmrl_ray.control.run_state import Run
from dmrl_ray.control.train_loop import evaluate as evaluate_policy
from dmrl_ray.control.train_loop import (
    evaluation_calls,
    in_order,
    program_of,
    run_job,
    tasks_at_once,
)
from dmrl_ray.data.lineage import learned_from
from dmrl_ray.data.sources import recordings_of
from dmrl_ray.jobs.external import external_of
from dmrl_ray.jobs.messages import AdaptCall, Call, EvaluateCall, Stored
from dmrl_ray.jobs.spec import JobSpec, Program, Weights, build, job_spec
from dmrl_ray.jobs.transfer import rllib_start
from dmrl_ray.jobs.worker import RolloutWorker, SinceChange
from dmrl_ray.results.intervals import t_interval
from dmrl_ray.rollout.rows import mean_of_known
from dmrl_ray.types import Columns, Task


def run_stages(run: Run) -> None:
    """Run the stages that are not done yet, in the order of the config."""
    if len(run.state["done"]) == len(run.config.stages):
        run.display.message("all stages are done already")
        return
    for name in run.config.stages:
        if name in run.state["done"]:
            continue
        run.event("stage_started", name)
        run_stage(run, name)
        run.state["done"].append(name)
        run.event("stage_finished", name)
        run.commit()
    run.event("run_finished")
    run.commit()


def run_stage(run: Run, name: str) -> None:
    """Run one stage to its end, from the newest commit if that is inside it."""
    stage = run.config.stages[name]
    total = stage.env_steps if isinstance(stage, Pretrain) else None
    run.display.stage(name, total)
    if isinstance(stage, Pretrain):
        pretrain(run, name, stage)
    elif isinstance(stage, Finetune):
        finetune(run, name, stage)
    elif isinstance(stage, Adapt):
        adapt(run, name, stage)
    else:
        evaluate(run, name, stage)
    run.display.finish(name)


def pretrain(run: Run, name: str, stage: Pretrain) -> None:
    """Train one job on the training tasks; leaves the policies `best` and `last`, and the state
    that a larger budget continues from."""
    initial = None if stage.init_from is None else _policy(run, name, stage, "best").arrays
    spec = _placed(run, name)
    _note_data(run, spec)
    progress = run_job(run, spec, stage, initial)
    run.event(
        "job_finished",
        name,
        name,
        updates=progress.updates,
        env_steps=progress.env_steps,
        seconds=progress.seconds,
        best_score=progress.best_score,
        best_update=progress.best_version,
    )


def finetune(run: Run, name: str, stage: Finetune) -> None:
    """Train one job for each held-out task, all of them side by side over the workers."""
    weights = run.workers.put(_policy(run, name, stage, stage.checkpoint).arrays)
    spec = _placed(run, name)
    _note_data(run, spec)
    tasks = run.tasks(stage.split, stage.tasks)
    specs = [task_spec(spec, i, task) for i, task in enumerate(tasks)]
    finished: list[str] = list(run.state["jobs"].get(name, []))
    open_specs = [s for s in specs if s.name not in finished]
    steps = 0

    def snapshot() -> None:
        run.state["jobs"][name] = list(finished)

    calls = [Call(RolloutWorker.train, (s, weights, stage.updates)) for s in open_specs]
    if external_of(spec) is not None:
        run.connect()
    with run.committing(snapshot):
        for i, report in run.map(calls):
            job, rows = open_specs[i], report.episodes
            if job.name == specs[0].name:  # All learn from the same data.
                run.note_left_out(job, report.left_out)
            run.restarted(report.faults)
            for part in report.steps:
                run.writer.add_steps(job, part)
            run.writer.add_episodes(job, rows)
            run.save_policy(job.name, report.weights, stage.updates)
            made = {"updates": stage.updates, "env_steps": report.env_steps}
            run.event("job_finished", name, job.name, **made)
            finished.append(job.name)
            steps += report.env_steps
            at_the_end = rows["policy_version"] == stage.updates
            last = rows["return"][at_the_end]  # Empty if no episode ended then.
            run.display.update(
                name,
                steps,
                return_=float(last.mean()) if len(last) else None,
                extra={"jobs": f"{len(finished)}/{len(specs)}"},
                workers_alive=(run.workers.alive, run.workers.total),
            )
            run.tick(snapshot)
    run.state["jobs"].pop(name, None)


def task_spec(spec: JobSpec, number: int, task: Task) -> JobSpec:
    """The job that specialises to one task, on one thread, in one shard.

    It is named by its number: a task's id may be any text, which could not name a file, and small
    families draw the same task more than once.
    """
    return replace(
        spec,
        name=f"{spec.stage}.{number:04d}",
        fixed_tasks=(task,),
        split=task.split,
        rollout=spec.rollout.model_copy(update={"shards": 1}),
        learner_threads=1,
        compile=False,  # It would take longer than the job.
        device="cpu",
    )


def adapt(run: Run, name: str, stage: Adapt) -> None:
    """Play streams of tasks, all at once over the workers, and the references beside them."""
    spec = job_spec(run.config, name)
    policy = _policy(run, name, stage, stage.checkpoint)
    weights = run.workers.put(policy)
    tasks = run.tasks(stage.split, stage.streams * stage.tasks_per_stream)
    program = build(spec)
    restarted, figures = spec.name, []
    if stage.change == "ignore":
        met = _play_streams(run, spec, program, stage, weights, tasks)
        figures.append(_add_met(run, spec, stage, policy.version, *met))
        restarted = f"{spec.name}.restarted"
    for job, frozen in ((restarted, False), (f"{spec.name}.unadapted", True)):
        calls = evaluation_calls(
            spec,
            program,
            tasks,
            greedy=stage.greedy,
            policy_version=policy.version,
            by=stage.by,
            episodes=stage.episodes_per_task,
            frozen=frozen,
        )
        met = _meet_one_by_one(run, stage, weights, calls)
        figures.append(_add_met(run, replace(spec, name=job), stage, policy.version, *met))
    steps, returns = zip(*figures, strict=True)
    run.display.update(name, sum(steps), return_=returns[0])


def _play_streams(
    run: Run, spec: JobSpec, program: Program, stage: Adapt, weights: Stored, tasks: list[Task]
) -> tuple[list[Columns], list[SinceChange]]:
    """Episode rows of the agent that gets no signal of task changes, and its steps since each."""
    copies = program.adaptation(stage.by).envs_per_task
    streams = [tuple(tasks[i :: stage.streams]) for i in range(stage.streams)]
    episodes = stage.tasks_per_stream * stage.episodes_per_task
    size = tasks_at_once(program.distribution, copies, episodes)
    starts = range(0, len(streams), size)
    calls = [
        AdaptCall(spec, tuple(streams[start : start + size]), stage, i)
        for i, start in enumerate(starts)
    ]
    played = in_order(run, [Call(RolloutWorker.adapt, (call, weights)) for call in calls])
    for start, (rows, _) in zip(starts, played, strict=True):
        rows["trial"] = start + rows["trial"]
    by_change = zip(*(since for _, since in played), strict=True)
    return [rows for rows, _ in played], [part for parts in by_change for part in parts]


def _meet_one_by_one(
    run: Run, stage: Adapt, weights: Stored, calls: list[EvaluateCall]
) -> tuple[list[Columns], list[SinceChange]]:
    """The same for an agent that starts from the policy with every task."""
    played = in_order(run, [Call(RolloutWorker.evaluate_steps, (call, weights)) for call in calls])
    number = 0
    for call, (rows, _) in zip(calls, played, strict=True):
        rows["change"], rows["trial"] = np.divmod(number + rows["trial"], stage.streams)
        number += len(call.tasks)
    return [rows for rows, _ in played], [since for _, since in played]


def _add_met(
    run: Run,
    spec: JobSpec,
    stage: Adapt,
    version: int,
    parts: list[Columns],
    since: list[SinceChange],
) -> tuple[int, float]:
    """Add an agent's episodes and regret to the tables; returns its steps and mean return."""
    for rows in parts:
        run.take_faults(rows)
        run.writer.add_episodes(spec, rows)
    reward, regret = _joined(since, stage)
    _report_regret(run, spec, version, reward, regret)
    steps = sum(int(rows["length"].sum()) for rows in parts)
    return steps, float(np.concatenate([rows["return"] for rows in parts]).mean())


def _joined(parts: list[SinceChange], stage: Adapt) -> tuple[np.ndarray, np.ndarray]:
    """(K, U, N) reward and regret at each step since change k of stream n; NaN where none was.

    Args:
        parts: (U, n) each, whose tasks follow one another: the first of all streams, the second ...
    """
    longest = max(len(reward) for reward, _ in parts)
    joined = []
    for i in range(2):
        padded = [
            np.pad(part[i], [(0, longest - len(part[i])), (0, 0)], constant_values=np.nan)
            for part in parts
        ]
        whole = np.concatenate(padded, axis=1)
        joined.append(whole.reshape(longest, -1, stage.streams).swapaxes(0, 1))
    return joined[0], joined[1]


def _report_regret(
    run: Run, spec: JobSpec, version: int, reward: np.ndarray, regret: np.ndarray
) -> None:
    """Reward and regret per step since a change, as metrics whose `env_steps` is that step.

    The first task of a stream has no change before it: it has metrics of its own,
    ``regret_first``, with the ends of 95 % intervals over streams, as all have.
    """
    parts = {"first": slice(0, 1), "since_change": slice(1, None)}
    for part, changes in parts.items():
        for measure, values in (("reward", reward[changes]), ("regret", regret[changes])):
            if not np.isfinite(values).any():
                continue
            for u, met in enumerate(mean_of_known(values, axis=0)):
                known = met[np.isfinite(met)]
                if len(known) == 0:
                    continue
                low, high = t_interval(known) if len(known) > 1 else (np.nan, np.nan)
                name = f"{measure}_{part}"
                figures = {name: float(known.mean()), f"{name}_low": low, f"{name}_high": high}
                run.writer.add_metrics(spec, version, u + 1, figures)


def evaluate(run: Run, name: str, stage: Evaluate) -> None:
    """Play trials on held-out tasks, without learning across them."""
    spec = job_spec(run.config, name)
    policy = _policy(run, name, stage, stage.checkpoint)
    weights = run.workers.put(policy)
    calls = evaluation_calls(
        spec,
        program_of(spec),
        run.tasks(stage.split, stage.tasks),
        trials=stage.trials,
        greedy=stage.greedy,
        policy_version=policy.version,
    )
    rows = evaluate_policy(run, calls, weights, record=stage.record)
    run.writer.add_episodes(spec, rows)
    score = None if np.isnan(rows["score"]).any() else float(rows["score"].mean())
    run.display.update(
        name, int(rows["length"].sum()), return_=float(rows["return"].mean()), score=score
    )


def _placed(run: Run, name: str) -> JobSpec:
    """The job of a stage that trains, which may learn from what earlier stages recorded."""
    return replace(job_spec(run.config, name), run_folder=str(run.writer.folder))


def _note_data(run: Run, spec: JobSpec) -> None:
    """Note the recordings that a stage learns from: their tasks, and where they were made."""
    if spec.stage in run.state["jobs"]:  # It is noted already.
        return
    for field, data in recordings_of(spec.algorithm.settings).items():
        found = learned_from(data, run.writer.folder)
        run.writer.add_trained_on(spec.stage, found.tasks)
        run.event(
            "learned_from",
            spec.stage,
            setting=field,
            runs=found.runs,
            tasks=len(found.tasks),
            complete=found.complete,
            allowed_by=found.allowed_by,
        )


def _policy(run: Run, name: str, stage: Stage, checkpoint: str) -> Weights:
    """The policy that a stage starts from; one of RLlib is read once, and kept in the run."""
    assert stage.init_from is not None
    if not stage.init_from.startswith(RLLIB):
        return run.load_policy(f"{stage.init_from}.{checkpoint}")
    kept = f"{name}.start"
    if kept in run.files:
        return run.load_policy(kept)
    start = rllib_start(stage.init_from, build(job_spec(run.config, name)).policy)
    run.save(kept, start.weights)
    run.event(
        "policy_read",
        name,
        source=stage.init_from,
        matched=start.matched,
        missing=start.missing,
        unused=start.unused,
    )
    run.display.message(f"{name} starts from {stage.init_from}:\n{start.table()}")
    return Weights(0, start.weights)
