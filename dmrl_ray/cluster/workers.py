"""Rollout workers on Ray, with the interface of `worker.LocalWorkers`.

Trials, shard states and weights are references here: the driver passes them on and never reads
them. `pool` says how calls survive the workers that they were made to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from dmrl_ray.cluster.connection import cause_of, connect
from dmrl_ray.cluster.pool import WorkerPool
from dmrl_ray.cluster.worker_actor import Request
from dmrl_ray.config.schema import WorkerSettings, settled
from dmrl_ray.jobs.messages import CollectCall, CollectReport

__all__ = ["RayWorkers", "connect"]


class RayWorkers:
    """The worker pool of a run on Ray.

    Args:
        settings: how many workers, and when one counts as lost.
        on_event: is told of every worker lost or replaced, with its details.
        check: is called while waiting; what it raises ends the wait.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        on_event: Callable[[str, dict[str, object]], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.total = settled(settings.num)
        self._pool = WorkerPool(settings, on_event, check)

    def start(self) -> None:
        """Wait until the workers, which have been starting since they were made, are up.

        Raises:
            ClusterError: the cluster has no room for them, or they cannot start.
        """
        self._pool.start()

    @property
    def alive(self) -> int:
        """Workers that are up."""
        return len(self._pool.up())

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in self._pool.up() if worker.pid is not None]

    def start_collect(
        self, calls: list[CollectCall], weights: Any, states: list[Any]
    ) -> list[Request]:
        """Begin one iteration of every shard; the answer is for `finish_collect`."""
        requests = [
            Request("collect", (call, weights), call.shard, state)
            for call, state in zip(calls, states, strict=True)
        ]
        self._pool.submit(requests)
        return requests

    def states_after(self, started: list[Request]) -> list[Any]:
        """What the next iteration begins with, while this one may still be in flight."""
        return list(started)

    def finish_collect(self, started: list[Request]) -> list[tuple[CollectReport, Any, Any]]:
        """Reports, and references of trials and states, by shard number.

        Raises:
            EnvironmentFault: an environment broke the contract; likewise whatever a worker raised.
            JobLost: a shard's state or the weights were lost with their node.
            ClusterError: too many workers were lost.
        """
        for _ in self._pool.answers(started):
            pass
        return [(r.answer, r.refs[1], r.refs[2]) for r in started]

    def map(self, method: str, calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Results of a worker's method over many arguments, with their indices, as they come.

        Raises the same as `finish_collect`.
        """
        requests = [Request(method, arguments) for arguments in calls]
        index = {id(request): i for i, request in enumerate(requests)}
        self._pool.submit(requests)
        for request in self._pool.answers(requests):
            yield index[id(request)], request.answer
            request.answer = None

    def put(self, value: Any) -> Any:
        """Make a large argument ready to be used in many calls."""
        return ray.put(value)

    def fetch(self, value: Any) -> Any:
        """The value behind what a call returned as large.

        Raises:
            JobLost: it was lost with its node.
        """
        if not isinstance(value, ray.ObjectRef):
            return value
        try:
            return ray.get(value)
        except RayError as error:
            raise cause_of(error) from error

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
