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
"""Begins an ``init_from`` that names a checkpoint of RLlib and not a stage."""


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
    """The number; 1 for an auto that `placement` has not resolved, as in checks before a run."""
    return 1 if number == "auto" else number


class RolloutSettings(Settings):
    """The rollouts of one iteration. These settings change results; `workers` does not."""

    shards: Size = 2
    """Units of work: each has its own environments and random streams. At most this many workers
    are busy."""

    num_envs: Number = 64
    """Environments per shard."""

    device: Literal["cpu", "cuda"] | None = None
    """Where pretraining steps environments and policy, as tensors that the learner takes as they
    are; with ``workers: {num: 0}``. It takes thousands of environments to keep a GPU busy. null,
    and the other stages: in NumPy, in the workers."""


class TaskRollout(Settings):
    """The rollout of a job on a single task in one iteration, in one shard and in NumPy."""

    num_envs: Number = 64
    """Environments."""


class WorkerSettings(Settings):
    """Rollout workers. Their number changes the speed of a run, never its result."""

    num: Processes = "auto"
    """Ray actors that roll out; 0 runs everything in this process, without Ray. auto measures
    what a step costs when the run starts, and says what it chose."""

    timeout_s: float = Field(default=60.0, gt=0)
    """A worker that has not answered after max(this, 5 x the median answer) is replaced."""

    max_failures: int = Field(default=100, ge=0, le=LARGEST_NUMBER)
    """Workers lost in one run before it stops."""


class LearnerSettings(Settings):
    """Learners: they train the policy."""

    num: Size = 1
    """Learner actors; gradients are averaged over them. More than one takes workers."""

    threads: Threads = "auto"
    """Torch threads of each learner; auto chooses by the cores. Part of the result: they change
    the last bits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the layers below the heads in gradient steps on minibatches. bfloat16 is faster
    on CPUs and GPUs that have it, and learns less well where differences are small, as in long
    trials."""

    compile: bool = False
    """Gradients by compiled code, for policies without memory: twice as fast where networks are
    small, after seconds of compiling. Takes a C++ compiler, or on a GPU Triton."""


class CommitSettings(Settings):
    """When a run is made durable; no result depends on it."""

    read_with: ClassVar = {"every_s": ("every_updates", (None,))}

    every_s: float = Field(default=10.0, ge=0)
    """Seconds between commits inside a job; the end of a job is always committed."""

    every_updates: Count | None = Field(default=None, ge=1)
    """Instead of seconds: a commit after this many updates."""

    keep: int = Field(default=3, ge=2, le=LARGEST_NUMBER)
    """Commits whose checkpoints are kept on disk."""


class Starting(Settings):
    """Settings shared by all stages, which may start from a policy."""

    trust: bool = False
    """That a checkpoint of RLlib may be read: it is a pickle, and can run code."""

    @model_validator(mode="after")
    def _needs_trust(self) -> Starting:
        if self.trust and not str(getattr(self, "init_from", None)).startswith(RLLIB):
            raise ValueError("trust: is read only where init_from is rllib:PATH; leave it out")
        return self

    @field_validator("init_from", check_fields=False)
    @classmethod
    def _may_be_read(cls, source: str | None, info: ValidationInfo) -> str | None:
        if source is None or not source.startswith(RLLIB):
            return source
        if not info.data.get("trust"):
            raise ValueError(
                "a checkpoint of RLlib is a pickle, which can run code when it is read; if you "
                "trust whoever wrote it, say trust: true beside it"
            )
        return RLLIB + os.path.abspath(os.path.expanduser(source.removeprefix(RLLIB)))


class Training(Starting):
    """Settings shared by the stages that train."""

    algorithm: Component | None = None
    """Instead of the run's algorithm."""

    network: Component | None = None
    """Instead of the run's network."""

    record: bool = False
    """Keep every step of training in the transitions table, in the order of learning."""

    allow_seen: bool = False
    """Learn from recordings of tasks that it is selected by or reported on; the report marks it."""


class Pretrain(Training):
    """Train one policy on the training tasks; keep the best on the validation tasks."""

    type: Literal["pretrain"] = "pretrain"

    env_steps: Count = Field(ge=1)
    """Environment steps to train for."""

    rollout: RolloutSettings | None = None
    """Instead of the run's rollout."""

    max_policy_lag: int = Field(default=0, ge=0, le=1_000)
    """Updates that the acting policy may be behind the learner; 0 is synchronous and exact."""

    validate_every: Count = Field(default=20, ge=1)
    """Updates between evaluations on the validation split."""

    validation_tasks: Number = 128
    """Tasks in each of those evaluations, always the same ones."""

    greedy: bool = True
    """Take the most probable action in them. Where exploring brings reward, a policy that learned
    to explore at random is worth more with false, here and in the evaluation."""

    init_from: str | None = None
    """Name of an earlier stage whose weights to start from, or ``rllib:PATH``, here and in other
    stages: a checkpoint of RLlib."""


