"""Settings of RLlib's algorithms as `Settings`, with their names and types in RLlib.

They are derived from the methods of RLlib's ``AlgorithmConfig`` classes, so they are those of the
installed Ray.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
)
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from dmrl_ray.config.components import Settings

COMMON: dict[str, str] = {
    "training": (
        "gamma lr grad_clip grad_clip_by train_batch_size_per_learner num_epochs minibatch_size "
        "shuffle_batch_per_epoch"
    ),
    "env_runners": (
        "num_env_runners num_envs_per_env_runner num_cpus_per_env_runner num_gpus_per_env_runner "
        "rollout_fragment_length batch_mode explore sample_timeout_s compress_observations "
        "max_requests_in_flight_per_env_runner"
    ),
    "learners": (
        "num_learners num_cpus_per_learner num_gpus_per_learner local_gpu_idx "
        "num_aggregator_actors_per_learner max_requests_in_flight_per_learner"
    ),
    "reporting": (
        "min_time_s_per_iteration min_train_timesteps_per_iteration "
        "min_sample_timesteps_per_iteration"
    ),
}
"""Settings common to all algorithms, by method of ``AlgorithmConfig``; those that an algorithm adds
to ``training`` are included too."""

OLD_STACK = {
    "model",
    "optimizer",
    "lr_schedule",
    "entropy_coeff_schedule",
    "store_buffer_in_checkpoints",
}
"""Settings of the old API stack, which the new one rejects or ignores. Here, ``model`` is RLlib's
``DefaultModelConfig``."""

OTHER_DEFAULTS: dict[str, Any] = {
    "num_cpus_per_env_runner": 0,
    "num_learners": 0,
    "min_time_s_per_iteration": None,
}
"""Defaults that differ from RLlib's, see `BaselineSettings`."""

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a section of settings",
    list: "a list",
    tuple: "a list",
    types.NoneType: "",
}
"""Types that YAML supports, with their names in messages."""


class BaselineSettings(Settings):
    """Settings of every baseline in addition to RLlib's.

    Defaults are RLlib's, except that samplers reserve no CPU (the idle rollout workers have it),
    the learner is in this process, and iterations have no minimum time.
    """

    num_env_runners: int | None = Field(default=None, ge=0)
    """Number of RLlib's samplers; null is the run's ``workers.num``, 0 samples in this process."""

    whole_trials: bool = False
    """An RLlib episode is a whole trial: with ``previous: true`` and ``model: {use_lstm: true}``
    this is RL^2 in RLlib."""

    previous: bool = False
    """Adds the previous action, reward and done to the observation."""

    observe_task: bool = False
    """Adds the task's parameters to the observation, for a privileged reference."""


def settings_of(library: type[AlgorithmConfig]) -> type[BaselineSettings]:
    """Returns the settings class of an algorithm of RLlib."""
    defaults = library()
    model = _model_settings(defaults.model_config)
    found: dict[str, Any] = {"model": (model, model())}
    for _, name, annotation in _parameters(library):
        default = OTHER_DEFAULTS.get(name, getattr(defaults, name, None))
        kind = _plain(annotation, default)
        if kind is not None and name not in BaselineSettings.model_fields:
            found.setdefault(name, (kind, copy.deepcopy(default)))
    return create_model(f"{library.__name__}Settings", __base__=BaselineSettings, **found)


def apply(settings: BaselineSettings, config: AlgorithmConfig) -> None:
    """Applies the settings that differ from RLlib's defaults.

    Raises:
        ValueError: RLlib rejects a value.
    """
    config.rl_module(model_config=DefaultModelConfig(**dict(settings.model)))  # type: ignore[attr-defined]
    for method, name, _ in _parameters(type(config)):
        if hasattr(settings, name) and getattr(settings, name) != getattr(config, name, None):
            getattr(config, method)(**{name: getattr(settings, name)})


def _parameters(library: type[AlgorithmConfig]) -> Iterator[tuple[str, str, Any]]:
    """Yields (method, name, annotation) of all settings, the algorithm's own first."""
    for method, common in COMMON.items():
        for base in library.__mro__:
            own = vars(base).get(method)
            for p in inspect.signature(own).parameters.values() if own is not None else ():
                chosen = (
                    p.name in common.split() if base is AlgorithmConfig else method == "training"
                )
                taken = p.default is NotProvided and p.name[0] != "_" and p.name not in OLD_STACK
                if chosen and taken:
                    yield method, p.name, p.annotation


def _plain(annotation: Any, default: Any) -> Any:
    """Returns the type of a setting, restricted to YAML types and that of the default; or None."""
    kinds = [kind for kind in _members(annotation) if (get_origin(kind) or kind) in _WORDS]
    if float in kinds or isinstance(default, float):
        kinds = [kind for kind in kinds if kind is not int] + [float]
    if not any(kind is not types.NoneType for kind in kinds):
        return None
    for more in ((), (types.NoneType,) if default is None else (type(default),)):
        kind: Any = Union[tuple([*kinds, *more])]  # noqa: UP007 (made of a list)
        try:
            TypeAdapter(kind).validate_python(default)
            return _with_one_message(kind)
        except ValidationError:  # RLlib's annotation does not allow its own default.
            continue
    return None


def _with_one_message(kind: Any) -> Any:
    """Returns a union type with a single message if no member matches."""
    names = {_WORDS[get_origin(part) or part] for part in _members(kind)} - {""}
    if len(names) == 1:
        return kind
    expected = " or ".join(sorted(names))

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"must be {expected}, found {value!r}") from None

    return Annotated[kind, WrapValidator(check)]


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _members(part)
    else:
        yield annotation


def _model_settings(own: dict[str, Any]) -> type[Settings]:
    """Returns the settings of RLlib's ``DefaultModelConfig``, with an algorithm's own defaults."""
    found: dict[str, Any] = {}
    for field in fields(DefaultModelConfig):
        default = own.get(field.name, getattr(DefaultModelConfig(), field.name))
        kind = _plain(field.type, default)
        if kind is not None:
            found[field.name] = (kind, default)
    return create_model("ModelSettings", __base__=Settings, **found)
