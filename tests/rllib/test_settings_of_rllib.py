"""RLlib's settings in YAML: errors have locations, and values are applied."""

import dataclasses

import pytest
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from dmrl_ray.config.components import SHORT_NAMES
from dmrl_ray.config.loading import parse_config, resolved
from dmrl_ray.errors import ConfigError
from dmrl_ray.rllib import baselines
from dmrl_ray.rllib.settings import apply

KINDS = [
    getattr(baselines, name.partition(":")[2]) for name in SHORT_NAMES["algorithm"] if ":" in name
]
TEXT = """tasks: bandit
algorithm:
  type: "rllib:{kind}"
  {setting}
stages:
  multi: {{type: pretrain, env_steps: 1}}
"""


def parse(setting, kind="PPO"):
    return parse_config(TEXT.format(setting=setting, kind=kind), "test.yaml")


def applied(kind, **settings):
    config = kind.library()
    apply(kind.Config.model_validate(settings), config)
    return config


def values(config):
    """What an AlgorithmConfig holds, as far as it can be compared."""
    model = config.model_config
    return {k: v for k, v in vars(config).items() if k != "_model_config"} | {"model": model}


MISTAKES = {
    "lamda_: 0.9": "4:3: algorithm.lamda_: unknown setting; did you mean 'lambda_'?",
    "model: {fcnet_hidens: [8]}": "4:11: algorithm.model.fcnet_hidens: unknown setting; did you "
    "mean 'fcnet_hiddens'?",
    "lr: fast": "4:3: algorithm.lr: must be a list or a number, found 'fast'",
    "num_epochs: 2.5": "4:3: algorithm.num_epochs: must be a whole number, found 2.5",
    "num_epochs: true": "4:3: algorithm.num_epochs: must be a number, found 'true'",
    "use_kl_loss: 3": "4:3: algorithm.use_kl_loss: must be true or false, found 3",
    "model: {use_lstm: 7}": "4:11: algorithm.model.use_lstm: must be true or false, found 7",
    "rollout_fragment_length: [1]": "4:3: algorithm.rollout_fragment_length: must be a text or a "
    "whole number, found [1]",
    "lr_schedule: [[0, 1]]": "4:3: algorithm.lr_schedule: unknown setting; allowed here: ",
    "callbacks_class: x": "4:3: algorithm.callbacks_class: unknown setting; allowed here: ",
}


@pytest.mark.parametrize(("setting", "message"), MISTAKES.items(), ids=list(MISTAKES))
def test_an_error_in_a_setting_is_reported_once_with_its_location(setting, message):
    with pytest.raises(ConfigError) as raised:
        parse(setting)
    assert str(raised.value).startswith(f"test.yaml:{message}")
    assert str(raised.value).count("test.yaml") == 1


def test_a_misspelt_algorithm_is_understood():
    with pytest.raises(ConfigError, match="unknown type 'rllib:PPOO'; did you mean 'rllib:PPO'"):
        parse("", "PPOO")


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_rllib(kind):
    ours, theirs = values(applied(kind)), values(kind.library())
    different = {name for name in theirs if ours[name] != theirs[name]}
    # A schedule read from YAML is made of lists, RLlib's own of tuples.
    assert different - {"epsilon"} <= {
        "num_cpus_per_env_runner",
        "num_env_runners",
        "num_learners",
        "min_time_s_per_iteration",
        "model",
    }
    model = {**dataclasses.asdict(applied(kind)._model_config), **theirs["model"]}
    assert ours["model"] == model


def test_settings_are_applied_by_any_method_of_rllib():
    config = applied(
        baselines.PPO,
        lambda_=0.5,
        lr=[[0, 1e-3], [100, 1e-4]],
        gamma=0.5,
        num_envs_per_env_runner=7,
        num_env_runners=3,
        num_learners=2,
        min_sample_timesteps_per_iteration=9,
        model={"use_lstm": True, "fcnet_hiddens": [5]},
    )
    assert isinstance(config, AlgorithmConfig)
    assert (config.lambda_, config.gamma, config.lr) == (0.5, 0.5, [[0, 1e-3], [100, 1e-4]])
    assert (config.num_envs_per_env_runner, config.num_env_runners) == (7, 3)
    assert (config.num_learners, config.min_sample_timesteps_per_iteration) == (2, 9)
    assert config.model_config["use_lstm"] is True
    assert config.model_config["fcnet_hiddens"] == [5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_resolved_config_has_every_setting_and_reads_back(kind):
    config = parse("gamma: 0.9", kind.__name__)
    text = resolved(config)
    assert "gamma: 0.9" in text
    assert "num_envs_per_env_runner: 1" in text
    assert parse_config(text, "resolved.yaml") == config
