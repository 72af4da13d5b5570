"""A pool of rollout workers that outlives any of them.

    submit --> waiting --dispatch--> worker i: at most 2 calls in flight --+
                  ^                                                        |
                  +---- replace: dead, stopped or blocked -----------------+
                                                                           |
    ready <---- take: the small result; large ones stay references <-------+

What a call returns depends on its arguments alone, so that a call that was lost with its worker is
simply made again. Its answer is taken through the reference of its newest submission and no other:
whatever a replaced worker still says is not listened to.

A worker is lost when its process says so from outside (`jobs.liveness`), and never for how long a
call takes. A call that three workers died of, one after the other, is not made again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dmrl_ray.cluster.connection import (
    START_TIMEOUT_S,
    Place,
    RayObject,
    cause_of,
    first_sentence,
    no_room,
    nodes_are_coming,
    where,
)
from dmrl_ray.cluster.watchers import Watchers
from dmrl_ray.config.schema import EnvironmentSettings, WorkerSettings, resolve_auto
from dmrl_ray.errors import ClusterError
from dmrl_ray.jobs.liveness import Look, overdue, told
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
from dmrl_ray.tasks.activity import WAITING, Doing, during
from dmrl_ray.types import Arrays, EnvironmentFault

MAX_BAD_STARTS = 3
"""Workers in a row that die before they are up, after which the run stops."""

MAX_DEATHS = 3
"""Workers that may die of one call, after which it is not made again."""

LONGEST_PAUSE_S = 30.0
"""A worker is replaced at once, after 1 s, 2 s, 4 s and so on, at most this, if those before it
died without an answer."""


class WorkerActor(RolloutWorker):
    """A rollout worker as a Ray actor."""

    def where(self) -> Place:
        """Process id and node; answered once the worker is up."""
        return where()

    def _read(self, state: Stored) -> Arrays:
        """Read a state, which came as a reference in a list if the call was made before it was."""
        if not isinstance(state, list):
            return super()._read(state)
        with during(WAITING):
            return super()._read(ray.get(state[0]))


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
    deaths: list[str] = field(default_factory=list)  # why workers that made it were lost

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
    starts_at: float
    losses: int = 0  # of those in its place before it, since one of them gave an answer
    replaces: bool = False
    actor: RayObject = None  # None until it starts
    place: Place | None = None  # None until it is up
    requests: list[Request] = field(default_factory=list)
    since: float = 0.0  # it began, or last gave an answer
    looked: Look = field(default_factory=Look)
    told_s: float = 0.0  # how long it had been in a call of an environment that was told last

    @property
    def pid(self) -> int | None:
        """Its process, once it is up."""
        return None if self.place is None else self.place.pid

    @property
    def node(self) -> str:
        """Its node's address, once it is up."""
        return "" if self.place is None else self.place.node


