"""The schema of a run: every setting, its default and its meaning.

`dmrl_ray.config.loading` reads YAML into it.
"""

from __future__ import annotations

import os
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from dmrl_ray.config.components import (
    LARGEST_NUMBER,
    LARGEST_SEED,
    LARGEST_SIZE,
    SHORT_NAMES,
    Component,
    Count,
    Number,
    Settings,
    Size,
    Sizes,
)

__all__ = [
    "LARGEST_NUMBER",
    "LARGEST_SIZE",
    "SHORT_NAMES",
    "Component",
    "Count",
    "Number",
    "RunConfig",
    "Settings",
    "Size",
    "Sizes",
    "Stage",
]

RLLIB = "rllib:"
"""Prefix of an ``init_from`` that names a checkpoint of RLlib instead of a stage."""


_AUTO = Discriminator(lambda value: "auto" if value == "auto" else "number")  # one message, not two
Processes: TypeAlias = Annotated[
    Annotated[int, Field(ge=0, le=LARGEST_SIZE), Tag("number")]
    | Annotated[Literal["auto"], Tag("auto")],
    _AUTO,
]
Threads: TypeAlias = Annotated[
    Annotated[Size, Tag("number")] | Annotated[Literal["auto"], Tag("auto")], _AUTO
]


def resolve_auto(number: Processes | Threads) -> int:
    """Returns the number; 1 for an auto that `placement` has not resolved, as in checks."""
    return 1 if number == "auto" else number


class RolloutSettings(Settings):
    """The rollouts of one iteration. These settings change results; `workers` does not."""

    shards: Size = 2
    """Units of work: each has its own environments and random streams. At most this many workers
    are busy."""

    num_envs: Number = 64
    """Environments per shard."""

    device: Literal["cpu", "cuda"] | None = None
    """Device on which pretraining steps environments and policy, as tensors that the learner uses
    directly; requires ``workers: {num: 0}``. A GPU needs thousands of environments to be busy. null
    is NumPy in the workers, as in all other stages."""


class TaskRollout(Settings):
    """The rollout of one iteration of a job on a single task, in one shard and in NumPy."""

    num_envs: Number = 64
    """Parallel environments."""


class WorkerSettings(Settings):
    """Rollout workers. Their number changes the speed of a run, never its result."""

    num: Processes = "auto"
    """Ray actors that collect rollouts; 0 runs everything in this process, without Ray. auto
    chooses by the measured time of a step when the run starts, and reports its choice."""

    max_failures: int = Field(default=100, ge=0, le=LARGEST_NUMBER)
    """Number of workers that may be lost before the run stops."""


class EnvironmentSettings(Settings):
    """The environments of all stages."""

    read_with: ClassVar = {"max": ("on_error", ("restart_episode", "quarantine_task"))}

    on_error: Literal["stop", "restart_episode", "quarantine_task"] = "stop"
    """Reaction to an environment that raises or returns what it must not: stop ends the run.
    restart_episode cuts the episode there, as a time limit does, and begins another in a new
    environment; quarantine_task also draws the task no more for training. Both are for families
    that step environments one by one, such as `gym`."""

    max: Number = 10
    """Faults of environments in a run, after which it stops."""

    timeout_s: float | None = Field(default=None, gt=0)
    """Seconds after which a call of the task family or of an environment, such as a reset or a
    step, ends the run with an error that names it. null waits for as long as it takes, and says
    so."""


class LearnerSettings(Settings):
    """Learners, which train the policy."""

    num: Size = 1
    """Learner actors; gradients are averaged over them. More than one requires workers."""

    threads: Threads = "auto"
    """Torch threads of each learner; auto chooses by the number of cores. Results depend on it in
    the last bits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the layers below the heads, in gradient steps on minibatches. bfloat16 is faster
    on hardware that supports it, and learns worse where differences are small, as in long
    trials."""

    compile: bool = False
    """Compile the gradient computation of policies without memory: twice as fast for small
    networks, after seconds of compilation. Requires a C++ compiler, or Triton on a GPU."""


