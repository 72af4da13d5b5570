"""The calls of workers and learners, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import pyarrow as pa

from dmrl_ray.config.schema import Adapt, By
from dmrl_ray.data.dataset import LeftOut
from dmrl_ray.jobs.spec import JobSpec
from dmrl_ray.rollout.rows import Steps
from dmrl_ray.tasks.activity import Doing
from dmrl_ray.types import Arrays, Columns, EnvironmentFault, Task

Stored: TypeAlias = object
"""A large value where it lies: in one process the value itself, on Ray a reference to it."""

FAULTS = "faults"
"""A column beside those of evaluated episodes: one cell a call, with its faults."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class CallId:
    """The number of a call that was submitted."""

    number: int


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A call of a method of `RolloutWorker`; its answer depends on its arguments alone."""

    method: Callable[..., Result]
    arguments: tuple[Stored, ...]
    shard: int | None = None  # that it collects, if it does
    state: Stored | CallId = None  # of that shard, or the call whose answer that state is part of

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.__name__

    @property
    def spec(self) -> JobSpec | None:
        """The job that the call is of."""
        found = (getattr(argument, "spec", argument) for argument in self.arguments)
        return next((spec for spec in found if isinstance(spec, JobSpec)), None)

    @property
    def family(self) -> str:
        """The task family, as messages name it."""
        return f"task family {self.spec.tasks.type!r}" if self.spec is not None else "a task family"

    @property
    def reproduction(self) -> str:
        """All that the answer depends on, in words: stage, job, seed, and which part of it."""
        parts = [self.name]
        if self.spec is not None:
            parts += [f"stage {self.spec.stage}", f"job {self.spec.name}", f"seed {self.spec.seed}"]
        call = self.arguments[0]
        for name in ("shard", "iteration", "trial", "chunk"):
            if (number := getattr(call, name, None)) is not None:
                parts.append(f"{name} {number}")
        tasks = getattr(call, "tasks", ()) or getattr(self.spec, "fixed_tasks", ())
        if tasks:
            more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
            parts.append(f"tasks {', '.join(task.id for task in tasks[:3])}{more}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Answer(Generic[Result]):
    """The answer of a call; the large parts of a collection's stay where they are."""

    id: CallId
    value: Result
    trial: Stored = None
    state: Stored = None


@dataclass(frozen=True)
class WorkerEvent:
    """A worker was lost, another one stands in its place, or an environment takes long."""

    event: str  # worker_lost, worker_replaced, environment_waited_for
    detail: dict[str, object]


@dataclass(frozen=True)
class WorkerState:
    """The call that a worker makes."""

    worker: int  # its number
    pid: int | None  # None until it is up
    node: str
    call: Call[object] | None  # None is idle
    since: float  # of `time.monotonic`, when it began this, or has been idle
    doing: Doing | None = None  # within the call, when it was last looked at


@dataclass(frozen=True)
class CollectCall:
    """One iteration of one shard."""

    spec: JobSpec
    shard: int
    iteration: int
    env_steps: int  # of the job, before this iteration
    quarantined: tuple[str, ...] = ()  # ids of tasks that are not drawn any more


@dataclass(frozen=True)
class EvaluateCall:
    """One trial on each of some tasks."""

    spec: JobSpec
    tasks: tuple[Task, ...]
    trial: int
    chunk: int
    greedy: bool
    policy_version: int
    first_env: int = 0  # number of the first environment, where steps are recorded
    by: By = None  # who adapts; None is the algorithm as it evaluates
    episodes: int | None = None  # of each environment; None is what the algorithm evaluates with
    frozen: bool = False  # never adapt


@dataclass(frozen=True)
class AdaptCall:
    """Streams of tasks that change without notice."""

    spec: JobSpec
    streams: tuple[tuple[Task, ...], ...]
    settings: Adapt
    chunk: int


@dataclass(frozen=True)
class CollectReport:
    """The small answer of a collection, read by the driver; the trial is passed by reference."""

    episodes: Columns  # whose env_steps count from where the shard's collection began
    env_steps: int
    seconds: float
    env_s: float  # of them, in the environments
    inference_s: float  # of them, in the policy
    tasks: dict[str, pa.Array]  # rows of those that are played and were not before
    steps: Steps | None = None  # where the job is recorded
    left_out: tuple[LeftOut, ...] = ()  # of data; reported once, by shard 0 in iteration 0
    faults: tuple[EnvironmentFault, ...] = ()  # after which episodes were restarted
    begun_again: str = ""  # why open episodes could not be continued, where they could not


@dataclass(frozen=True)
class TrainReport:
    """The answer of a small job that was done whole."""

    episodes: Columns
    weights: Arrays  # at its end
    env_steps: int
    left_out: tuple[LeftOut, ...] = ()  # of data
    faults: tuple[EnvironmentFault, ...] = ()  # after which episodes were restarted
    steps: tuple[Steps, ...] = ()  # in the order of learning, where the job is recorded
