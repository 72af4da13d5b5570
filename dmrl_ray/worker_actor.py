"""A rollout worker as a Ray actor, and a call to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dmrl_ray.connection import where
from dmrl_ray.worker import RolloutWorker


class WorkerActor(RolloutWorker):
    """A rollout worker as a Ray actor."""

    def where(self) -> tuple[int, str]:
        """Process id and node; answered once the worker is up."""
        return where()


@dataclass(eq=False)
class Request:
    """One call, wherever it is made."""

    method: str
    arguments: tuple[Any, ...]
    shard: int | None = None  # prefers the worker that played this shard before
    refs: list[Any] = field(default_factory=list)  # of the newest submission
    answer: Any = None
    error: BaseException | None = None
    done: bool = False
