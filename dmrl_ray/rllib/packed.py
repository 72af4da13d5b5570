"""Rollouts and updates of this package inside RLlib, for use by `AlgorithmConfig` and Tune.

    PackedConfig().packed(tasks={"type": "cartpole"}, algorithm={"type": "ppo"}).build_algo()

    algorithm    sample(weights v) --> env runners: collect, one shard at a time
                 trials (T, B, ...) --> learner: update --> weights v + 1

RLlib's episodes and connectors are bypassed: env runners return whole rollouts, and the learner
updates with them, so an update does not depend on the number of env runners. Left out, compared
with the stages of a run: tables, more than one learner, and exact resume with several env runners
(RLlib stores the state of one; the episodes of the others start again).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env import INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)

from dmrl_ray.config.schema import RunConfig
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import CollectCall, CollectReport
from dmrl_ray.jobs.spec import JobSpec, Weights, job_spec
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.rllib.policies import module_spec
from dmrl_ray.types import Arrays, Trial

STAGE = "packed"


class PackedEnvRunner(EnvRunner, Checkpointable):  # type: ignore[misc]
    """Collects the rollouts of its share of the shards, by a `RolloutWorker`."""

    def __init__(self, *, config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._spec = config.job_spec()
        self._worker = RolloutWorker()
        self._states: dict[int, Arrays] = {}
        first, share = max(0, (self.worker_index or 0) - 1), max(1, config.num_env_runners)
        self._shards = range(first, self._spec.rollout.shards, share)

    def sample(
        self, *, env_steps: int = 0, weights: Weights | None = None, **kwargs: Any
    ) -> dict[int, tuple[CollectReport, Trial]]:
        """Collects one iteration of each of its shards; returns results by shard."""
        assert weights is not None
        answers = {}
        for shard in self._shards:
            call = CollectCall(self._spec, shard, weights.version, env_steps)
            state = self._states.get(shard, {})
            report, trial, self._states[shard] = self._worker.collect(call, weights, state)
            answers[shard] = report, trial
        return answers

    def assert_healthy(self) -> None:
        """Does nothing: an env runner is healthy once it is built."""

    def get_spaces(self) -> dict[str, Any]:
        """Returns the spaces of the module."""
        module = module_spec(self._spec)
        spaces = (module.observation_space, module.action_space)
        return {INPUT_ENV_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns open episodes and random states of its shards; weights come with each call."""
        return {"shards": self._states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores those of its shards that are in the checkpoint."""
        self._states |= {n: s for n, s in state.get("shards", {}).items() if n in self._shards}

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[()], dict[str, Any]]:
        """Returns the arguments with which RLlib builds it from a checkpoint."""
        return (), {"config": self.config}

    def get_metrics(self) -> Any:
        """Returns no metrics; they come with the samples."""
        return self.metrics.reduce()


class PackedLearner(TorchLearner):  # type: ignore[misc]
    """Wraps a `Learner`, whose policy is in RLlib's module."""

    def build(self) -> None:
        """Builds the module and the learner."""
        if self._is_built:
            return
        super().build()
        self._packed = Learner(self.config.job_spec())
        self.version = self.env_steps = 0
        self.module[DEFAULT_MODULE_ID].unwrapped().policy = self._packed.policy

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Does nothing: the algorithm has its own optimiser."""

    def compute_loss_for_module(self, **kwargs: Any) -> Any:
        """Is never called: the algorithm has its own loss."""
        raise NotImplementedError

    def update_packed(self, trials: list[Trial], steps: int) -> dict[str, float]:
        """Updates with the trials of all shards, in their order."""
        metrics = self._packed.update(self.version, self.env_steps, trials)
        self.version += 1
        self.env_steps += steps
        return metrics

    def published(self) -> tuple[Weights, int]:
        """Returns the weights for workers, and the environment steps trained on."""
        return Weights(self.version, self._packed.weights()), self.env_steps

    def _get_optimizer_state(self) -> dict[str, Any]:
        progress = {"version": np.array(self.version), "env_steps": np.array(self.env_steps)}
        return {"progress": progress, "learner": self._packed.get_state()}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        self._packed.set_state(state["learner"])
        self.version = int(state["progress"]["version"])
        self.env_steps = int(state["progress"]["env_steps"])


class PackedAlgorithm(Algorithm):  # type: ignore[misc]
    """Alternates sampling of rollouts and updates."""

    @classmethod
    def get_default_config(cls) -> PackedConfig:
        """Returns the default config."""
        return PackedConfig(cls)

    def training_step(self) -> None:
        """Runs one iteration: sample, then update."""
        runners, learners = self.env_runner_group, self.learner_group
        weights, env_steps = next(iter(learners.foreach_learner(PackedLearner.published))).get()
        answers = runners.foreach_env_runner(
            partial(PackedEnvRunner.sample, weights=weights, env_steps=env_steps),
            local_env_runner=runners.num_remote_env_runners() == 0,
        )
        by_shard = {shard: answer for part in answers for shard, answer in part.items()}
        reports = [by_shard[shard][0] for shard in sorted(by_shard)]
        trials = [by_shard[shard][1] for shard in sorted(by_shard)]
        steps = sum(report.env_steps for report in reports)
        updated = learners.foreach_learner(PackedLearner.update_packed, trials=trials, steps=steps)
        self.metrics.log_dict(
            next(iter(updated)).get(), key=(LEARNER_RESULTS, DEFAULT_MODULE_ID), window=1
        )
        returns = np.concatenate([report.episodes["return"] for report in reports])
        sampled = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
        self.metrics.log_value(sampled, steps, reduce="lifetime_sum")
        for value in returns.tolist():
            self.metrics.log_value((ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN), value, window=100)


class PackedConfig(AlgorithmConfig):  # type: ignore[misc]
    """An `AlgorithmConfig` for training with algorithms of this package."""

    def __init__(self, algo_class: type[PackedAlgorithm] | None = None) -> None:
        super().__init__(algo_class=algo_class or PackedAlgorithm)
        self.settings: dict[str, Any] = {}
        self.env_runner_cls = PackedEnvRunner
        self.num_env_runners = 0

    def packed(self, **settings: Any) -> PackedConfig:
        """Sets parts of a run's config: tasks, network, algorithm and rollout; and ``env_steps``,
        the budget for schedules.

        Raises:
            ValueError: the settings are invalid.
        """
        self.settings = {**self.settings, **settings}
        self.job_spec()
        return self

    def job_spec(self) -> JobSpec:
        """Returns the job that env runners and learners are built from."""
        parts: Mapping[str, Any] = {k: v for k, v in self.settings.items() if k != "env_steps"}
        stage = {"type": "pretrain", "env_steps": self.settings.get("env_steps", 1)}
        run = {**parts, "seed": self.seed or 0, "stages": {STAGE: stage}}
        return job_spec(RunConfig.model_validate(run), STAGE)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Returns the policy as a module."""
        return module_spec(self.job_spec())

    def get_default_learner_class(self) -> type[PackedLearner]:
        """Returns `PackedLearner`."""
        return PackedLearner

    def validate(self) -> None:
        """Checks that there is at most one learner."""
        super().validate()
        if self.num_learners > 1:
            self._value_error("num_learners: packed rollouts support only one learner; use 1")
