"""Base class of the `baselines`: builds, trains, saves and evaluates an algorithm of RLlib.

RLlib APIs that change between versions are called only here, in `settings` and in `player`.
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from ray.exceptions import RayError
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.tune.registry import register_env

from dmrl_ray.cluster.connection import cause_of, first_sentence
from dmrl_ray.errors import NumericalError
from dmrl_ray.jobs.external import ExternalAlgorithm
from dmrl_ray.jobs.messages import CollectReport, EvaluateCall
from dmrl_ray.rllib.environments import EnvCreator, EnvSettings, Row, TaskEnv
from dmrl_ray.rllib.metrics import columns_of, metrics_of, sample_once, take_episodes_of
from dmrl_ray.rllib.observations import ObservationBuilder
from dmrl_ray.rllib.player import play
from dmrl_ray.rllib.settings import BaselineSettings, apply, settings_of
from dmrl_ray.rollout.rows import episode_rows, evaluation_rows, task_rows
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Arrays, Columns, EnvironmentFault, random_stream

MODULE = f"learner/rl_module/{DEFAULT_MODULE_ID}"
"""Path of the weights in the state of a learner group."""

_FILE_NAME = re.compile(r"\w[\w.+-]*")


class Baseline(ExternalAlgorithm):
    """One job of an algorithm of RLlib."""

    library: ClassVar[type[AlgorithmConfig]]

    _usual_steps = 0  # per iteration

    def __init_subclass__(cls) -> None:
        cls.Config = settings_of(cls.library)

    @property
    def memory_spans_trial(self) -> bool:
        """Whether an RLlib episode is a whole trial."""
        return bool(self.settings.whole_trials)

    @property
    def settings(self) -> BaselineSettings:
        """The settings of the algorithm."""
        settings: BaselineSettings = self.spec.algorithm.settings
        return settings

    def check(self, start: ExternalAlgorithm | None) -> None:
        """Checks that environment, settings and network can be built."""
        env = TaskEnv(self._env_settings())
        env.reset(seed=0)
        env.step(env.action_space.sample())
        kind = self.spec.algorithm.type
        try:
            config = self._config()
            config.validate()
        except ValueError as error:
            raise ValueError(
                f"algorithm: RLlib rejects the settings of {kind} ({first_sentence(error)})"
            ) from error
        try:
            module = self._module(config)
        except Exception as error:  # RLlib's networks raise errors of any type.
            raise ValueError(
                f"algorithm: RLlib cannot build a network of {kind} for observations "
                f"{env.observation_space} and actions {env.action_space} "
                f"({first_sentence(_first(error))})"
            ) from error
        if isinstance(start, Baseline) and _shapes(module) != _shapes(
            start._module(start._config())
        ):
            raise ValueError(
                f"init_from: the network of stage {start.spec.stage!r} differs; use the same "
                "model, previous and observe_task"
            )

    def iterate(
        self, env_steps: int, *, learn: bool = True
    ) -> tuple[CollectReport, dict[str, float]]:
        """Runs one iteration of RLlib."""
        start, iteration = time.monotonic(), self.version
        # For steps of few environments, synchronising threads costs more than it saves.
        samples_here = self._algorithm.config.num_env_runners == 0
        torch.set_num_threads(1 if samples_here else self.spec.learner_threads)
        with _library_errors():
            if learn:
                result = self._algorithm.train()
                self.version += 1
                rows, steps = take_episodes_of(self._algorithm.env_runner_group)
                self._usual_steps = steps
            else:
                result, rows, steps = {}, [], 0
                while steps < max(1, self._usual_steps):
                    self._algorithm.env_runner_group.foreach_env_runner(sample_once)
                    more, count = take_episodes_of(self._algorithm.env_runner_group)
                    rows, steps = rows + more, steps + count
        report = CollectReport(
            self._episodes(rows, env_steps, iteration),
            steps,
            time.monotonic() - start,
            env_s=self._sampling_s(result, "env_step_timer", steps),
            inference_s=self._sampling_s(result, "rlmodule_inference_timer", steps),
            tasks=task_rows(row["task"] for row in rows),
        )
        return report, metrics_of(result)

    def play(self, call: EvaluateCall, weights: Arrays) -> Columns:
        """Returns the episodes of one trial on each task of the call."""
        torch.set_num_threads(1)
        family = self._env_settings().family()
        module = self._module(self._config())
        module.set_state(weights)
        sampler = Sampler(family, len(call.tasks), memory_spans_trial=self.memory_spans_trial)
        seed, key = self.spec.evaluation_seed, ("evaluate", call.trial, call.chunk)
        stream = random_stream(seed, *key)
        sampler.start(stream, call.policy_version, greedy=call.greedy)
        seed = int(random_stream(seed, *key, "torch").integers(2**63))
        observe = ObservationBuilder(family, "flat" if self.settings.previous else "none")
        play(module, observe, sampler, list(call.tasks), greedy=call.greedy, seed=seed)
        return evaluation_rows(sampler, trial=call.trial)

    def weights(self) -> Arrays:
        """Returns the weights of the module, target networks included."""
        with _library_errors():
            state = self._algorithm.learner_group.get_state(components=MODULE)
        weights: Arrays = state["learner"]["rl_module"][DEFAULT_MODULE_ID]
        return {name: np.asarray(array) for name, array in weights.items()}

    def load_weights(self, weights: Arrays) -> None:
        """Loads the weights of a module with the same settings."""
        algorithm = self._algorithm
        with _library_errors():
            state = {"learner": {"rl_module": {DEFAULT_MODULE_ID: weights}}}
            algorithm.learner_group.set_state(state)
            algorithm.env_runner_group.sync_weights(
                from_worker_or_learner_group=algorithm.learner_group, inference_only=True
            )

    def get_state(self) -> Arrays:
        """Returns the files of RLlib's checkpoint, as bytes."""
        with tempfile.TemporaryDirectory() as folder, _library_errors():
            self._algorithm.save_to_path(folder)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): np.fromfile(path, np.uint8) for path in files}

    def set_state(self, state: Arrays, version: int) -> None:
        """Continues from a checkpoint, with new episodes; unpickles."""
        self.version = version
        with tempfile.TemporaryDirectory() as folder, _library_errors():
            for name, data in state.items():
                if not all(_FILE_NAME.fullmatch(part) for part in name.split("/")):
                    raise ValueError(f"{name!r} cannot name a file of a checkpoint of RLlib")
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data.tobytes())
            self._algorithm.restore_from_path(folder)

    def close(self) -> None:
        """Ends RLlib's processes."""
        if "_algorithm" in vars(self):
            self._algorithm.stop()
            del self._algorithm

    @cached_property
    def _algorithm(self) -> Any:
        """RLlib's algorithm, built on first use."""
        config = self._config()
        # RLlib registers this name on each build, and Gymnasium warns about repeats.
        gym.registry.pop("rllib-single-agent-env-v0", None)
        register_env(str(config.env), EnvCreator(self._env_settings()))
        with _library_errors():
            return config.build_algo()

    def _config(self) -> AlgorithmConfig:
        for name in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # Failures raise errors.
        settings = self.settings
        if settings.num_env_runners is None:
            settings = settings.model_copy(update={"num_env_runners": self.processes})
        one_length = self._env_settings().family().fixed_length
        seed = random_stream(self.spec.seed, *self.spec.key, "rllib", self.version)
        config = self.library()
        apply(settings, config)
        config.environment("/".join(("dmrl_ray", *map(str, self.spec.key))))
        config.env_runners(
            gym_env_vectorize_mode="vector_entry_point" if one_length else "sync",
            validate_env_runners_after_construction=True,
        )
        config.fault_tolerance(
            restart_failed_env_runners=False
        )  # The run resumes from a commit instead.
        config.debugging(seed=int(seed.integers(2**31)), log_level="CRITICAL", log_sys_usage=False)
        return config

    def _env_settings(self) -> EnvSettings:
        spec, settings = self.spec, self.settings
        return EnvSettings(
            tasks=spec.tasks,
            split=spec.split,
            task=spec.fixed_tasks[0].to_json() if spec.fixed_tasks else None,
            whole_trials=settings.whole_trials,
            observe_task=settings.observe_task,
            previous="flat" if settings.previous else "none",
        )

    def _module(self, config: AlgorithmConfig) -> Any:
        """Returns a module like the learner's, with initial weights."""
        settings = self._env_settings()
        family = settings.family()
        spaces = (ObservationBuilder(family, settings.previous).space, family.action_space)
        spec = config.get_rl_module_spec(spaces={DEFAULT_MODULE_ID: spaces}, inference_only=False)
        with torch.random.fork_rng(devices=[]):
            return spec.build()

    def _sampling_s(self, result: dict[str, Any], timer: str, steps: int) -> float:
        """Returns the seconds of a timer over all samplers; RLlib reports means per vector step."""
        mean = float(result.get("env_runners", {}).get(timer, math.nan))
        return mean * steps / self._algorithm.config.num_envs_per_env_runner

    def _episodes(self, rows: list[Row], env_steps: int, iteration: int) -> Columns:
        columns = columns_of(rows)
        columns["adaptation_step"] = columns["episode"] * self.memory_spans_trial
        scored = bool(self.spec.fixed_tasks)
        family = self._env_settings().family()
        columns["greedy"] = np.zeros(len(rows), np.bool_)
        episodes = episode_rows(columns, family, iteration, scored=scored)
        episodes["env_steps"] = env_steps + columns["step"].astype(np.int64)
        episodes["trial"] = np.full(len(rows), iteration)
        return episodes


def _first(error: BaseException) -> Exception:
    """Returns the first error of a chain of contexts."""
    while error.__context__ is not None:
        error = error.__context__
    assert isinstance(error, Exception)
    return error


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(array) for name, array in module.get_state().items()}


@contextmanager
def _library_errors() -> Iterator[None]:
    """Unwraps errors of RLlib: a fault of the family or policy, or a lost process."""
    try:
        yield
    except RayError as error:
        raise cause_of(error) from error
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, EnvironmentFault | NumericalError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error