class CommitSettings(Settings):
    """When a run is committed to disk; results do not depend on it."""

    read_with: ClassVar = {"every_s": ("every_updates", (None,))}

    every_s: float = Field(default=10.0, ge=0)
    """Seconds between commits inside a job; the end of a job is always committed."""

    every_updates: Count | None = Field(default=None, ge=1)
    """Updates between commits, instead of seconds."""

    keep: int = Field(default=3, ge=2, le=LARGEST_NUMBER)
    """Number of commits whose checkpoints are kept on disk."""


class Starting(Settings):
    """Settings shared by all stages, which may start from a policy."""

    trust: bool = False
    """Allow reading a checkpoint of RLlib: it is a pickle, and can run code."""

    @model_validator(mode="after")
    def _trust_needs_rllib(self) -> Starting:
        if self.trust and not str(getattr(self, "init_from", None)).startswith(RLLIB):
            raise ValueError("trust: is read only where init_from is rllib:PATH; leave it out")
        return self

    @field_validator("init_from", check_fields=False)
    @classmethod
    def _rllib_needs_trust(cls, source: str | None, info: ValidationInfo) -> str | None:
        if source is None or not source.startswith(RLLIB):
            return source
        if not info.data.get("trust"):
            raise ValueError(
                "a checkpoint of RLlib is a pickle, which can run code when it is read; if you "
                "trust its source, set trust: true beside it"
            )
        return RLLIB + os.path.abspath(os.path.expanduser(source.removeprefix(RLLIB)))


class Training(Starting):
    """Settings shared by the stages that train."""

    algorithm: Component | None = None
    """The algorithm; the run's if null."""

    network: Component | None = None
    """The network; the run's if null."""

    record: bool = False
    """Record every transition in the transitions table, in the order of training."""

    allow_seen: bool = False
    """Allow learning from recordings of tasks that the policy is selected or reported on, which the
    report marks."""


class Pretrain(Training):
    """Train one policy on the training tasks; keep the best on the validation tasks."""

    type: Literal["pretrain"] = "pretrain"

    env_steps: Count = Field(ge=1)
    """Environment steps to train for."""

    rollout: RolloutSettings | None = None
    """The rollout; the run's if null."""

    max_policy_lag: int = Field(default=0, ge=0, le=1_000)
    """Updates by which the acting policy may lag behind the learner; 0 is synchronous and exact."""

    validate_every: Count = Field(default=20, ge=1)
    """Updates between evaluations on the validation split."""

    validation_tasks: Number = 128
    """Tasks in each of these evaluations, always the same ones."""

    greedy: bool = True
    """Take the most probable action in these evaluations. false is better for a policy that
    explores by sampling, here and in evaluation stages."""

    init_from: str | None = None
    """Name of an earlier stage whose weights to start from or, in all stages, ``rllib:PATH``, a
    checkpoint of RLlib."""


class Finetune(Training):
    """Fine-tune a pretrained policy on single tasks, one job per task, in parallel."""

    type: Literal["finetune"] = "finetune"

    init_from: str
    """Name of the stage whose policy is fine-tuned."""

    checkpoint: Literal["best", "last"] = "best"
    """Which of that stage's checkpoints."""

    split: Literal["train", "validation", "test"] = "test"
    """Split of the tasks to fine-tune on."""

    tasks: Number = 16
    """Number of tasks, and of jobs."""

    rollout: TaskRollout | None = None
    """The rollout; the run's ``num_envs`` if null."""

    updates: Number = 3
    """Updates on each task; the return before update n is reported as adaptation step n."""

    trainable: tuple[str, ...] = ("",)
    """Prefixes of the names of the parameters that are trained; the others are frozen. ``[""]`` is
    all, ``[policy_head, value_head]`` or ``["last:1"]`` the heads, ``["last:2"]`` also the last
    layer before them, ``["*adapter*"]`` a pattern: adapters that ``network`` adds here."""


