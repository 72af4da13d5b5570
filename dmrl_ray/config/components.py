"""Base class of settings, their numeric types, and components: classes chosen by the config.

Task families, networks, encoders and algorithms define their settings in a nested ``Config``; a
config names these classes by import path or short name.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import ModuleType
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

SHORT_NAMES: dict[str, dict[str, str]] = {
    "tasks": {
        "bandit": "dmrl_ray.envs.bandit:Bandit",
        "informative_bandit": "dmrl_ray.envs.informative_bandit:InformativeBandit",
        "restless_bandit": "dmrl_ray.envs.restless_bandit:RestlessBandit",
        "two_step": "dmrl_ray.envs.two_step:TwoStep",
        "tabular_mdp": "dmrl_ray.envs.tabular_mdp:TabularMDP",
        "grid_nav": "dmrl_ray.envs.grid_nav:GridNav",
        "point_goal": "dmrl_ray.envs.point_goal:PointGoal",
        "cartpole": "dmrl_ray.envs.cartpole:CartPole",
        "gym": "dmrl_ray.envs.gym_env:GymEnv",
        "observe": "dmrl_ray.envs.observe:Observe",
    },
    "network": {"actor_critic": "dmrl_ray.networks.actor_critic:ActorCritic"},
    "encoder": {
        "mlp": "dmrl_ray.networks.mlp:MLP",
        "cnn": "dmrl_ray.networks.cnn:CNN",
        "residual": "dmrl_ray.networks.cnn:Residual",
        "embedding": "dmrl_ray.networks.embedding:Embedding",
        "combined": "dmrl_ray.networks.combined:Combined",
        "lstm": "dmrl_ray.networks.recurrent:LSTM",
        "gru": "dmrl_ray.networks.recurrent:GRU",
        "belief": "dmrl_ray.networks.belief:Belief",
        "rnn": "dmrl_ray.networks.recurrent:RNN",
        "transformer": "dmrl_ray.networks.transformer:Transformer",
        "symmetric": "dmrl_ray.networks.symmetric:Symmetric",
        "tabular": "dmrl_ray.networks.tabular:Tabular",
    },
    "algorithm": {
        "ppo": "dmrl_ray.algorithms.ppo:PPO",
        "appo": "dmrl_ray.algorithms.appo:APPO",
        "impala": "dmrl_ray.algorithms.impala:IMPALA",
        "rl2": "dmrl_ray.algorithms.rl2:RL2",
        "sac": "dmrl_ray.algorithms.sac:SAC",
        "pearl": "dmrl_ray.algorithms.pearl:PEARL",
        "stepwise_pearl": "dmrl_ray.algorithms.stepwise_pearl:StepwisePEARL",
        "maml": "dmrl_ray.algorithms.maml:MAML",
        "promp": "dmrl_ray.algorithms.promp:ProMP",
        "reptile": "dmrl_ray.algorithms.reptile:Reptile",
        "cavia": "dmrl_ray.algorithms.cavia:CAVIA",
        "meta_sgd": "dmrl_ray.algorithms.meta_sgd:MetaSGD",
        "varibad": "dmrl_ray.algorithms.varibad:VariBAD",
        "dagger": "dmrl_ray.algorithms.dagger:DAgger",
        "behavior_cloning": "dmrl_ray.algorithms.behavior_cloning:BehaviorCloning",
        "trial_cloning": "dmrl_ray.algorithms.behavior_cloning:TrialCloning",
        "algorithm_distillation": (
            "dmrl_ray.algorithms.algorithm_distillation:AlgorithmDistillation"
        ),
        "dpt": "dmrl_ray.algorithms.dpt:DPT",
        "gail": "dmrl_ray.algorithms.gail:GAIL",
        "autoencoder": "dmrl_ray.algorithms.autoencoder:Autoencoder",
        "vae": "dmrl_ray.algorithms.autoencoder:VAE",
        "rllib:PPO": "dmrl_ray.rllib.baselines:PPO",
        "rllib:APPO": "dmrl_ray.rllib.baselines:APPO",
        "rllib:IMPALA": "dmrl_ray.rllib.baselines:IMPALA",
        "rllib:SAC": "dmrl_ray.rllib.baselines:SAC",
        "rllib:DQN": "dmrl_ray.rllib.baselines:DQN",
    },
}
"""Short names of the built-in classes, by the setting that names them."""

OLD_NAMES: dict[str, str] = {
    "steps_per_shot": "steps_per_adaptation",
    "sizes": "hidden_sizes",
    "size": "hidden_size",
    "body": "torso",
    "foretell_obs": "decode_obs",
    "adapt": "trainable",
    "critic_sizes": "critic_hidden_sizes",
    "context_sizes": "context_hidden_sizes",
    "decoder": "decoder_hidden_sizes",
    "discriminator": "discriminator_hidden_sizes",
    "target_rate": "tau",
    "teacher": "beta",
    "teacher_until": "beta_until",
    "deadline_s": "environments.timeout_s",
    "timeout_s": "environments.timeout_s",
    "optimizer": "by",
    "lr": "by",
    "trainable": "by",
    "episodes_per_update": "by",
}
"""Former names of settings, with the current names, for error messages; a dotted name is of another
section."""

MOVED = {"belief_steps": "stepwise_pearl", "kept_noise": "stepwise_pearl"}
"""Settings that belong to another class than they did, and its short name."""

OLD_TYPES = {"distillation": "dagger", "cloning": "behavior_cloning"}
"""Former short names of classes, with the current ones, for error messages."""

LIBRARIES = ("rllib",)
"""Prefixes of short names that look like a module in ``module:Class``."""


LARGEST_SIZE, LARGEST_NUMBER, LARGEST_COUNT = 65_536, 1_000_000, 10**15
"""Upper bounds that only a mistake exceeds."""

LARGEST_SEED = 2**63 - 1
"""The largest 64-bit signed integer."""

Condition: TypeAlias = tuple[str, tuple[object, ...]]
"""Another setting and its allowed values; ``()`` allows all but null, false, 0 and empty."""


class Settings(BaseModel):
    """Base of every settings class: frozen, with unknown keys as errors.

    A setting with a condition in `read_with` has no effect unless the condition holds; it is then
    rejected unless it is at its default.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    read_with: ClassVar[Mapping[str, Condition]] = {}
    """Conditions by setting; those of base classes apply too."""

    @classmethod
    def conditions(cls) -> dict[str, Condition]:
        """Returns `read_with` of this class and its bases."""
        found: dict[str, Condition] = {}
        for base in reversed(cls.__mro__):
            found |= vars(base).get("read_with", {})
        return found

    @model_validator(mode="after")
    def _is_read(self) -> Settings:
        for name, (other, values) in self.conditions().items():
            found = getattr(self, other)
            if at_default(self, name) or (found in values if values else found):
                continue
            needed = " or ".join(map(_as_yaml, values)) if values else "set"
            raise ValueError(
                f"{name}: is read only where {other} is {needed}, found {other}: "
                f"{_as_yaml(found)}; leave it out"
            )
        return self


