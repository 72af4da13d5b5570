"""The four stages: pretrain, fine-tune per task, adapt online, evaluate on held-out tasks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dmrl_ray.calls import AdaptCall
from dmrl_ray.config import (
    RLLIB,
    Adapt,
    Component,
    Evaluate,
    Finetune,
    Pretrain,
    RunConfig,
    Stage,
    settled,
)
from dmrl_ray.foreign import foreign_of
from dmrl_ray.jobs import EVALUATION_COLUMNS, run_job
from dmrl_ray.jobs import evaluate as evaluate_policy
from dmrl_ray.run import Run
from dmrl_ray.spec import JobSpec, Weights, build
from dmrl_ray.transfer import rllib_start
from dmrl_ray.types import Task


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


def job_spec(config: RunConfig, name: str) -> JobSpec:
    """The job of a stage, with what the stage leaves open taken from its source or the run."""
    stage = config.stages[name]
    source = getattr(stage, "init_from", None)
    trains = isinstance(stage, (Pretrain, Finetune))
    algorithm: Component | None = getattr(stage, "algorithm", None)
    network: Component | None = getattr(stage, "network", None)
    rollout = getattr(stage, "rollout", None) or config.rollout
    if not isinstance(stage, Pretrain):
        rollout = rollout.model_copy(update={"device": None})
    if source is not None and not source.startswith(RLLIB):
        parent = job_spec(config, source)
        network = network or parent.network
        algorithm = algorithm or (None if trains else parent.algorithm)
    return JobSpec(
        stage=name,
        name=name,
        seed=config.seed,
        tasks=config.tasks,
        network=network or config.network,
        algorithm=algorithm or config.algorithm,
        rollout=rollout,
        env_steps=getattr(stage, "env_steps", 0),
        updates=getattr(stage, "updates", 0),
        trainable=getattr(stage, "trainable", ("",)),
        learner_threads=settled(config.learners.threads),
        precision=config.learners.precision,
        compile=config.learners.compile,
        device=config.learners.device,
        record=getattr(stage, "record", False),
    )


def pretrain(run: Run, name: str, stage: Pretrain) -> None:
    """One job on the training tasks; leaves the policies `best` and `last`."""
    initial = None if stage.init_from is None else _policy(run, name, stage, "best").arrays
    progress = run_job(run, _placed(run, name), stage, initial)
    run.drop(f"{name}.learner")
    run.drop(f"{name}.shards")
    run.state["job"] = None
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
    """One job for each held-out task, all of them side by side over the workers."""
    weights = run.workers.put(_policy(run, name, stage, stage.checkpoint).arrays)
    spec = _placed(run, name)
    tasks = run.tasks(stage.split, stage.tasks)
    specs = [task_spec(spec, i, task) for i, task in enumerate(tasks)]
    finished: list[str] = list(run.state["job"] or [])
    open_specs = [s for s in specs if s.name not in finished]
    steps = 0

    def snapshot() -> None:
        run.state["job"] = list(finished)

    calls = [(s, weights, stage.updates) for s in open_specs]
    method = "train_recorded" if stage.record else "train"
    if foreign_of(spec) is not None:
        run.connect()
    with run.committing(snapshot):
        for i, (rows, trained, *recorded) in run.workers.map(method, calls):
            job = open_specs[i]
            for part in recorded[0] if recorded else ():
                run.add_steps(job, part)
            run.add_episodes(job, rows)
            run.save_policy(job.name, trained, stage.updates)
            run.event("job_finished", name, job.name, updates=stage.updates)
            finished.append(job.name)
            steps += int(rows["length"].sum())
            last = rows["return"][
                rows["adaptation_step"] == stage.updates
            ]  # None if no episode ended then.
            run.display.update(
                name,
                steps,
                return_=float(last.mean()) if len(last) else None,
                extra={"jobs": f"{len(finished)}/{len(specs)}"},
                workers_alive=(run.workers.alive, run.workers.total),
            )
            run.tick(snapshot)
    run.state["job"] = None


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
    """Streams of tasks that change without notice, all of them at once over the workers."""
    spec = job_spec(run.config, name)
    policy = _policy(run, name, stage, stage.checkpoint)
    weights = run.workers.put(policy)
    tasks = run.tasks(stage.split, stage.streams * stage.tasks_per_stream)
    streams = [tuple(tasks[i :: stage.streams]) for i in range(stage.streams)]
    size = max(1, EVALUATION_COLUMNS // stage.episodes_per_update)
    chunks = [tuple(streams[i : i + size]) for i in range(0, len(streams), size)]
    calls = [(AdaptCall(spec, chunk, stage, i), weights) for i, chunk in enumerate(chunks)]
    results = dict(run.workers.map("adapt", calls))
    for i in range(len(calls)):
        run.add_episodes(spec, results[i][0])
    rewards = np.concatenate([results[i][1] for i in range(len(calls))], axis=2)
    oracle = np.concatenate([results[i][2] for i in range(len(calls))], axis=1)
    _report_regret(run, spec, rewards, oracle)
    run.display.update(name, int(rewards.size), return_=float(rewards.sum((0, 1)).mean()))


def _report_regret(run: Run, spec: JobSpec, rewards: np.ndarray, oracle: np.ndarray) -> None:
    """Reward and regret per step since a change, as metrics whose `env_steps` is that step.

    The oracle knows the changes; its reward per step is its episode return over the episode's
    length. The first task of a stream is met without a change before it and does not count, unless
    it is the only one.
    """
    after = slice(1 if len(rewards) > 1 else 0, None)
    reward = rewards[after].mean((0, 2))
    regret = (oracle[after, None, :] - rewards[after]).mean((0, 2))
    for u in range(len(reward)):
        metrics = {"reward_since_change": float(reward[u])}
        if np.isfinite(regret[u]):
            metrics["regret"] = float(regret[u])
        run.add_metrics(spec, 0, u + 1, metrics)


def evaluate(run: Run, name: str, stage: Evaluate) -> None:
    """Trials on held-out tasks, without learning across them."""
    spec = job_spec(run.config, name)
    policy = _policy(run, name, stage, stage.checkpoint)
    weights = run.workers.put(policy)
    rows = evaluate_policy(
        run,
        spec,
        weights,
        run.tasks(stage.split, stage.tasks),
        trials=stage.trials,
        greedy=stage.greedy,
        policy_version=policy.version,
        record=stage.record,
    )
    run.add_episodes(spec, rows)
    score = None if np.isnan(rows["score"]).any() else float(rows["score"].mean())
    run.display.update(
        name, int(rows["length"].sum()), return_=float(rows["return"].mean()), score=score
    )


def _placed(run: Run, name: str) -> JobSpec:
    """The job of a stage that trains, which may learn from what earlier stages recorded."""
    return replace(job_spec(run.config, name), run_folder=str(run.writer.folder))


def _policy(run: Run, name: str, stage: Stage, checkpoint: str) -> Weights:
    """What a stage starts from; a checkpoint of RLlib is read once, and kept in the run."""
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