class RayWorkers:
    """The workers of a run on Ray: `protocols.Workers` whose stored values are references.

    Args:
        settings: how many workers, and how many may be lost.
        environments: how long one of their calls may take.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        environments: EnvironmentSettings = EnvironmentSettings(),  # noqa: B008, it is frozen
    ) -> None:
        self._settings = settings
        self._environments = environments
        self._watchers = Watchers()
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
        self._failures = self._bad_starts = 0
        self.total = self._needed = resolve_auto(settings.num)
        self._complete_at = time.monotonic()
        now = time.monotonic()
        self._workers = [Worker(index, now, since=now) for index in range(self.total)]
        self._spawn()

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
            WorkerState(
                w.index,
                w.pid,
                w.node,
                w.requests[0].call if w.requests else None,
                w.since,
                w.looked.doing if w.requests else None,
            )
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
            if worker.actor is not None:
                ray.kill(worker.actor, no_restart=True)
        self._watchers.close()
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

    def _spawn(self) -> None:
        """Start the workers whose time has come."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.actor is None and now >= worker.starts_at:
                worker.actor, worker.since = self._actor_class.remote(), now
                self._listening[worker.actor.where.remote()] = (worker, None)

    def _pump(self, timeout_s: float) -> None:
        """Wait shortly for answers, take those that came, and keep the workers busy."""
        if self._over is not None:
            raise self._over
        self._check_room()
        self._spawn()
        self._dispatch()
        if not self._listening:  # All workers are to be replaced, later.
            time.sleep(timeout_s)
            return
        ready, _ = ray.wait(list(self._listening), num_returns=1, timeout=timeout_s)
        if ready:
            everything = list(self._listening)
            ready, _ = ray.wait(everything, num_returns=len(everything), timeout=0)
        for ref in ready:
            if ref in self._listening:  # Not replaced meanwhile.
                self._take(ref)
        self._look()
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
                self._up(worker, value)
            else:
                request.answer = value
        del self._listening[ref]
        if request is not None:
            request.end()
            worker.requests.remove(request)
            worker.losses, worker.told_s = 0, 0.0
        worker.since = time.monotonic()

    def _up(self, worker: Worker, place: Place) -> None:
        worker.place = place
        self._watchers.attach(place)
        self._bad_starts = 0
        if worker.replaces:
            detail = {"worker": worker.index, "pid": place.pid, "node": place.node}
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

    def _look(self) -> None:
        """Look at the processes of all workers, and replace those that cannot be waited for."""
        up = {worker.place: worker for worker in self.up() if worker.place is not None}
        for place, found in self._watchers.look(up).items():
            worker = up[place]
            worker.looked = found
            if found.lost is not None:
                self._replace(worker, found.lost)
            elif worker.requests and found.doing is not None and found.doing.in_environment:
                self._wait_for_environment(worker, found.doing, found.doing_s)

    def _wait_for_environment(self, worker: Worker, doing: Doing, seconds: float) -> None:
        """Tell that a call of an environment takes long, or end it where it takes too long."""
        request, timeout_s = worker.requests[0], self._environments.timeout_s
        if timeout_s is not None and seconds > timeout_s:
            where = f"{request.call.family}, in {request.call.reproduction}"
            self._fail(request, overdue(doing, seconds, timeout_s, where))
            self._replace(worker, f"ended in {doing} after {seconds:.1f} s")
            return
        if seconds < worker.told_s:  # It is another one.
            worker.told_s = 0.0
        if told(seconds, worker.told_s):
            worker.told_s = seconds
            waited = f"waiting in {doing} of {request.call.family} for {seconds:.0f} s"
            detail: dict[str, object] = {"worker": worker.index, "message": waited}
            self._events.append(WorkerEvent("environment_waited_for", detail))

    def _fail(self, request: Request, error: Exception) -> None:
        """Answer a call with an error, and those that need its answer."""
        after = [other for other in self._requests.values() if other.before is request]
        request.error = error
        request.end()
        self._waiting = deque(r for r in self._waiting if r is not request)
        for other in after:
            self._fail(other, error)

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
        if worker.requests and not worker.requests[0].done:
            self._note_death(worker, worker.requests[0], reason)
        self._waiting.extendleft(r for r in reversed(worker.requests) if not r.done)
        losses = worker.losses
        pause_s = min(LONGEST_PAUSE_S, 2.0 ** (losses - 1)) if losses else 0.0
        now = time.monotonic()
        self._workers[worker.index] = Worker(
            worker.index, now + pause_s, losses + 1, replaces=True, since=now
        )
        self._spawn()

    def _note_death(self, worker: Worker, request: Request, reason: str) -> None:
        """Count the death of a worker for the call that it made; the third is the call's fault."""
        doing = None if worker.place is None else self._watchers.last(worker.place).doing
        in_environment = doing is not None and doing.in_environment
        request.deaths.append(f"in {doing}" if in_environment else "outside environments")
        if len(request.deaths) < MAX_DEATHS:
            return
        deaths = f"{MAX_DEATHS} workers died of one call ({request.call.reproduction})"
        why = f"the last one {request.deaths[-1]}, because of {reason}"
        if in_environment:
            self._fail(request, EnvironmentFault(f"{request.call.family}: {deaths}, {why}"))
        else:
            self._fail(request, ClusterError(f"{deaths}, {why}; workers.num: 0 shows where"))
