"""Exports a trained policy as an `RLModule` checkpoint.

The module contains the network itself, with the normalisation of observations and values, so its
outputs are the same. Training in RLlib updates its weights, but not its normalisation statistics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchSquashedGaussian
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.config.components import did_you_mean
from dmrl_ray.config.schema import Component, Pretrain, RunConfig
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import JobSpec, get_weights, job_spec, load_family, set_weights
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory
from dmrl_ray.networks.heads import SquashedGaussianHead
from dmrl_ray.rllib.observations import ObservationBuilder
from dmrl_ray.store.commit_records import load_run_config
from dmrl_ray.store.files import atomic_folder
from dmrl_ray.store.reader import RunReader
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays

MODEL_FILE = "dmrl_ray.json"
"""File beside RLlib's own: the config of the policy, readable without a pickle."""

SEQUENCE_STEPS = 20
"""Length of truncated backpropagation through time, RLlib's default."""

Batch: TypeAlias = dict[str, Any]


class Squashed(TorchSquashedGaussian):  # type: ignore[misc]
    """A squashed Gaussian with entropy and KL divergence, which PPO needs and RLlib's own lacks."""

    _head = SquashedGaussianHead(nn.Identity(), 1)

    def entropy(self) -> Tensor:
        """Returns the entropy (...) in nats."""
        return self._head.entropy(self._pi)

    def kl(self, other: Squashed) -> Tensor:
        """Returns the KL divergence (...) in nats, from `other`."""
        return self._head.kl(self._pi, other._pi)

    @property
    def _pi(self) -> Tensor:
        return torch.cat([self._dist.loc, self._dist.scale.log()], -1)


