"""A pool of rollout workers that outlives any of them.

    submit --> waiting --dispatch--> worker i: at most 2 calls in flight --+
                  ^                                                        |
                  +---- replace: dead, or silent past its timeout --------+
                                                                           |
    ready <---- take: the small result; large ones stay references <-------+

What a call returns depends on its arguments alone, so that a call that was lost with its worker is
simply made again. Its answer is taken through the reference of its newest submission and no other:
whatever a replaced worker still says is not listened to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dmrl_ray.cluster.connection import (
    START_TIMEOUT_S,
    RayObject,
    cause_of,
    first_sentence,
    no_room,
    nodes_are_coming,
    where,
)
from dmrl_ray.config.schema import WorkerSettings, resolve_auto
from dmrl_ray.errors import ClusterError
from dmrl_ray.jobs.messages import (
    Answer,
    Call,
    CallId,
    Result,
    Stored,
    WorkerEvent,
    WorkerState,
)
from dmrl_ray.jobs.protocols import POLL_S
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.types import Arrays

MAX_BAD_STARTS = 3
"""Workers in a row that die before they are up, after which the run stops."""


class WorkerActor(RolloutWorker):
    """A rollout worker as a Ray actor."""

    def where(self) -> tuple[int, str]:
        """Process id and node; answered once the worker is up."""
        return where()

    def _read(self, state: Stored) -> Arrays:
        """Read a state, which came as a reference in a list if the call was made before it was."""
        return super()._read(ray.get(state[0]) if isinstance(state, list) else state)


@dataclass(eq=False)
class Request:
    """One call, wherever it is made, and however often.

    Attributes:
        before: the request whose answer the state of the call's shard is part of.
        refs: of the newest submission: report, trial and state of a collection, else the answer.
    """

    call: Call[Any]
    before: Request | None = None
    refs: list[RayObject] = field(default_factory=list)
    answer: object = None
    error: BaseException | None = None
    done: bool = False

    def waits_for(self) -> Request | None:
        """The request that must be answered before this one can be."""
        return self.before if self.before is not None and not self.before.done else None

    def submit(self, actor: RayObject) -> None:
        """Make the call, or make it again."""
        method = getattr(actor, self.call.name)
        if self.call.shard is None:
            self.refs = [method.remote(*self.call.arguments)]
            return
        state = self.call.state
        if self.before is not None:
            # Ray would hold the call back until the state is there. The worker that makes the
            # state needs no other, and in a list Ray does not look.
            state = self.before.refs[2] if self.before.done else [self.before.refs[2]]
        self.refs = method.options(num_returns=3).remote(*self.call.arguments, state)

    def end(self) -> None:
        """Note that it has its answer, or its error."""
        self.done, self.before = True, None


@dataclass(eq=False)
class Worker:
    """One actor and the calls it has in flight."""

    index: int
    actor: RayObject
    replaces: bool
    pid: int | None = None  # None until it is up
    node: str = ""
    requests: list[Request] = field(default_factory=list)
    since: float = 0.0  # it began, or last gave an answer


class RayWorkers:
    """The workers of a run on Ray: `protocols.Workers` whose stored values are references.

    Args:
        settings: how many workers, and when one counts as lost.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._actor_class: RayObject = ray.remote(WorkerActor).options(
            num_cpus=1,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            label_selector={"dmrl/pool": "!learner"},
        )
        self._number = 0
        self._requests: dict[CallId, Request] = {}  # whose answers were not given yet
        self._waiting: deque[Request] = deque()
        self._listening: dict[RayObject, tuple[Worker, Request | None]] = {}
        self._events: list[WorkerEvent] = []  # since `ready` was called last
        self._over: ClusterError | None = None  # why no call will be made any more
        self._seconds: dict[str, deque[float]] = {}
        self._failures = self._bad_starts = 0
        self.total = self._needed = resolve_auto(settings.num)
        self._complete_at = time.monotonic()
        self._workers = [self._spawn(index) for index in range(self.total)]

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all workers are up; or some, while a cluster launches nodes for the rest.

        Args:
            check: is called while waiting; what it raises ends the wait and the workers.

        Raises:
            ClusterError: the cluster has no room for the workers, or they cannot start.
        """
        try:
            while len(self.up()) < self._needed:
                check()
                self._pump(POLL_S)
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

    def submit(self, call: Call[Result]) -> CallId:
        """Give a call to the first worker that has time for it."""
        before = self._requests[call.state] if isinstance(call.state, CallId) else None
        self._number += 1
        number = CallId(self._number)
        request = self._requests[number] = Request(call, before)
        self._waiting.append(request)
        if call.shard is not None:  # The driver may wait for something else next.
            self._dispatch()
        return number

    def ready(
        self, ids: Sequence[CallId], timeout_s: float
    ) -> tuple[list[Answer[object]], list[WorkerEvent]]:
        """The answers that have come; workers that are lost meanwhile are replaced."""
        requests = {number: self._requests[number] for number in ids}
        if not any(request.done for request in requests.values()):
            self._pump(timeout_s)
        answers: list[Answer[object]] = []
        for number, request in requests.items():
            if request.error is not None:
                if answers:
                    break  # They are given first.
                raise request.error
            if request.done:
                answers.append(Answer(number, request.answer, *request.refs[1:]))
                del self._requests[number]
        events, self._events = self._events, []
        return answers, events

    def forget(self, ids: Sequence[CallId]) -> None:
        """Drop calls whose answers are no longer needed; those that have not begun are not made."""
        for number in ids:
            request = self._requests.pop(number, None)
            if request is not None and request in self._waiting:
                self._waiting.remove(request)

    def states(self) -> list[WorkerState]:
        """The call that each worker makes, and since when."""
        return [
            WorkerState(w.index, w.pid, w.node, w.requests[0].call if w.requests else None, w.since)
            for w in self._workers
        ]

    def put(self, value: object) -> Stored:
        """Make a reference."""
        return ray.put(value)

    def fetch(self, value: Stored) -> object:
        """The value behind a reference.

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

    def _pump(self, timeout_s: float) -> None:
        """Wait shortly for answers, take those that came, and keep the workers busy."""
        if self._over is not None:
            raise self._over
        self._check_room()
        self._dispatch()
        ready, _ = ray.wait(list(self._listening), num_returns=1, timeout=timeout_s)
        if ready:
            everything = list(self._listening)
            ready, _ = ray.wait(everything, num_returns=len(everything), timeout=0)
        for ref in ready:
            if ref in self._listening:  # Not replaced meanwhile.
                self._take(ref)
        for worker in list(self._workers):
            self._replace_if_overdue(worker)
        self._dispatch()

    def _take(self, ref: RayObject) -> None:
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
            self._seconds.setdefault(request.call.name, deque(maxlen=100)).append(took)
        worker.since = now

    def _up(self, worker: Worker, pid: int, node: str) -> None:
        worker.pid, worker.node = pid, node
        self._bad_starts = 0
        if worker.replaces:
            detail: dict[str, object] = {"worker": worker.index, "pid": pid, "node": node}
            self._events.append(WorkerEvent("worker_replaced", detail))

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
        if request.call.shard is None:
            # A second call in flight saves waiting for the driver, but only while all have work.
            return least if len(least.requests) < 1 + (len(self._waiting) >= len(up)) else None
        before = request.waits_for()
        if before is not None:
            # Behind it at the same worker, so that no two workers wait for each other.
            up = [worker for worker in up if before in worker.requests]
            return next((worker for worker in up if len(worker.requests) < 2), None)
        own = self._workers[request.call.shard % len(self._workers)]
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
        past = self._seconds.get(worker.requests[0].call.name)
        limit = max(self._settings.timeout_s, 5 * median(past) if past else 0.0)
        silent = time.monotonic() - worker.since
        if silent > limit:
            self._replace(worker, f"hung: no answer for {silent:.1f} s")

    def _replace(self, worker: Worker, reason: str) -> None:
        """Another actor in this one's place; its calls are made again."""
        self._listening = {r: x for r, x in self._listening.items() if x[0] is not worker}
        ray.kill(worker.actor, no_restart=True)
        detail: dict[str, object] = {
            "worker": worker.index,
            "pid": worker.pid,
            "node": worker.node,
            "reason": reason,
            "shards": [r.call.shard for r in worker.requests if r.call.shard is not None],
        }
        self._events.append(WorkerEvent("worker_lost", detail))
        self._failures += 1
        self._bad_starts += worker.pid is None
        if self._bad_starts >= MAX_BAD_STARTS:
            self._over = ClusterError(f"rollout workers cannot start: {reason}")
        elif self._failures > self._settings.max_failures:
            self._over = ClusterError(
                f"workers.max_failures: {self._failures} workers were lost, the last one "
                f"(process {worker.pid} on {worker.node}) because of {reason}"
            )
        self._waiting.extendleft(reversed(worker.requests))
        self._workers[worker.index] = self._spawn(worker.index, replaces=True)
