"""Stages that start from a checkpoint of RLlib."""

import json
import shutil
from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from dmrl_ray.config.loading import parse_config, resolved
from dmrl_ray.control import controller
from dmrl_ray.control.run_state import Run
from dmrl_ray.control.stages import _policy
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import set_weights
from dmrl_ray.jobs.transfer import rllib_start
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.store.writer import RunWriter

OBS = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
TWO = gym.spaces.Discrete(2)
BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
CONFIG = """
tasks: cartpole
workers: {{num: 0}}
rollout: {{num_envs: 4}}
network:
  encoder: {{type: mlp, hidden_sizes: [8, 8], activation: tanh}}
  separate_value: false
  {norm}
algorithm: {{type: ppo, num_steps: 8}}
stages:
  special: {{type: finetune, init_from: "rllib:{path}", {trust} tasks: 2, updates: 1}}
"""


def module(actions=TWO, **settings):
    """RLlib's own, with weights that are not the first ones."""
    torch.manual_seed(0)
    return DefaultPPOTorchRLModule(
        observation_space=OBS,
        action_space=actions,
        model_config=asdict(DefaultModelConfig(fcnet_hiddens=[8, 8], **settings)),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("rllib") / "module"
    module().save_to_path(str(path))
    return path


def policy(encoder, actions=TWO, **settings):
    network = {"encoder": encoder, "normalize_obs": False, **settings}
    made = ActorCritic.Config.model_validate(network)
    return ActorCritic(made, OBS, actions, sees_previous=False)


MLP = {"type": "mlp", "hidden_sizes": [8, 8], "activation": "tanh"}
NETWORKS = {
    "shared": ({}, MLP, {"separate_value": False}),
    "separate": ({"vf_share_layers": False}, MLP, {}),
    "continuous": (
        {"actions": BOX, "free_log_std": True, "vf_share_layers": True},
        MLP,
        {"separate_value": False, "actions": BOX},
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_rllibs_own_network_is_the_same_function_here(kind, tmp_path):
    theirs, encoder, settings = NETWORKS[kind]
    rllib = module(**theirs)
    rllib.save_to_path(str(tmp_path))
    ours = policy(encoder, **settings)
    start = rllib_start(f"rllib:{tmp_path}", ours)
    assert not start.unused
    assert all("norm" in name for name in start.missing)
    set_weights(ours, start.weights)
    obs = torch.randn(5, 4)
    pi, features, _ = ours(obs[None])
    out = rllib.forward_train({"obs": obs})
    torch.testing.assert_close(pi[0], out["action_dist_inputs"])
    value = ours.denormalize_value(ours.value(features, obs[None]))[0]
    torch.testing.assert_close(value, rllib.compute_values({"obs": obs}))
    # Its first look at returns keeps what the critic says.
    ours.update_value_norm(100 * torch.randn(50))
    after = ours.denormalize_value(ours.value(features, obs[None]))[0]
    torch.testing.assert_close(after, value, rtol=1e-3, atol=1e-3)


def test_rllibs_lstm_is_the_same_function_here(tmp_path):
    rllib = module(use_lstm=True, lstm_cell_size=6, vf_share_layers=True)
    rllib.save_to_path(str(tmp_path))
    ours = policy({"type": "lstm", "hidden_size": 6, "torso": MLP})
    start = rllib_start(f"rllib:{tmp_path}", ours)
    assert not start.unused
    set_weights(ours, start.weights)
    obs = torch.randn(7, 3, 4)
    state = {name: torch.zeros(3, 1, 6) for name in ("h", "c")}
    out = rllib.forward_train({"obs": obs.transpose(0, 1), "state_in": state})
    pi, _, _ = ours(obs, memory=ours.initial_memory(3))
    torch.testing.assert_close(pi, out["action_dist_inputs"].transpose(0, 1))


def config(path, trust="trust: true,", norm="normalize_obs: false"):
    return parse_config(CONFIG.format(path=path, trust=trust, norm=norm), "here.yaml")


def test_a_stage_starts_from_it_and_records_the_source(checkpoint, tmp_path):
    controller.run(config(checkpoint), tmp_path / "run", display=Display(quiet=True))
    events = load(tmp_path / "run", table="events")
    detail = json.loads(events[events["event"] == "policy_read"]["detail"].iloc[0])
    assert detail["source"] == f"rllib:{checkpoint}"
    assert detail["matched"]["policy_head.layer.weight"] == "pi.net.mlp.0.weight"
    assert detail["missing"] == ["value_norm.mean", "value_norm.variance"]
    assert detail["unused"] == []


def test_it_is_read_once_and_then_part_of_the_run(checkpoint, tmp_path, capsys):
    path = shutil.copytree(checkpoint, tmp_path / "module")
    settings = config(path)
    with RunWriter.create(tmp_path / "run", "{}\n", {}) as writer:
        run = Run(settings, writer, Display(), None)
        first = _policy(run, "special", settings.stages["special"], "best")
        shown = capsys.readouterr().out
        assert "policy_head.layer.bias" in shown
        assert "pi.net.mlp.0.bias" in shown
        run.commit()
        shutil.rmtree(path)
        again = _policy(run, "special", settings.stages["special"], "best")
    assert first.version == again.version
    assert first.arrays.keys() == again.arrays.keys()
    for name in first.arrays:
        np.testing.assert_array_equal(first.arrays[name], again.arrays[name])


def test_a_pickle_is_not_read_without_trust(checkpoint):
    with pytest.raises(ConfigError, match=r"here.yaml:11:\d+: stages.special.init_from: .* pickle"):
        config(checkpoint, trust="")


def test_an_incompatible_source_is_reported_before_anything_starts(checkpoint, tmp_path):
    def mistake(**changes):
        with pytest.raises(ConfigError) as error:
            controller.check(config(**{"path": checkpoint, **changes}))
        return str(error.value)

    assert "network.normalize_obs" in mistake(norm="")
    assert "is no RLlib checkpoint" in mistake(path=tmp_path)
    (tmp_path / "module_state.pkl").write_bytes(b"no pickle")
    assert "cannot be read" in mistake(path=tmp_path)
    with pytest.raises(ValueError, match=r"sizes alike: .* has shape \(8, 4\) instead of \(9, 4\)"):
        rllib_start(f"rllib:{checkpoint}", policy({**MLP, "hidden_sizes": [9, 8]}))
    module(BOX).save_to_path(str(tmp_path / "box"))
    with pytest.raises(ValueError, match="free_log_std"):
        rllib_start(f"rllib:{tmp_path / 'box'}", policy(MLP, BOX))


def test_a_folder_cannot_say_that_its_own_pickle_is_to_be_trusted(checkpoint, tmp_path):
    settings = config(checkpoint)
    with RunWriter.create(tmp_path / "run", resolved(settings), {}) as writer:
        Run(settings, writer, Display(quiet=True), None).commit()
    with pytest.raises(ConfigError, match=r"'special': init_from: rllib:.* with --trust"):
        controller.resume(tmp_path / "run", display=Display(quiet=True))
    controller.resume(tmp_path / "run", trust=True, display=Display(quiet=True))
    assert "policy_read" in load(tmp_path / "run", table="events")["event"].tolist()
