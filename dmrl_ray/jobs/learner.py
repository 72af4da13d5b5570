"""Learners: they train a policy on what the workers collected."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.errors import ConfigError, Interrupted, NumericalError
from dmrl_ray.jobs.messages import Stored
from dmrl_ray.jobs.spec import JobSpec, Weights, build
from dmrl_ray.learn.all_reduce import gradient_average
from dmrl_ray.learn.gradients import Compiled
from dmrl_ray.types import Array, Arrays, Trial, join_shards, random_stream

MAX_NON_FINITE_UPDATES = 3
"""Updates in a row with a loss or gradient that is not finite, after which a job stops."""


SLOW_S = 1.0
"""Seconds of an update from which on the next one is not waited for by a run that is to stop."""


class Learner:
    """One policy and its optimiser, on one device.

    With several learners each sees every trial and takes its share of every minibatch, so that
    the averaged gradient is the one a single learner would have had.

    Raises:
        ConfigError: the algorithm or its policy cannot be compiled, and should be.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self._program = build(spec)
        self.algorithm = self._program.algorithm
        self.policy = self._program.policy.to(self.device)
        self.algorithm.prepare_training(spec.trainable)
        self.algorithm.precision = getattr(torch, spec.precision)
        self._compiled = compiled(self.algorithm, spec) if spec.compile else None
        if self._compiled is not None:
            self.algorithm.gradients = self._compiled
        self._non_finite = 0

    def join(self, init_method: str, rank: int, world_size: int) -> None:
        """Average gradients with the other learners from now on."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=world_size
        )
        self.algorithm.rank, self.algorithm.world_size = rank, world_size
        self.algorithm.average_gradients = gradient_average(
            sum(p.numel() for p in self.algorithm.parameters), self.device
        )

    def update(self, version: int, env_steps: int, trials: list[Trial]) -> dict[str, float]:
        """Improve the policy from one iteration's trials, given in order of their shards.

        Args:
            version: updates before this one.
            env_steps: of the job, before this iteration.
            trials: one of each shard.

        Raises:
            NumericalError: several updates in a row had no finite gradient.
        """
        start = time.monotonic()
        torch.set_num_threads(self.spec.learner_threads)
        trial = [rollout.map(self._to_device) for rollout in join_shards(trials)]
        algorithm = self.algorithm
        algorithm.rng = random_stream(self.spec.seed, *self.spec.key, "update", version)
        algorithm.progress = self.spec.spent(version, env_steps)
        skipped = algorithm.skipped_batches
        # Dropout draws from torch's own stream.
        noise = random_stream(self.spec.seed, *self.spec.key, "noise", version)
        torch.manual_seed(int(noise.integers(2**63)))
        self.policy.train(not algorithm.frozen_statistics)
        metrics = algorithm.update(trial)
        self.policy.eval()
        skipped = algorithm.skipped_batches - skipped
        self._non_finite = self._non_finite + 1 if skipped else 0
        if self._non_finite >= MAX_NON_FINITE_UPDATES:
            raise NumericalError(
                f"stage {self.spec.stage!r}, update {version}: no finite gradient for "
                f"{self._non_finite} updates in a row; lower algorithm.lr or check the rewards"
            )
        metrics["skipped_batches"] = float(skipped)
        metrics["time/update_s"] = time.monotonic() - start
        if self._compiled is not None:
            metrics["time/compile_s"], self._compiled.seconds = self._compiled.seconds, 0.0
        return metrics

    def weights(self) -> Arrays:
        """Parameters and normalisation statistics."""
        return self._program.weights()

    def load_weights(self, weights: Arrays) -> None:
        """Start from a policy trained elsewhere.

        Raises:
            ValueError: the weights do not fit.
        """
        self._program.load(weights)

    def get_state(self) -> Arrays:
        """Weights, optimiser and the algorithm's own: all that the next update depends on."""
        state = {f"weights.{name}": array for name, array in self.weights().items()}
        for i, parameter in enumerate(self.algorithm.parameters):
            for name, value in self.algorithm.optimizer.state[parameter].items():
                state[f"optimizer.{i}.{name}"] = value.detach().cpu().numpy().copy()
        own = self.algorithm.get_state()
        return state | {f"algorithm.{name}": array for name, array in own.items()}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self.load_weights(_under("weights.", state))
        self.algorithm.set_state(_under("algorithm.", state))
        self.algorithm.optimizer.state.clear()
        for name, array in state.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                parameter = self.algorithm.parameters[int(i)]
                value = torch.tensor(array)
                on = parameter.device if value.dim() or key == "step" else value.device
                self.algorithm.optimizer.state[parameter][key] = value.to(on)

    def _to_device(self, array: Array) -> Tensor:
        return torch.as_tensor(array, device=self.device)


def compiled(algorithm: Algorithm, spec: JobSpec) -> Compiled:
    """Gradients of an algorithm's losses by compiled code, which is made when it is first used.

    Raises:
        ConfigError: they, or its policy, cannot be compiled.
    """
    if not algorithm.compiles:
        raise ConfigError(
            f"learners.compile: the losses of {spec.algorithm_name} cannot be compiled; use false"
        )
    return Compiled(algorithm.policy)


def _under(prefix: str, state: Arrays) -> Arrays:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


class LocalLearners:
    """The learner of a run without Ray, in this process.

    Args:
        spec: of the job.
        abandoning: the inside of which ends with `Interrupted` at any point, if it is to.
    """

    def __init__(
        self, spec: JobSpec, abandoning: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._learner = Learner(spec)
        self.version = 0
        self._abandoning = abandoning
        self._seconds = math.inf  # that the newest update took; the first may have to compile

    def update(self, env_steps: int, trials: list[Stored]) -> dict[str, float]:
        """One update; `weights` are new afterwards.

        Raises:
            Interrupted: in an update that takes long, which is undone.
        """
        given = self.version, env_steps, cast("list[Trial]", trials)
        if self._seconds < SLOW_S:
            metrics = self._learner.update(*given)
        else:
            before = {name: np.array(x) for name, x in self.get_state().items()}
            try:
                with self._abandoning():
                    metrics = self._learner.update(*given)
            except Interrupted:
                self._learner.set_state(before)
                raise
        self._seconds = metrics["time/update_s"]
        self.version += 1
        return metrics

    def weights(self) -> Arrays:
        """The policy's weights, as arrays."""
        return self._learner.weights()

    def published(self) -> Weights:
        """The policy's weights, as the workers take them."""
        return Weights(self.version, self.weights())

    def load_weights(self, weights: Arrays) -> None:
        """Start from a policy trained elsewhere."""
        self._learner.load_weights(weights)

    def get_state(self) -> Arrays:
        """For a checkpoint."""
        return self._learner.get_state()

    def set_state(self, state: Arrays, version: int) -> None:
        """From a checkpoint."""
        self._learner.set_state(state)
        self.version = version

    def close(self) -> None:
        """Nothing to end."""
