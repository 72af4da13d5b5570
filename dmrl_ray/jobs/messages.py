"""What is asked of workers, and the small part of what they answer."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from dmrl_ray.config.schema import Adapt, By
from dmrl_ray.data.dataset import LeftOut
from dmrl_ray.jobs.spec import JobSpec
from dmrl_ray.rollout.rows import Steps
from dmrl_ray.types import Columns, Task


@dataclass(frozen=True)
class CollectCall:
    """One iteration of one shard; the call's identity, so that an answer is used once."""

    spec: JobSpec
    shard: int
    iteration: int
    env_steps: int  # of the job, before this iteration


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
    """The small answer of a collection, which the driver reads; the trial itself travels apart."""

    episodes: Columns  # whose env_steps count from where the shard's collection began
    env_steps: int
    seconds: float
    env_s: float  # of them, in the environments
    inference_s: float  # of them, in the policy
    tasks: dict[str, pa.Array]  # rows of those that are played and were not before
    steps: Steps | None = None  # where the job is recorded
    left_out: tuple[LeftOut, ...] = ()  # of data, from the collection of a job that is made first
