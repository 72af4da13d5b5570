"""The learners of a job as Ray actors, one of them or several that average their gradients."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import ray
from ray.exceptions import RayActorError, RayError

from dmrl_ray.cluster.connection import (
    START_TIMEOUT_S,
    Place,
    RayObject,
    cause_of,
    no_room,
    nodes_are_coming,
    where,
)
from dmrl_ray.cluster.watchers import Watchers
from dmrl_ray.config.schema import LearnerSettings, resolve_auto
from dmrl_ray.errors import Abandoned, ClusterError, Interrupted, JobLost
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import Stored
from dmrl_ray.jobs.protocols import POLL_S
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.tasks.activity import COMPUTING, WAITING, during
from dmrl_ray.types import Arrays, Trial

GRACE_S = 5.0
"""Time for Ray to notice that a learner is dead, after another one lost the connection to it."""


class LearnerActor:
    """A learner as a Ray actor; made in two steps, as Ray hides errors of the first."""

    def where(self) -> tuple[Place, int]:
        """Where it is, and a free port there; answered once it is up."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return where(), listener.getsockname()[1]

    @during(COMPUTING)
    def build(self, spec: JobSpec) -> None:
        """Make the learner."""
        self._learner = Learner(spec)

    @during(WAITING)
    def join(self, init_method: str, rank: int, world_size: int) -> None:
        """Average gradients with the other learners from now on."""
        interface = _interface(where().node)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        self._learner.join(init_method, rank, world_size)

    @during(COMPUTING)
    def update(self, version: int, env_steps: int, *trials: Trial) -> dict[str, float]:
        """One update."""
        return self._learner.update(version, env_steps, list(trials))

    @during(COMPUTING)
    def update_and_publish(
        self, version: int, env_steps: int, *trials: Trial
    ) -> tuple[dict[str, float], Weights]:
        """One update; the new weights travel apart from the metrics."""
        return self.update(version, env_steps, *trials), self.publish(version + 1)

    @during(COMPUTING)
    def publish(self, version: int) -> Weights:
        """The policy's weights, as the workers take them."""
        return Weights(version, self._learner.weights())

    @during(COMPUTING)
    def load_weights(self, weights: Arrays) -> None:
        """Start from a policy trained elsewhere."""
        self._learner.load_weights(weights)

    @during(COMPUTING)
    def get_state(self) -> Arrays:
        """For a checkpoint."""
        return self._learner.get_state()

    @during(COMPUTING)
    def set_state(self, state: Arrays) -> None:
        """From a checkpoint."""
        self._learner.set_state(state)


