"""Looks at the processes of actors, wherever they are: on other nodes through an actor of each.

    this node       `jobs.liveness.Watch` in the driver
    other nodes     the same as an actor without CPUs, asked once a second and never waited for

Dead nodes are Ray's to notice: it says so of every actor that was there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dmrl_ray.cluster.connection import Place, RayObject
from dmrl_ray.jobs.liveness import LOOK_EVERY_S, Look, Watch

LAST_LOOK_S = 2.0
"""Time for another node to say what a process did before it died."""


class Watchers:
    """Looks at processes again and again.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._here = ray.get_runtime_context().get_node_id()
        self._watch = Watch(clock)
        self._actors: dict[str, RayObject] = {}
        self._asked: dict[str, RayObject] = {}
        self._looked_at = -LOOK_EVERY_S

    def attach(self, place: Place) -> None:
        """Open the notes of a process, which can be read after its death from here on."""
        if place.node_id == self._here:
            self._watch.attach(place.pid)
        else:
            self._on(place.node_id).attach.remote(place.pid)

    def look(self, places: Iterable[Place]) -> dict[Place, Look]:
        """New findings; none where the last look was less than a second ago."""
        if self._clock() - self._looked_at < LOOK_EVERY_S:
            return {}
        self._looked_at = self._clock()
        nodes: dict[str, list[Place]] = {self._here: []}
        for place in places:
            nodes.setdefault(place.node_id, []).append(place)
        found: dict[Place, Look] = {}
        for node, there in nodes.items():
            pids = [place.pid for place in there]
            looks = self._watch.look(pids) if node == self._here else self._ask(node, pids)
            found |= {place: looks[place.pid] for place in there if place.pid in looks}
        return found

    def last(self, place: Place) -> Look:
        """The last activity of a process that has died, as far as it is known."""
        if place.node_id == self._here:
            return self._watch.last(place.pid)
        try:
            last = self._on(place.node_id).last.remote(place.pid)
            found: Look = ray.get(last, timeout=LAST_LOOK_S)
        except RayError:  # It is gone with its node.
            return Look()
        return found

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors, self._asked = {}, {}

    def _ask(self, node: str, pids: list[int]) -> dict[int, Look]:
        """The answer to the question before, if it has come; then the question is asked again."""
        found: dict[int, Look] = {}
        asked = self._asked.get(node)
        if asked is not None:
            if not ray.wait([asked], timeout=0)[0]:
                return found
            try:
                found = ray.get(asked)
            except RayError:
                self._actors.pop(node, None)
        self._asked[node] = self._on(node).look.remote(pids)
        return found

    def _on(self, node: str) -> RayObject:
        """The actor of a node."""
        if node not in self._actors:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            actor: RayObject = ray.remote(Watch).options(num_cpus=0, scheduling_strategy=there)
            self._actors[node] = actor.remote()
        return self._actors[node]