class Finetune(Training):
    """Specialise a pretrained policy to single tasks, one job for each, side by side."""

    type: Literal["finetune"] = "finetune"

    init_from: str
    """Name of the stage whose policy is fine-tuned."""

    checkpoint: Literal["best", "last"] = "best"
    """Which of that stage's checkpoints."""

    split: Literal["train", "validation", "test"] = "test"
    """Tasks to specialise to."""

    tasks: Number = 16
    """Number of tasks, hence of jobs."""

    rollout: TaskRollout | None = None
    """Instead of the run's ``num_envs``."""

    updates: Number = 3
    """Updates on each task; the return before update n is reported as step n."""

    trainable: tuple[str, ...] = ("",)
    """Parameters that move, by prefixes of their names; the rest is frozen. ``[""]`` is everything,
    ``[policy_head, value_head]`` or ``["last:1"]`` the heads, ``["last:2"]`` and the last layer
    before them, ``["*adapter*"]`` what matches: adapters that ``network`` adds here."""


class ContinuedTraining(Settings):
    """A policy-gradient step after every round of episodes, on each task by itself."""

    type: Literal["continued"] = "continued"

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """How the gradients move the parameters; its state lasts as long as the parameters do."""

    lr: float = Field(default=0.1, gt=0)
    """Step size."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled from the gradient."""

    trainable: tuple[str, ...] = Field(default=("",), min_length=1)
    """Prefixes of the names of the parameters that move."""

    episodes: Number = 20
    """Episodes in a round: parallel copies of the task that a step averages over."""


By: TypeAlias = Literal["own"] | ContinuedTraining | None
_BY = Discriminator(lambda value: "own" if value == "own" else "continued")  # one message, not two


class Playing(Starting):
    """Settings shared by the stages that play a policy and leave it as it is."""

    init_from: str
    """Name of the stage whose policy is played."""

    algorithm: Component | None = None
    """How the policy adapts; that stage's own algorithm if null."""

    checkpoint: Literal["best", "last"] = "best"
    """Which of that stage's checkpoints."""

    split: Literal["train", "validation", "test"] = "test"
    """Tasks that are played."""

    greedy: bool = True
    """Take the most probable action where the algorithm does not need to explore at random."""


class Adapt(Playing):
    """Meet streams of tasks that change, and keep adapting.

    Beside the agent stand the same one restarted at each change (`JOB.restarted` in tables) and one
    that never adapts (`JOB.unadapted`).
    """

    type: Literal["adapt"] = "adapt"

    streams: Number = 64
    """Independent streams of tasks."""

    tasks_per_stream: Number = 3
    """Tasks in each stream, one after the other."""

    episodes_per_task: Number = 4
    """Episodes of each environment between changes."""

    change: Literal["ignore", "told"] = "ignore"
    """ignore: the agent does not observe that the task changes, and continues as it has adapted;
    told: memory, belief, parameters and optimiser start from scratch with every task."""

    by: Annotated[
        Annotated[Literal["own"], Tag("own")] | Annotated[ContinuedTraining, Tag("continued")], _BY
    ] = "own"
    """Who adapts: own is the algorithm's own adaptation with its own settings, such as memory,
    inner steps or a belief, or for algorithms without a trial continued training by their
    optimiser; ``{type: continued, ...}`` takes gradient steps on any differentiable policy."""


class Evaluate(Playing):
    """Run a policy on held-out tasks, without learning across them."""

    type: Literal["evaluate"] = "evaluate"

    tasks: Number = 256
    """Number of tasks."""

    trials: Number = 1
    """Trials on each task."""

    record: bool = False
    """Keep every step in the transitions table."""


Stage = Annotated[Pretrain | Finetune | Adapt | Evaluate, Field(discriminator="type")]


class RunConfig(Settings):
    """Everything that defines a run."""

    name: str = Field(default="run", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")
    """Names the run folder, together with the time."""

    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Fixes every random number of the run but the choice of evaluation tasks."""

    evaluation_seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Fixes which tasks are validated, fine-tuned, adapted to and evaluated on, and the random
    numbers of evaluations and streams. Runs of one study leave it as it is and differ in
    `seed`, so that they are compared on the same tasks."""

    tasks: Component
    """The task family."""

    network: Component = Component(type="actor_critic")
    """The policy network."""

    algorithm: Component = Component(type="ppo")
    """The algorithm of stages that name none."""

    rollout: RolloutSettings = RolloutSettings()
    workers: WorkerSettings = WorkerSettings()
    learners: LearnerSettings = LearnerSettings()
    commit: CommitSettings = CommitSettings()

    stages: dict[str, Stage] = Field(min_length=1)
    """Stages by name, run in this order."""

    @model_validator(mode="after")
    def _is_one_process_on_a_device(self) -> RunConfig:
        own = [s.rollout for s in self.stages.values() if isinstance(s, Pretrain) and s.rollout]
        devices = [r.device for r in (self.rollout, *own) if r.device is not None]
        if devices and self.workers.num not in (0, "auto"):
            raise ValueError(
                f"rollout.device: {devices[0]} keeps everything in this process, which needs "
                f"workers.num: 0, found {self.workers.num}"
            )
        return self