class RayLearners:
    """The learners of one job. All see every trial, and the first speaks for them.

    A learner that is dead, stopped or blocked takes the job with it: every method raises `JobLost`
    then, and the job begins again from its newest commit with new learners. One that waits for
    another to average gradients is not blocked.

    Args:
        spec: of the job.
        settings: how many learners, and on what.
        meanwhile: is called while the learners start.
        check: called in waits before the first update has ended; what it raises ends the learners.

    Raises:
        ClusterError: the cluster has no room for the learners.
        ValueError: the parts of the job do not fit together.
    """

    def __init__(
        self,
        spec: JobSpec,
        settings: LearnerSettings,
        meanwhile: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self._updated = False  # The first update may have to compile.
        self.version = 0
        self._watchers = Watchers()
        self._places: list[Place] = []
        self._published: RayObject = None
        gpus = self._gpus(settings)
        actor: RayObject = ray.remote(LearnerActor).options(
            num_cpus=resolve_auto(settings.threads),
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
        )
        self._actors: list[RayObject] = [actor.remote() for _ in range(settings.num)]
        try:
            meanwhile()
            started = self._start(settings, gpus)
            self._places = [place for place, _ in started]
            device = spec.device if gpus else "cpu"
            spec = replace(spec, device=device, learner_threads=resolve_auto(settings.threads))
            self._on_all("build", spec, stoppable=True)
            if settings.num > 1:
                place, port = started[0]
                self._join(f"tcp://{place.node}:{port}")
        except BaseException:
            self.close()
            raise

    def update(self, env_steps: int, trials: list[Stored]) -> dict[str, float]:
        """One update; what is `published` is new afterwards.

        Args:
            env_steps: of the job, before this iteration.
            trials: references, in order of their shards.
        """
        arguments = (self.version, env_steps, *trials)
        first, *others = self._actors
        refs = [actor.update.remote(*arguments) for actor in others]
        metrics, weights = first.update_and_publish.options(num_returns=2).remote(*arguments)
        try:
            # The first one may have to compile; whoever stops it loses nothing but a collection.
            answers = self._wait([metrics, *refs], stoppable=not self._updated)
        except Interrupted as stopped:
            raise Abandoned(stopped.signal_number) from stopped
        self._updated = True
        self._published = weights
        self.version += 1
        return {k: sum(a[k] for a in answers) / len(answers) for k in answers[0]}

    def published(self) -> Stored:
        """A reference of the policy's weights, as the workers take them."""
        if self._published is None:
            self._published = self._actors[0].publish.remote(self.version)
        return self._published

    def weights(self) -> Arrays:
        """The policy's weights, as arrays."""
        weights: Weights = self._wait([self.published()])[0]
        return weights.arrays

    def load_weights(self, weights: Arrays) -> None:
        """Start from a policy trained elsewhere."""
        self._published = None
        self._on_all("load_weights", ray.put(weights))

    def get_state(self) -> Arrays:
        """For a checkpoint."""
        state: Arrays = self._wait([self._actors[0].get_state.remote()])[0]
        return state

    def set_state(self, state: Arrays, version: int) -> None:
        """From a checkpoint."""
        self._published = None
        self.version = version
        self._on_all("set_state", ray.put(state))

    def pids(self) -> list[int]:
        """Process ids, the first learner's first."""
        return [place.pid for place in self._places]

    def close(self) -> None:
        """End the learners."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        self._watchers.close()

    @staticmethod
    def _gpus(settings: LearnerSettings) -> int:
        """GPUs of each learner: 1, or 0 where the cluster has none to spare for all of them."""
        has = int(ray.cluster_resources().get("GPU", 0))
        if settings.device == "cuda" and has < settings.num and not nodes_are_coming():
            raise ClusterError(
                f"learners.device: {settings.num} learners on cuda need a GPU each, and the "
                f"cluster has {has}; use device: auto or fewer learners"
            )
        return int(settings.device == "cuda" or (settings.device == "auto" and has >= settings.num))

    def _start(self, settings: LearnerSettings, gpus: int) -> list[tuple[Place, int]]:
        """Where the learners are, once they are up."""
        refs = [actor.where.remote() for actor in self._actors]
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_S)
            if len(ready) == len(refs):
                return self._wait(refs)
            self._check()
            if time.monotonic() > end and not nodes_are_coming():
                count, threads = settings.num, resolve_auto(settings.threads)
                what = f"learners.num: {count} learners of {threads} threads"
                raise no_room(what, count * threads, count * gpus)

    def _join(self, init_method: str) -> None:
        """The learners meet, and average their gradients from now on."""
        size = len(self._actors)
        refs = [a.join.remote(init_method, rank, size) for rank, a in enumerate(self._actors)]
        self._wait(refs, stoppable=True)

    def _on_all(self, method: str, *arguments: object, stoppable: bool = False) -> list[RayObject]:
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return self._wait(refs, stoppable=stoppable)

    def _wait(self, refs: list[RayObject], *, stoppable: bool = False) -> list[RayObject]:
        """Answers of the learners, however long they take."""
        answers: dict[RayObject, RayObject] = {}
        waiting = refs
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=POLL_S)
            if stoppable:
                self._check()
            for ref in ready:
                try:
                    answers[ref] = ray.get(ref)
                except RayError as error:
                    raise _reason(error, waiting) from error
            if not ready:
                self._check_alive()
        return [answers[ref] for ref in refs]

    def _check_alive(self) -> None:
        for place, found in self._watchers.look(self._places).items():
            if found.lost is not None:
                raise JobLost(
                    f"a learner (process {place.pid} on {place.node}) was lost: {found.lost}"
                )


def _reason(error: RayError, waiting: list[RayObject]) -> Exception:
    """Why a learner failed: another that lost its connection to a dead one says so before Ray."""
    if waiting:
        waiting, _ = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S)
    for ref in waiting:
        try:
            ray.get(ref)
        except RayActorError as dead:
            return cause_of(dead)
        except RayError:
            continue
    return cause_of(error)


def _interface(ip: str) -> str | None:
    """The network interface that has this address; gloo would take that of the host's name."""
    import psutil  # Comes with Ray, and is found once Ray is imported.

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return str(name)
    return None