class ActorCriticModule(TorchRLModule, ValueFunctionAPI):  # type: ignore[misc]
    """An `ActorCritic` with the interface of RLlib.

    ``model_config`` contains ``tasks`` and ``network``, components of a config, and ``options``,
    the keyword arguments of `ActorCritic`. RLlib's sequences are (B, T, ...), here (T, B, ...).
    """

    policy: ActorCritic

    def __init__(self, *args: Any, catalog_class: object = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # RLlib's catalog supports only its own networks.

    def setup(self) -> None:
        """Builds the network.

        Raises:
            ValueError: the observation space is not that of training.
        """
        network = Component.model_validate(self.model_config["network"])
        options = self.model_config["options"]
        family = load_family(Component.model_validate(self.model_config["tasks"]))
        expected = _obs_space(family, options)
        if _layout(self.observation_space) != _layout(expected):
            raise ConfigError(
                f"this policy expects observations {_layout(expected)}, but the environment has "
                f"{_layout(self.observation_space)}; register its family as in training, with "
                "whole_trials=True and previous='parts' if it observes its previous step"
            )
        self.policy = network.load("network")(
            network.settings, family.observation_space, family.action_space, **options
        )
        if isinstance(self.policy.policy_head, SquashedGaussianHead):
            self.action_dist_cls = Squashed

    def get_initial_state(self) -> dict[str, Tensor]:
        """Returns the initial memory of one environment, without its axis."""
        return {str(i): leaf[0] for i, leaf in enumerate(self.policy.initial_memory(1))}

    def compute_values(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """Returns (B,) or (B, T) values in units of return."""
        obs, previous = self._inputs(batch)
        if embeddings is not None:
            features = self._time_first(embeddings)
        elif self.policy.value_encoder is None:
            features = self.policy(obs, previous, self._memory(batch))[1]
        else:
            features = None
        return self._batch_first(self.policy.denormalize_value(self.policy.value(features, obs)))

    def _forward(self, batch: Batch, **kwargs: Any) -> Batch:
        obs, previous = self._inputs(batch)
        pi, features, memory = self.policy(obs, previous, self._memory(batch))
        answer: Batch = {Columns.ACTION_DIST_INPUTS: self._batch_first(pi)}
        if self.policy.value_encoder is None:
            answer[Columns.EMBEDDINGS] = self._batch_first(features)
        if memory:
            answer[Columns.STATE_OUT] = {str(i): leaf for i, leaf in enumerate(memory)}
        return answer

    def _inputs(self, batch: Batch) -> tuple[Tensor, Previous | None]:
        obs = batch[Columns.OBS]
        if not self.policy.sees_previous:
            return self._time_first(obs), None
        parts = {name: self._time_first(part) for name, part in obs.items()}
        return parts["obs"], (parts["action"], parts["reward"], parts["done"].bool())

    def _memory(self, batch: Batch) -> Memory:
        state = batch.get(Columns.STATE_IN, {})
        return tuple(state[str(i)] for i in range(len(state)))

    def _time_first(self, x: Tensor) -> Tensor:
        """Returns (T, B, ...); without memory, all rows are environments of a single step."""
        return x.transpose(0, 1) if self.policy.recurrent else x.unsqueeze(0)

    def _batch_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.policy.recurrent else x.squeeze(0)


def export_policy(
    run: Path, folder: Path, *, stage: str | None = None, checkpoint: str = "best"
) -> str:
    """Exports a policy of a run as an `RLModule` checkpoint, and returns its name in the run.

    Args:
        run: the run folder.
        folder: the output folder; it must not exist.
        stage: the stage, or the job of a fine-tuning stage; None takes the last trained stage.
        checkpoint: best or last, of a stage.

    Raises:
        ConfigError: there is no such policy, the folder exists, or RLlib cannot run the policy.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; choose another folder")
    reader = RunReader(run)
    config = load_run_config(run)
    name, owner = _choose(run, config, list(reader.files), stage, checkpoint)
    module = _module(config, owner, reader.load(name))
    with atomic_folder(folder) as temporary:
        module.save_to_path(str(temporary))
        facts = {"run": run.name, "policy": name, "model_config": module.model_config}
        (temporary / MODEL_FILE).write_text(json.dumps(facts, indent=1))
    return name


def exported(folder: Path | str, **model_config: Any) -> RLModuleSpec:
    """Returns the argument of `AlgorithmConfig.rl_module` for a policy of `export_policy`.

    Args:
        folder: the folder of the checkpoint.
        model_config: RLlib's own settings of modules, such as ``max_seq_len``.

    Raises:
        ConfigError: the folder contains no exported policy.
    """
    path = Path(folder).absolute()
    try:
        facts = json.loads((path / MODEL_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not an exported policy: it has no {MODEL_FILE}") from error
    return RLModuleSpec(
        module_class=ActorCriticModule,
        model_config={**facts["model_config"], **model_config},
        load_state_path=str(path),
    )


def _choose(
    run: Path, config: RunConfig, files: list[str], stage: str | None, checkpoint: str
) -> tuple[str, str]:
    """Returns the checkpoint file, and the stage that trained it."""
    trained = [name for name, s in config.stages.items() if isinstance(s, Pretrain)]
    ready = [name for name in trained if f"{name}.{checkpoint}" in files]
    chosen = stage or (ready[-1] if ready else "")
    if chosen in ready:
        return f"{chosen}.{checkpoint}", chosen
    owners = {file: name for name in config.stages for file in files if file.startswith(f"{name}.")}
    jobs = {f: owner for f, owner in owners.items() if owner not in trained}
    if chosen in jobs:
        return chosen, jobs[chosen]
    known = [*ready, *(job for job, owner in jobs.items() if owner == chosen)]
    raise ConfigError(
        f"{run}: there is no {checkpoint!r} policy of stage {chosen or 'any'!r}"
        + (did_you_mean(chosen, known) or f"; there are: {', '.join(known) or 'none'}")
    )


def module_spec(spec: JobSpec) -> RLModuleSpec:
    """Returns the policy of a job as a module specification, with initial weights.

    Raises:
        ConfigError: the algorithm is of another library.
    """
    kind = spec.algorithm.load("algorithm")
    if not issubclass(kind, Algorithm):
        raise ConfigError(
            f"stage {spec.stage!r}: {spec.algorithm.type} has a network of its own library; only "
            "policies of built-in algorithms can be exported to RLlib"
        )
    options = kind.policy_options(spec.algorithm.settings)
    family = load_family(spec.tasks)
    return RLModuleSpec(
        module_class=ActorCriticModule,
        observation_space=_obs_space(family, options),
        action_space=family.action_space,
        model_config={
            "tasks": spec.tasks.model_dump(mode="json"),
            "network": spec.network.model_dump(mode="json"),
            "options": options,
            "max_seq_len": family.trial_steps if kind.memory_spans_trial else SEQUENCE_STEPS,
        },
    )


def _module(config: RunConfig, stage: str, weights: Arrays) -> ActorCriticModule:
    """Returns the module with these weights."""
    spec = job_spec(config, stage)
    module: ActorCriticModule = module_spec(spec).build()
    if module.policy.latent:
        raise ConfigError(
            f"stage {stage!r}: {spec.algorithm_name}'s policy needs the latent task variable that "
            "its algorithm infers between steps, which RLlib does not support"
        )
    if module.policy.recurrent and module.policy.value_encoder is not None:
        raise ConfigError(
            f"stage {stage!r}: its value function has its own memory, which RLlib does not "
            "support; train it with network: {separate_value: false}"
        )
    # Soft actor-critic has no state-value function; RLlib's training then starts from a new one.
    initial = {k: v for k, v in get_weights(module.policy).items() if k.startswith("value_")}
    set_weights(module.policy, initial | weights)
    return module


def _obs_space(family: TaskDistribution, options: dict[str, Any]) -> gym.Space[Any]:
    """Returns the observation space of environments for the policy."""
    return ObservationBuilder(family, "parts" if options["sees_previous"] else "none").space


def _layout(space: gym.Space[Any]) -> Any:
    """Returns the shapes of the parts."""
    if isinstance(space, gym.spaces.Dict):
        return {name: part.shape for name, part in space.items()}
    return space.shape
