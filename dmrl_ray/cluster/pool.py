"""A pool of rollout workers that outlives any of them.

    submit --> waiting --dispatch--> worker i: at most 2 calls in flight --+
                  ^                                                        |
                  +---- replace: dead, or silent past its timeout --------+
                                                                           |
    answers <-- take: the small result; large ones stay references <-------+

What a call returns depends on its arguments alone, so that a call that was lost with its worker is
simply made again. Its answer is taken through the reference of its newest submission and no other:
whatever a replaced worker still says is not listened to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dmrl_ray.cluster.connection import (
    START_TIMEOUT_S,
    cause_of,
    first_sentence,
    no_room,
    nodes_are_coming,
    where,
)
from dmrl_ray.config.schema import WorkerSettings, resolve_auto
from dmrl_ray.errors import ClusterError
from dmrl_ray.jobs.messages import CollectCall, CollectReport
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.types import Arrays

POLL_S = 0.2
"""A wait for answers looks up this often, so that interrupts and timeouts are seen."""

MAX_BAD_STARTS = 3
"""Workers in a row that die before they are up, after which the run stops."""


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


@dataclass(eq=False)
class Worker:
    """One actor and the calls it has in flight."""

    index: int
    actor: Any
    replaces: bool
    pid: int | None = None  # None until it is up
    node: str = ""
    requests: list[Request] = field(default_factory=list)
    since: float = 0.0  # it began, or last gave an answer


class RayWorkers:
    """The worker pool of a run on Ray, with the interface of `worker.LocalWorkers`.

    Trials, shard states and weights are references here: the driver passes them on and never reads
    them. Each call is made until it is answered once.

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
        self._settings = settings
        self._on_event = on_event
        self._check = check
        self._actor_class: Any = ray.remote(WorkerActor).options(
            num_cpus=1,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            label_selector={"dmrl/pool": "!learner"},
        )
        self._waiting: deque[Request] = deque()
        self._listening: dict[Any, tuple[Worker, Request | None]] = {}
        self._seconds: dict[str, deque[float]] = {}
        self._failures = self._bad_starts = 0
        self.total = self._needed = resolve_auto(settings.num)
        self._complete_at = time.monotonic()
        self._workers = [self._spawn(index) for index in range(self.total)]

    def start(self) -> None:
        """Wait until all workers are up; or some, while a cluster launches nodes for the rest.

        Raises:
            ClusterError: the cluster has no room for the workers, or they cannot start.
        """
        try:
            while len(self.up()) < self._needed:
                self._pump()
        except BaseException:
            self.close()
            raise
        self._needed = 1

    @property
    def alive(self) -> int:
        """Workers that are up."""
        return len(self.up())

    def up(self) -> list[Worker]:
        """Workers that can take calls."""
        return [worker for worker in self._workers if worker.pid is not None]

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in self.up() if worker.pid is not None]

    def start_collect(
        self, calls: list[CollectCall], weights: Any, states: list[Any]
    ) -> list[Request]:
        """Begin one iteration of every shard; the answer is for `finish_collect`."""
        requests = [
            Request("collect", (call, weights), call.shard, state)
            for call, state in zip(calls, states, strict=True)
        ]
        self._make(requests)
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
        for _ in self._answers(started):
            pass
        return [(r.answer, r.refs[1], r.refs[2]) for r in started]

    def map(self, method: str, calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Results of a worker's method over many arguments, with their indices, as they come.

        Raises the same as `finish_collect`.
        """
        requests = [Request(method, arguments) for arguments in calls]
        index = {id(request): i for i, request in enumerate(requests)}
        self._make(requests)
        for request in self._answers(requests):
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
        for worker in self._workers:
            ray.kill(worker.actor, no_restart=True)
        self._workers = []
        self._waiting.clear()
        self._listening.clear()

    def _make(self, requests: list[Request]) -> None:
        """Begin some calls."""
        self._waiting.extend(requests)
        self._dispatch()

    def _answers(self, requests: list[Request]) -> Iterator[Request]:
        """The requests as they are done; those left when the caller goes away are forgotten."""
        left = list(requests)
        try:
            while left:
                done = [request for request in left if request.done]
                for request in done:
                    if request.error is not None:
                        raise request.error
                    left.remove(request)
                    yield request
                if left and not done:
                    self._pump()
        finally:
            for request in left:
                if request in self._waiting:
                    self._waiting.remove(request)

    def _check_room(self) -> None:
        """Workers that cannot be placed are waited for as long as others do the work."""
        now = time.monotonic()
        if len(self.up()) >= self._needed:
            self._complete_at = now
        elif now - self._complete_at > START_TIMEOUT_S:
            if not nodes_are_coming():
                raise no_room(f"workers.num: {self.total} rollout workers", self.total)
            self._needed = 1

    def _spawn(self, index: int, *, replaces: bool = False) -> Worker:
        worker = Worker(index, self._actor_class.remote(), replaces, since=time.monotonic())
        self._listening[worker.actor.where.remote()] = (worker, None)
        return worker

    def _pump(self) -> None:
        """Wait shortly for answers, take those that came, and keep the workers busy."""
        self._check()
        self._check_room()
        ready, _ = ray.wait(list(self._listening), num_returns=1, timeout=POLL_S)
        if ready:
            everything = list(self._listening)
            ready, _ = ray.wait(everything, num_returns=len(everything), timeout=0)
        for ref in ready:
            if ref in self._listening:  # Not replaced meanwhile.
                self._take(ref)
        for worker in list(self._workers):
            self._replace_if_overdue(worker)
        self._dispatch()

    def _take(self, ref: Any) -> None:
        worker, request = self._listening[ref]
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            if request is None:
                self._replace(worker, first_sentence(cause_of(error)))
                return
            request.error = cause_of(error)
        except RayError as error:
            self._replace(worker, first_sentence(error))
            return
        else:
            if request is None:
                self._up(worker, *value)
            else:
                request.answer = value
        del self._listening[ref]
        now = time.monotonic()
        if request is not None:
            request.end()
            worker.requests.remove(request)
            took = getattr(request.answer, "seconds", now - worker.since)
            self._seconds.setdefault(request.method, deque(maxlen=100)).append(took)
        worker.since = now

    def _up(self, worker: Worker, pid: int, node: str) -> None:
        worker.pid, worker.node = pid, node
        self._bad_starts = 0
        if worker.replaces:
            self._on_event("worker_replaced", {"worker": worker.index, "pid": pid, "node": node})

    def _dispatch(self) -> None:
        """Give waiting calls to workers that are up."""
        up = self.up()
        for request in list(self._waiting):
            worker = self._choose(up, request)
            if worker is not None:
                self._waiting.remove(request)
                self._submit(worker, request)

    def _choose(self, up: list[Worker], request: Request) -> Worker | None:
        """The shard's own worker, which keeps its environments at hand, unless another is idle."""
        if not up:
            return None
        least = min(up, key=lambda worker: len(worker.requests))
        if request.shard is None:
            # A second call in flight saves waiting for the driver, but only while all have work.
            return least if len(least.requests) < 1 + (len(self._waiting) >= len(up)) else None
        before = request.waits_for()
        if before is not None:
            # Behind it at the same worker, so that no two workers wait for each other.
            up = [worker for worker in up if before in worker.requests]
            return next((worker for worker in up if len(worker.requests) < 2), None)
        own = self._workers[request.shard % len(self._workers)]
        if own.pid is not None and len(own.requests) < 2:
            return own
        return None if least.requests else least

    def _submit(self, worker: Worker, request: Request) -> None:
        request.submit(worker.actor)
        self._listening[request.refs[0]] = (worker, request)
        if not worker.requests:
            worker.since = time.monotonic()
        worker.requests.append(request)

    def _replace_if_overdue(self, worker: Worker) -> None:
        if not worker.requests:
            return
        past = self._seconds.get(worker.requests[0].method)
        limit = max(self._settings.timeout_s, 5 * median(past) if past else 0.0)
        silent = time.monotonic() - worker.since
        if silent > limit:
            self._replace(worker, f"hung: no answer for {silent:.1f} s")

    def _replace(self, worker: Worker, reason: str) -> None:
        """Another actor in this one's place; its calls are made again."""
        self._listening = {r: x for r, x in self._listening.items() if x[0] is not worker}
        ray.kill(worker.actor, no_restart=True)
        self._on_event(
            "worker_lost",
            {
                "worker": worker.index,
                "pid": worker.pid,
                "node": worker.node,
                "reason": reason,
                "shards": [r.shard for r in worker.requests if r.shard is not None],
            },
        )
        self._failures += 1
        self._bad_starts += worker.pid is None
        if self._bad_starts >= MAX_BAD_STARTS:
            raise ClusterError(f"rollout workers cannot start: {reason}")
        if self._failures > self._settings.max_failures:
            raise ClusterError(
                f"workers.max_failures: {self._failures} workers were lost, the last one "
                f"(process {worker.pid} on {worker.node}) because of {reason}"
            )
        self._waiting.extendleft(reversed(worker.requests))
        self._workers[worker.index] = self._spawn(worker.index, replaces=True)
