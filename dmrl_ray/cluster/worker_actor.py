"""A rollout worker as a Ray actor, and a call to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray

from dmrl_ray.cluster.connection import where
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.types import Arrays


class WorkerActor(RolloutWorker):
    """A rollout worker as a Ray actor."""

    def where(self) -> tuple[int, str]:
        """Process id and node; answered once the worker is up."""
        return where()

    def _read(self, state: Any) -> Arrays:
        """A state that was not there yet when the call was made came as a reference in a list."""
        arrays: Arrays = ray.get(state[0]) if isinstance(state, list) else state
        return arrays


@dataclass(eq=False)
class Request:
    """One call, wherever it is made, and however often.

    Attributes:
        shard: whose collection it is; None for other calls.
        state: of the shard, its last argument; or the request whose answer that state is part of.
        refs: of the newest submission: report, trial and state of a collection, else the answer.
    """

    method: str
    arguments: tuple[Any, ...]
    shard: int | None = None
    state: Any = None
    refs: list[Any] = field(default_factory=list)
    answer: Any = None
    error: BaseException | None = None
    done: bool = False

    def waits_for(self) -> Request | None:
        """The request that must be answered before this one can be."""
        before = self.state
        return before if isinstance(before, Request) and not before.done else None

    def submit(self, actor: Any) -> None:
        """Make the call, or make it again."""
        method = getattr(actor, self.method)
        if self.shard is None:
            self.refs = [method.remote(*self.arguments)]
            return
        state = self.state
        if isinstance(state, Request):
            # Ray would hold the call back until the state is there. The worker that makes the
            # state needs no other, and in a list Ray does not look.
            state = state.refs[2] if state.done else [state.refs[2]]
        self.refs = method.options(num_returns=3).remote(*self.arguments, state)

    def end(self) -> None:
        """It has its answer, or its error."""
        self.done, self.state = True, None