class ContinuedTraining(Settings):
    """A policy-gradient step after every round of episodes, on each task by itself."""

    type: Literal["continued"] = "continued"

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The optimizer; its state is kept and reset together with the parameters."""

    lr: float = Field(default=0.1, gt=0)
    """Step size."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""

    trainable: tuple[str, ...] = Field(default=("",), min_length=1)
    """Prefixes of the names of the parameters that are trained."""

    episodes: Number = 20
    """Episodes in a round, on parallel copies of the task; a step averages over them."""


By: TypeAlias = Literal["own"] | ContinuedTraining | None
_BY = Discriminator(lambda value: "own" if value == "own" else "continued")  # one message, not two


class Playing(Starting):
    """Settings of stages that evaluate a policy without training it."""

    init_from: str
    """Name of the stage whose policy is evaluated."""

    algorithm: Component | None = None
    """The algorithm that adapts the policy; that stage's own if null."""

    checkpoint: Literal["best", "last"] = "best"
    """Which of that stage's checkpoints."""

    split: Literal["train", "validation", "test"] = "test"
    """Split of the tasks."""

    greedy: bool = True
    """Take the most probable action, unless the algorithm needs to explore by sampling."""


class Adapt(Playing):
    """Adapt online to streams of tasks that change.

    Two references are evaluated on the same streams: the agent reset at each change
    (`JOB.restarted` in tables) and the agent without adaptation (`JOB.unadapted`).
    """

    type: Literal["adapt"] = "adapt"

    streams: Number = 64
    """Independent streams of tasks."""

    tasks_per_stream: Number = 3
    """Consecutive tasks in each stream."""

    episodes_per_task: Number = 4
    """Episodes of each environment between task changes."""

    change: Literal["ignore", "told"] = "ignore"
    """ignore: the agent does not observe task changes, and continues in its state; told: memory,
    belief, parameters and optimiser are reset with every task."""

    by: Annotated[
        Annotated[Literal["own"], Tag("own")] | Annotated[ContinuedTraining, Tag("continued")], _BY
    ] = "own"
    """How the agent adapts: own is the adaptation of its algorithm, such as memory, inner steps or
    a belief, or continued training by its optimiser for algorithms without trials;
    ``{type: continued, ...}`` takes gradient steps on any differentiable policy."""


class Evaluate(Playing):
    """Evaluate a policy on held-out tasks, without learning across them."""

    type: Literal["evaluate"] = "evaluate"

    tasks: Number = 256
    """Number of tasks."""

    trials: Number = 1
    """Trials on each task."""

    record: bool = False
    """Record every transition in the transitions table."""


Stage = Annotated[Pretrain | Finetune | Adapt | Evaluate, Field(discriminator="type")]


class RunConfig(Settings):
    """The settings of a run."""

    name: str = Field(default="run", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")
    """Name of the run folder, followed by the time."""

    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of all random numbers except those of `evaluation_seed`."""

    evaluation_seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the tasks of validation, fine-tuning, adaptation and evaluation, and of the random
    numbers of evaluations and streams. Runs of one study share it and differ in `seed`, so that
    they are compared on the same tasks."""

    tasks: Component
    """The task family."""

    network: Component = Component(type="actor_critic")
    """The policy network."""

    algorithm: Component = Component(type="ppo")
    """The algorithm of stages without their own."""

    rollout: RolloutSettings = RolloutSettings()
    workers: WorkerSettings = WorkerSettings()
    environments: EnvironmentSettings = EnvironmentSettings()
    learners: LearnerSettings = LearnerSettings()
    commit: CommitSettings = CommitSettings()

    stages: dict[str, Stage] = Field(min_length=1)
    """Stages by name, in the order in which they run."""

    @model_validator(mode="after")
    def _device_needs_one_process(self) -> RunConfig:
        own = [s.rollout for s in self.stages.values() if isinstance(s, Pretrain) and s.rollout]
        devices = [r.device for r in (self.rollout, *own) if r.device is not None]
        if devices and self.workers.num not in (0, "auto"):
            raise ValueError(
                f"rollout.device: {devices[0]} runs everything in this process, which requires "
                f"workers.num: 0, found {self.workers.num}"
            )
        return self
