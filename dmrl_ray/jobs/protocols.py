"""The workers and learners of a run as its stages see them, in this process or on Ray.

    Workers    `worker.LocalWorkers`, `cluster.pool.RayWorkers`
    Learners   `learner.LocalLearners`, `cluster.learners.RayLearners`

Trials, shard states and weights are `Stored`: the driver passes them on and does not read
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from dmrl_ray.jobs.messages import (
    Answer,
    Call,
    CallId,
    Result,
    Stored,
    WorkerEvent,
    WorkerState,
)
from dmrl_ray.types import Arrays

POLL_S = 0.2
"""A wait for answers looks up this often, so that interrupts and timeouts are seen."""


class Workers(Protocol):
    """A pool of rollout workers, each of which can make any call."""

    @property
    def total(self) -> int:
        """Workers that there are to be."""

    @property
    def alive(self) -> int:
        """Workers that are up."""

    def submit(self, call: Call[Result]) -> CallId:
        """Submit a call; it is retried until it is answered once."""

    def ready(
        self, ids: Sequence[CallId], timeout_s: float
    ) -> tuple[list[Answer[object]], list[WorkerEvent]]:
        """The answers that have come, each given once, and what became of workers meanwhile.

        Args:
            ids: of the calls that are waited for; answers of others are kept.
            timeout_s: that it waits for the first answer.

        Raises:
            EnvironmentFault: an environment broke the contract; likewise whatever a call raised.
            JobLost: a shard's state or the weights were lost with their node.
            ClusterError: too many workers were lost.
        """

    def forget(self, ids: Sequence[CallId]) -> None:
        """Drop calls whose answers are no longer needed; those that have not begun are not made."""

    def states(self) -> list[WorkerState]:
        """The call that each worker makes, and since when."""

    def put(self, value: object) -> Stored:
        """Make a large argument ready to be used in many calls."""

    def fetch(self, value: Stored) -> object:
        """The value behind a stored one.

        Raises:
            JobLost: it was lost with its node.
        """

    def close(self) -> None:
        """End the workers."""


class Trained(Protocol):
    """The policy of a job that trains, and whatever trains it."""

    version: int
    """Updates so far."""

    def published(self) -> Stored:
        """The policy's `Weights`, as workers take them."""

    def weights(self) -> Arrays:
        """The policy's weights, as arrays."""

    def load_weights(self, weights: Arrays) -> None:
        """Start from a policy trained elsewhere.

        Raises:
            ValueError: the weights do not fit.
        """

    def get_state(self) -> Arrays:
        """For a checkpoint: all that the next update depends on."""

    def set_state(self, state: Arrays, version: int) -> None:
        """Continue from the answer of `get_state` after `version` updates."""

    def close(self) -> None:
        """End its processes."""


class Learners(Trained, Protocol):
    """The learners of one job."""

    def update(self, env_steps: int, trials: list[Stored]) -> dict[str, float]:
        """Improve the policy from one iteration's trials, and return metrics.

        Args:
            env_steps: of the job, before this iteration.
            trials: one of each shard, in order.
        """


def _nothing() -> None:
    pass


def _ignore(event: WorkerEvent) -> None:
    pass


def answers(
    workers: Workers,
    ids: Sequence[CallId],
    check: Callable[[], None] = _nothing,
    on_event: Callable[[WorkerEvent], None] = _ignore,
) -> Iterator[Answer[object]]:
    """The answers of calls as they come; the calls left when the caller goes away are forgotten.

    Args:
        workers: that the calls were submitted to.
        ids: of the calls.
        check: called between two waits; what it raises ends the wait.
        on_event: called with every worker that was lost.
    """
    left = list(ids)
    try:
        while left:
            check()
            answered, events = workers.ready(left, POLL_S)
            for event in events:
                on_event(event)
            for answer in answered:
                left.remove(answer.id)
                yield answer
    finally:
        workers.forget(left)


def map_calls(
    workers: Workers,
    calls: Sequence[Call[Result]],
    check: Callable[[], None] = _nothing,
    on_event: Callable[[WorkerEvent], None] = _ignore,
) -> Iterator[tuple[int, Result]]:
    """Results of calls as they come, each with the number of its call; arguments as `answers`."""
    numbers = {workers.submit(call): i for i, call in enumerate(calls)}
    for answer in answers(workers, list(numbers), check, on_event):
        yield numbers[answer.id], answer.value  # type: ignore[misc]
