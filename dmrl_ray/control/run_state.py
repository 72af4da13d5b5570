"""A run in progress: its commits, its workers, and when it stops."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from dmrl_ray.config.paths import find_cluster
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.control.held_out import evaluation_tasks
from dmrl_ray.control.stop import StopRequest
from dmrl_ray.data.dataset import LeftOut
from dmrl_ray.errors import Abandoned, Interrupted
from dmrl_ray.jobs.learner import LocalLearners
from dmrl_ray.jobs.messages import FAULTS, Answer, Call, CallId, Result, WorkerEvent
from dmrl_ray.jobs.protocols import Learners, Workers, answers, map_calls
from dmrl_ray.jobs.spec import JobSpec, Weights, load_family
from dmrl_ray.jobs.worker import LocalWorkers
from dmrl_ray.results.display import Display
from dmrl_ray.rollout.rows import task_rows
from dmrl_ray.store.files import FileRecord
from dmrl_ray.store.writer import RunWriter
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays, Columns, EnvironmentFault, Split, Task

if TYPE_CHECKING:
    from dmrl_ray.cluster.pool import RayWorkers

logger = logging.getLogger(__name__)


class Run:
    """The run as its stages and jobs see it.

    Attributes:
        state: plain JSON values, part of every commit: the stages done, how far the jobs of
            stages have come, how many updates made a policy, and settings changed since the start.
        files: checkpoint files in use, by name; part of every commit.
        stop: whether the run was asked to stop.
    """

    state: dict[str, Any]
    files: dict[str, FileRecord]

    def __init__(
        self,
        config: RunConfig,
        writer: RunWriter,
        display: Display,
        address: str | None,
        stop: StopRequest | None = None,
    ) -> None:
        self.stop = StopRequest(display) if stop is None else stop
        self.stop.waits_for = "" if config.workers.num else "the environment step in hand"
        self.config = config
        self.writer = writer
        self.display = display
        self.distribution: TaskDistribution = load_family(config.tasks)
        self.rollback()
        self._address = address
        self._workers: Workers | None = None
        self._watched = False
        self._committed_at = time.monotonic()
        self._updates_since_commit = 0

    @property
    def workers(self) -> Workers:
        """The rollout workers, started on first use."""
        if self._workers is None and self.config.workers.num == 0:
            self._workers = LocalWorkers(self.check)
        elif self._workers is None:
            self._start(self._starting_workers(), learners=False)
        assert self._workers is not None
        return self._workers

    def connect(self) -> None:
        """Connect to Ray, which algorithms of other libraries may need without workers, too."""
        from dmrl_ray.cluster.connection import PATIENCE_S, connect, watch

        connect(self._address, self.config, self.check)
        if not self._watched:
            self._watched = True
            where = "here" if find_cluster(self._address) is None else "cluster"
            watch(PATIENCE_S[where], self.stop.give_up, self.stop.ended)

    def learners(self, spec: JobSpec) -> Learners:
        """Learners for a job."""
        if self.config.workers.num == 0:
            return LocalLearners(spec, self.stop.abandoning)
        from dmrl_ray.cluster.learners import RayLearners

        # Workers begin first, as there are places that only learners may take.
        start = partial(self._start, self._starting_workers(), learners=True)
        return RayLearners(spec, self.config.learners, start, self.check)

    def _start(self, workers: RayWorkers, *, learners: bool) -> None:
        from dmrl_ray.cluster.connection import wait_for_room

        wait_for_room(self.config, self.check, learners=learners)
        workers.start(self.check)

    def _starting_workers(self) -> RayWorkers:
        """The workers on Ray, which may not be up yet."""
        from dmrl_ray.cluster.pool import RayWorkers

        if self._workers is None:
            self.connect()
            self._workers = RayWorkers(self.config.workers, self.config.environments)
        assert isinstance(self._workers, RayWorkers)
        return self._workers

    def map(self, calls: Sequence[Call[Result]]) -> Iterator[tuple[int, Result]]:
        """Results of calls of workers as they come, each with the number of its call."""
        return map_calls(self.workers, calls, self.check, self._on_worker_event)

    def collected(self, ids: Sequence[CallId]) -> list[Answer[object]]:
        """The answers of the collections of an iteration, by shard."""
        found = answers(self.workers, ids, self.check, self._on_worker_event)
        return sorted(found, key=lambda answer: answer.id.number)

    def restart_workers(self) -> None:
        """Replace all workers, after a job was lost."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def tasks(self, split: Split, n: int) -> list[Task]:
        """The first n evaluation tasks of a split, which are rows of the tasks table from here on.

        A task that is drawn twice is there twice.
        """
        tasks = evaluation_tasks(self.distribution, self.config.evaluation_seed, split, n)
        self.writer.add_tasks(task_rows(tasks))
        return tasks

    def event(self, event: str, stage: str = "", job: str = "", **detail: object) -> None:
        """Add a row to the events table."""
        self.writer.add_event(event, stage, job, detail)

    def note_fault(self, fault: EnvironmentFault) -> None:
        """Add a fault of an environment to the events, with what it takes to play it again."""
        self.state["faults"] += 1
        fault.number = self.state["faults"]
        detail = {"number": fault.number, "message": str(fault)} | fault.detail
        self.writer.add_event("environment_fault", self.next_stage(), "", detail)

    def restarted(self, faults: Iterable[EnvironmentFault]) -> None:
        """Count faults after which episodes were restarted.

        Raises:
            EnvironmentFault: there are more of them in the run than may be.
        """
        settings = self.config.environments
        for fault in faults:
            self.note_fault(fault)
            task = fault.detail.get("task_id")
            if settings.on_error == "quarantine_task" and task not in self.state["quarantined"]:
                self.state["quarantined"].append(task)
            if fault.number is not None and fault.number > settings.max:
                raise EnvironmentFault(
                    f"environments.max: {fault.number} faults of environments in this run, the "
                    f"last one: {fault}",
                    fault.detail,
                )

    def take_faults(self, rows: Columns) -> None:
        """Count the faults of evaluated episodes, and take them from their rows."""
        for faults in rows.pop(FAULTS, ()):
            self.restarted(faults)

    def note_left_out(self, spec: JobSpec, left_out: Iterable[LeftOut]) -> None:
        """Say which data a job does not learn from, as an event and on the screen."""
        for found in left_out:
            self.event("data_skipped", spec.stage, spec.name, **asdict(found))
            self.display.message(f"{spec.stage}: left out of the data, as {found}")

    def save(self, name: str, arrays: Arrays) -> None:
        """Write a checkpoint file, in use from the next commit on."""
        self.files[name] = self.writer.save(name, arrays)

    def save_policy(self, name: str, weights: Arrays, version: int) -> None:
        """Write a policy's weights, after `version` updates of it."""
        self.save(name, weights)
        self.state["versions"][name] = version

    def load_policy(self, name: str) -> Weights:
        """A policy of the newest commit, with the updates that made it."""
        return Weights(self.state["versions"].get(name, 0), self.load(name))

    def play_again(self, stages: Collection[str]) -> None:
        """Have stages start from scratch: from the next commit on, the run has nothing of them.

        The start that a stage read from elsewhere stays: it might not be there any more.
        """
        for name in [*self.files, *self.state["versions"]]:
            kind = name.removeprefix(f"{(stage := self._owner(name))}.")
            if stage in stages and kind != "start":
                self.files.pop(name, None)
                self.state["versions"].pop(name, None)
        for stage in stages:
            self.state["jobs"].pop(stage, None)
        self.state["done"] = [name for name in self.state["done"] if name not in stages]
        self.writer.forget(stages)

    def _owner(self, file: str) -> str:
        """The stage that a checkpoint file is of; a stage's name may have dots in it."""
        owners = [stage for stage in self.config.stages if file.startswith(f"{stage}.")]
        return max(owners, key=len, default="")

    def next_stage(self) -> str:
        """The first that is not done; "" if all are."""
        return next((name for name in self.config.stages if name not in self.state["done"]), "")

    def load(self, name: str) -> Arrays:
        """A checkpoint file of the newest commit."""
        return self.writer.load(name)

    def commit(self) -> None:
        """Make everything up to here durable."""
        with self.stop.waiting_for("the commit"):
            self.writer.commit(self.state, self.files)
        self._committed_at = time.monotonic()
        self._updates_since_commit = 0

    def rollback(self) -> None:
        """Return to the newest commit; rows added since are dropped."""
        self.writer.discard()
        committed = self.writer.state
        self.state = {"done": [], "jobs": {}, "versions": {}, "changed": {}}
        self.state |= {"faults": 0, "quarantined": []}
        if committed is not None:
            self.state |= json.loads(json.dumps(committed))
        if job := self.state.pop("job", None):  # A folder may keep the job in progress alone.
            self.state["jobs"] = {self.next_stage(): job}
        self.files = dict(self.writer.files)

    def tick(self, snapshot: Callable[[], None]) -> None:
        """Called after every update: commit if it is time, stop if it was asked for.

        Raises:
            Interrupted: after a clean commit.
        """
        self._updates_since_commit += 1
        commit = self.config.commit
        if commit.every_updates is not None:
            due = self._updates_since_commit >= commit.every_updates
        else:
            due = time.monotonic() - self._committed_at >= commit.every_s
        if due or self.stop.number is not None:
            snapshot()
            self.commit()
        self.check()

    @contextmanager
    def committing(self, snapshot: Callable[[], None]) -> Iterator[None]:
        """Commit what `snapshot` puts together if the wait inside is interrupted."""
        try:
            yield
        except Abandoned:
            raise
        except Interrupted:
            snapshot()
            self.commit()
            raise

    def check(self) -> None:
        """Raise Interrupted if the run was asked to stop, ClusterError if its cluster was lost."""
        self.stop.check()

    def _on_worker_event(self, event: WorkerEvent) -> None:
        self.event(event.event, "", "", **event.detail)
        self.display.message(f"{event.event}: {event.detail.get('message', event.detail)}")

    def close(self) -> None:
        """End the workers."""
        self.restart_workers()
        self.stop.ended.set()