def at_default(settings: BaseModel, name: str) -> bool:
    """Returns whether a setting has its default value."""
    field = type(settings).model_fields[name]
    if field.is_required():
        return False
    value, default = getattr(settings, name), field.get_default(call_default_factory=True)
    if isinstance(value, Component) and isinstance(default, Component):
        return value.type == default.type and bool(value.settings == default.settings)
    return bool(value == default)


def _as_yaml(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    known = value is None or isinstance(value, bool)
    return words[value] if known else str(list(value) if isinstance(value, tuple) else value)  # type: ignore[index]


def _count(value: object) -> object:
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
        try:
            number = float(text[:-1] if factor != 1.0 else text) * factor
        except ValueError:
            return value
        if math.isfinite(number) and abs(number - round(number)) < 1e-6:
            return round(number)
    return value


Count = Annotated[int, Field(le=LARGEST_COUNT), BeforeValidator(_count)]
"""A count of what is never in memory at once; may be written as 1e6, 1_000_000, 2M or 50k."""

Number = Annotated[int, Field(ge=1, le=LARGEST_NUMBER), BeforeValidator(_count)]
"""A number of what is in memory at once; written as a `Count`."""

Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
"""The width of a layer, or a number of layers, processes or threads."""

Sizes = Annotated[tuple[Size, ...], Field(max_length=64)]
"""The widths of consecutive layers."""


class Component(BaseModel):
    """A class chosen by the config, with its settings: ``{type: maml, inner_lr: 0.1}``.

    ``type`` is a short name from `SHORT_NAMES` or an import path ``module:Class``; a component
    without settings may be written as its type alone.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str

    @model_validator(mode="before")
    @classmethod
    def _type_alone(cls, data: object) -> object:
        return {"type": data} if isinstance(data, str) else data

    def load(self, kind: str | None = None) -> Any:
        """Imports the class.

        Args:
            kind: the setting that names it, a key of `SHORT_NAMES`; None searches all of them.

        Raises:
            ValueError: the name is unknown, with the closest known one, or the import fails.
        """
        return import_class(self.type, kind)

    @cached_property
    def settings(self) -> Any:
        """The settings, validated once by the ``Config`` of the class."""
        return self.load().Config.model_validate(self.model_extra or {})


def import_class(name: str, kind: str | None = None) -> Any:
    """Returns the class with a short name or an import path.

    Raises:
        ValueError: the name is unknown, its module cannot be imported, or it has no ``Config``.
    """
    module_name, _, class_name = _import_path(name, kind).partition(":")
    module = _import_module(module_name)
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        hint = did_you_mean(class_name, classes)
        raise ValueError(f"module '{module_name}' has no class '{class_name}'{hint}")
    if not (inspect.isclass(config := getattr(found, "Config", None))) or not issubclass(
        config, Settings
    ):
        raise ValueError(
            f"class '{name}' has no settings: nest a class Config(dmrl_ray.config.Settings) in it"
        )
    return found


def _import_path(name: str, kind: str | None) -> str:
    groups = SHORT_NAMES if kind not in SHORT_NAMES else {kind: SHORT_NAMES[kind]}
    known = {short: path for group in groups.values() for short, path in group.items()}
    if name in known:
        return known[name]
    module, colon, class_name = name.partition(":")
    if colon and module and class_name and module not in LIBRARIES:
        return name
    for other, names in SHORT_NAMES.items():
        if name in names:
            raise ValueError(f"'{name}' is a choice for '{other}', not here; {_choice(known)}")
    if name in OLD_TYPES:
        raise ValueError(f"'{name}' was renamed to '{OLD_TYPES[name]}'")
    raise ValueError(f"unknown type '{name}'{did_you_mean(name, known) or '; ' + _choice(known)}")


def _choice(known: Iterable[str]) -> str:
    return f"choose one of {', '.join(known)} or give an import path 'module:Class'"


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            where = "; is its folder the working directory, or is it installed?"
            raise ValueError(f"there is no module '{name}'{where}") from error
        raise ValueError(
            f"module '{name}' needs the package '{missing}', which is not installed"
        ) from error
    except (Exception, SystemExit) as error:  # A user's module may raise anything.
        raise ValueError(
            f"import of module '{name}' failed with {type(error).__name__}: {error}"
        ) from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"``, or an empty string where no known word is close."""
    nearest = min(known, key=lambda other: _edit_distance(word, other), default="")
    if nearest and _edit_distance(word, nearest) <= max(1, len(word) // 3):
        return f"; did you mean '{nearest}'?"
    return ""


def _edit_distance(a: str, b: str) -> int:
    """Returns the Damerau-Levenshtein distance, with swaps of adjacent characters."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
